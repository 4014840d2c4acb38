"""No command calls anybody or writes anywhere but where it was told to: each runs traced, with an empty HOME."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from model_store.library import Library
from tests.support.audit_models import tiny
from tests.support.serving import ROOT, Process, running
from tests.support.side_effects import (
    WITHOUT,
    Listener,
    Trace,
    bare,
    beyond_loopback,
    can_trace,
    command,
    listening,
    outside,
    read_trace,
)
from tests.support.waiting import until
from tests.training.conftest import data, digits_zip
from tombola.sample_image import draw_sample

__all__ = ["data", "digits_zip"]  # fixtures
QUIET: Final = {"openvino", "matplotlib", "art", "torchvision"}  # packages that quiet_imports.py imports for the others
PLACE: Final = "model_store/quiet_imports.py"
PROGRAMS: Final = ("tombola", "model_store", "service", "training", "tests", "benchmarks", "tools")
needs_strace = pytest.mark.skipif(not can_trace(), reason=WITHOUT)

# Several commands in one process, so that a slow import is paid for once. Each line of arguments is one command.
RUN: Final = """
import json, sys
from tombola.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    assert code in {codes}, (words, code)
"""


@pytest.fixture
def proxy() -> Iterator[Listener]:
    with listening() as listener:
        yield listener


class World:
    """Folders for one traced process: an empty HOME, an empty temporary folder, and the only one it may write to."""

    def __init__(self, folder: Path, proxy: Listener) -> None:
        self.home, self.temporary, self.state = (folder / name for name in ("home", "temporary", "state"))
        for path in (self.home, self.temporary, self.state):
            path.mkdir()
        self.log, self.proxy = folder / "trace.log", proxy

    @property
    def environment(self) -> dict[str, str]:
        return bare(self.home, self.temporary, **self.proxy.environment)

    def run(self, *words: str) -> Trace:
        done = subprocess.run(
            command(self.log, *words),
            env=self.environment,
            cwd=self.state,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return read_trace(self.log)

    def holds_nothing_else(self, trace: Trace) -> None:
        assert outside(trace, self.state, self.temporary) == []
        assert beyond_loopback(trace) == []
        assert self.proxy.heard == []
        assert list(self.home.iterdir()) == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture(scope="module")
def tiny_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny(tmp_path_factory.mktemp("library"), ("resnet18",))


@pytest.fixture
def world(tmp_path: Path, proxy: Listener) -> World:
    return World(tmp_path, proxy)


@needs_strace
def test_the_trace_sees_files_and_calls(world: World) -> None:
    """What the tests below rely on: a file in HOME and a call of a stranger are both seen, the failed call too."""
    program = """
