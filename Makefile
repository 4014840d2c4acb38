# What people type: serve, check, test-fast, test. Each installs what it needs into .venv, once.
PYTHON ?= python3
# Which build of torch: auto (CPU wheels where there is no NVIDIA driver and the index lists them), cpu, or default.
TORCH ?= auto
# Extra words for pip: for example PIP_FLAGS="--extra-index-url ..." for an index with the build of your choice.
PIP_FLAGS ?=
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint .venv/torch.txt $(PIP_FLAGS)
# Three on two cores: a third of the longest tests' time is waiting for processes that start or end.
WORKERS ?= 3
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -rsfE
# Tests of arithmetic, formats and single modules: no server, no browser, no search.
FAST := tests/model_store tests/tombola tests/tools tests/test_imports.py tests/deploy/test_files.py \
	tests/service/test_settings.py tests/service/scheduling tests/service/observability/test_metrics.py \
	tests/training/test_sparsity.py tests/benchmarks

.PHONY: serve check test-fast test suite format bench results clean
.DELETE_ON_ERROR:

serve: .venv/serve.stamp
	$(BIN)/tombola serve

check: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-fast: .venv/test.stamp
	$(PYTEST) $(FAST)

# It ends with the tests that were skipped and what each of them needs.
test: .venv/test.stamp
	$(MAKE) --no-print-directory --jobs 2 check suite

suite: .venv/test.stamp
	$(PYTEST)

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/test.stamp
	$(BIN)/python -m benchmarks

# Tables and figures of docs/RESULTS.md, from the committed report and the libraries' manifests.
results: .venv/serve.stamp
	$(BIN)/tombola audit --tables service/audit/results/report.json --out service/audit/results --into docs/RESULTS.md
	$(BIN)/tombola table --into docs/RESULTS.md
	$(BIN)/tombola table model_store/library-scratch --into docs/RESULTS.md
	$(BIN)/tombola table libraries/wide --into docs/RESULTS.md
	$(BIN)/tombola figures --library model_store/library --library libraries/wide --out docs/tickets.svg

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis

.venv/pip.stamp:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

.venv/torch.txt: .venv/pip.stamp
	$(BIN)/python tools/choose_torch.py $(TORCH) > $@

.venv/serve.stamp: .venv/torch.txt pyproject.toml
	$(PIP) -e .
	touch $@

.venv/test.stamp: .venv/torch.txt pyproject.toml
	$(PIP) -e '.[test]'
	touch $@ .venv/serve.stamp
