"""The fork server that is started before the service has imported torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_store.library import Library
from service.engine.factory import open_for_serving
from service.engine.launcher import start_ahead
from service.settings import Settings
from tests.support.serving import tiny_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("library") / "tiny")


def test_starting_it_imports_nothing_slow() -> None:
    slow = "torch", "openvino", "PIL", "fastapi"
    code = f"import service.engine.launcher, sys; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "torch"},
        {"device": "cuda"},
        {"engine_processes": False},
        {"library": "https://host.example/library#sha256=" + 64 * "0"},
    ],
)
def test_none_is_started_where_it_may_not_be_needed(settings: dict[str, Any], tmp_path: Path) -> None:
    made = Settings(state_dir=tmp_path, **settings)
    assert start_ahead(made.library, made, gpu=False) is None


def test_none_is_started_where_a_gpu_may_be_faster(tmp_path: Path) -> None:
    assert start_ahead(None, Settings(state_dir=tmp_path), gpu=True) is None


def test_the_service_uses_the_one_that_was_started(tiny: Library, tmp_path: Path) -> None:
    settings = Settings(library=tiny.path, state_dir=tmp_path, threads=1)
    steps: list[str] = []
    fork_server = start_ahead(tiny.path, settings, steps.append, gpu=False, background=False)
    assert fork_server is not None
    engine = open_for_serving(tiny, settings, fork_server)
    assert engine.pids()[0] == fork_server.popen.pid
    assert steps[0] == "compiling 4 tickets for openvino"
    assert b'"background": false' in Path(f"/proc/{fork_server.popen.pid}/cmdline").read_bytes()


def test_one_that_is_not_needed_after_all_ends(tiny: Library, tmp_path: Path) -> None:
    fork_server = start_ahead(tiny.path, Settings(state_dir=tmp_path), gpu=False)
    assert fork_server is not None
    engine = open_for_serving(tiny, Settings(library=tiny.path, state_dir=tmp_path, engine="torch"), fork_server)
    assert engine.name == "torch"
    assert fork_server.popen.wait(60) is not None
