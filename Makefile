# Two commands for everybody: `make serve` and `make test`. Each installs what it needs into .venv, once.
PYTHON ?= python3
# Extra words for pip: for example PIP_FLAGS="--extra-index-url ..." for a CPU or CUDA build of torch of your choice.
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: serve test format bench clean
.DELETE_ON_ERROR:

serve: .venv/serve.stamp
	$(BIN)/tombola serve

test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/test.stamp
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .hypothesis

.venv/pip.stamp:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

.venv/serve.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e .
	touch $@

.venv/test.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[test]'
	touch $@ .venv/serve.stamp