import os, pathlib, socket, subprocess, sys
home = pathlib.Path.home()
(home / "made").mkdir()
(home / "made" / "file").write_text("x")
os.chdir(home)
os.rename(home / "made" / "file", home / "moved")
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect_ex(("192.0.2.1", 53))
subprocess.run([sys.executable, "-c", "open('child', 'w')"], check=True)
"""
    trace = world.run("-c", program)
    seen = {Path(path).relative_to(world.home).as_posix() for path in outside(trace, world.state, world.temporary)}
    assert seen == {"made", "made/file", "moved", "child"}
    assert beyond_loopback(trace) == [("192.0.2.1", 53)]


@needs_strace
def test_the_service_s_commands_write_and_call_nowhere_else(world: World, tiny_library: Library) -> None:
    state, library = str(world.state), str(tiny_library.path)
    engine = ["--state-dir", state, "--threads", "1"]
    few = ["--images", "2", "--epsilons", "8", "--attacks", "paper-eot"]
    lines = [
        ["check", library, *engine, "--json"],
        ["sample", f"{state}/ship.png"],
        ["bench", "raw", "--library", library, *engine, "--images", "8", "--json", f"{state}/raw.json"],
        ["audit", library, "--profile", "smoke", *few, "--threads", "1", "--out", f"{state}/a"],
        ["audit", "--tables", f"{state}/a/report.json", "--out", f"{state}/tables"],
        ["audit", "--compare", f"{state}/a/report.json", f"{state}/a/report.json"],
    ]
    loaded = (
        "from model_store import quiet_imports as quiet; quiet.import_hop_skip_jump(); quiet.import_dataset('CIFAR10')"
    )
    program = RUN.format(codes=(0, 4)) + loaded  # 4: an audit of so few images proves nothing
    world.holds_nothing_else(world.run("-c", program, json.dumps(lines)))
    assert (world.state / "tables" / "accuracy.svg").is_file()


@needs_strace
def test_training_s_commands_write_and_call_nowhere_else(world: World, tiny_library: Library, data: Path) -> None:
    run, library = str(world.state / "run"), str(world.state / "library")
    few = {"epochs": 0.02, "guards": 0, "attack_steps": 1}
    lines = [
        ["plan", "--only", "resnet18-07"],
        ["search", "--data", str(data), "--state", run, "--only", "resnet18-07", "--set", "width=4", "batch=8"]
        + [f"{name}={value}" for name, value in few.items() if name != "epochs"]
        + ["--epochs", str(few["epochs"])],
        ["status", "--state", run],
        ["figures", "--state", run, "--out", f"{run}/searches.svg"],
        ["export", "--state", run, library],
        ["table", library],
        ["compare", library, "--data", str(data), "--images", "10", "--json", f"{run}/differences.json"],
    ]
    trace = world.run("-c", RUN.format(codes=(0,)), json.dumps(lines))
    world.holds_nothing_else(trace)
    assert (world.state / "run" / "differences.json").is_file()


@needs_strace
def test_a_server_with_its_engine_and_its_audits_writes_and_calls_nowhere_else(
    world: World, tiny_library: Library
) -> None:
    """The process itself, the host of the engine, its forks, and the worker of an audit."""
    flags = ["serve", "--library", str(tiny_library.path), "--state-dir", str(world.state), "--threads", "2"]
    flags += ["--port", "0", "--admin-port", "0", "--drain-delay-s", "0"]
    words = command(world.log, "-m", "tombola", *flags)
    with running(words, world.environment, world.state) as process:
        tracer = process.process
        try:
            assert process.classify(draw_sample())[0] == 200
            audit_until_it_attacks(process, (world.state / "admin-token").read_text().strip())
        finally:
            server = int(Path(f"/proc/{tracer.pid}/task/{tracer.pid}/children").read_text().split()[0])
            os.kill(server, 15)
            tracer.wait(timeout=60)
    trace = read_trace(world.log)
    world.holds_nothing_else(trace)
    assert any(path.endswith(".blob") for path in trace.files)  # OpenVINO was at work


def audit_until_it_attacks(process: Process, token: str) -> None:
    """By then its process has imported everything that it needs."""
    request = {"profile": "smoke", "images": 2, "attacks": ["paper-eot"], "epsilons": [8]}
    bearer = {"authorization": f"Bearer {token}"}
    status, answer = process.post(f"{process.admin}/admin/audits", json.dumps(request).encode(), **bearer)
    assert status == 202, answer
    job = json.loads(answer)["id"]

    def attacks() -> bool:
        state = json.loads(process.get(f"{process.admin}/admin/audits/{job}", **bearer)[1])
        return state["progress"] is not None

    until(attacks, limit_s=180)


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """The packages that a file imports when it runs, not those for its annotations alone, with their lines."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for part in tree.body:
        if isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING":
            part.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0], node.lineno


def test_packages_that_write_or_call_on_import_are_imported_in_one_place() -> None:
    files = [path for name in PROGRAMS for path in sorted((ROOT / name).rglob("*.py"))]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        if path != ROOT / PLACE
        for name, line in imported(path)
        if name in QUIET
    ]
    assert wrong == []
    assert {name for name, _ in imported(ROOT / PLACE)} >= QUIET


def test_a_machine_without_openvino_runs_what_needs_none(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['openvino'] = None\n"
    lines = [["sample", f"{tmp_path}/ship.png"]]
    program = hidden + RUN.format(codes=(0,)) + "main(['bench', '--help'])"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(lines)],
        env=bare(tmp_path, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: tombola bench" in done.stdout


def test_an_inherited_folder_of_prometheus_client_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "of another program"
    folder.mkdir()
    environment = bare(tmp_path, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(folder), prometheus_multiproc_dir=str(folder))
    program = (
        "from service.observability.metrics import Metrics; metrics = Metrics(); "
        "metrics.inc('shed_total', reason='rate'); print(metrics.text())"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'tombola_shed_total{reason=\\"rate\\"} 1.0' in done.stdout.replace('"', '\\"')
    assert list(folder.iterdir()) == []
