"""Shared fixtures: small tickets of every structure, and a library of them."""

import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

from model_store.library import Library, write_library
from model_store.ticket import Ticket
from tests.support.tickets import CLASSES, eight_tickets, items
from tests.support.warm_start import Origin, WarmPopen, started_origin

# The same examples in every run, on any machine at any load; nothing is written to the work tree.
settings.register_profile("tombola", deadline=None, derandomize=True, database=None)
settings.load_profile("tombola")

POPEN: Final = subprocess.Popen

# Files of few, long tests. Each is run by one worker, so that one which starts late keeps the others waiting.
LONGEST: Final = (
    "test_ray.py",
    "test_flow.py",
    "test_run.py",
    "test_ray_serve.py",
    "test_rolling.py",
    "test_side_effects.py",
    "test_cuda.py",
    "test_jobs.py",
    "test_explore.py",
    "test_wheel.py",
    "test_local.py",
    "test_endpoint.py",
    "test_console.py",
    "test_training_guide.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others stay in their order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: no collection of garbage has to walk over it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_tickets() -> list[Ticket]:
    """Eight: two densities of each structure, at the smallest widths."""
    return eight_tickets()


@pytest.fixture(scope="session")
def small_library(small_tickets: list[Ticket], tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The eight tickets as a library on disk. Nothing may change its folder: see library_folder."""
    path = tmp_path_factory.mktemp("library")
    return write_library(path, classes=CLASSES, data="random", tickets=items(small_tickets))


@pytest.fixture
def library_folder(small_library: Library, tmp_path: Path) -> Path:
    """A copy of the small library that a test may damage."""
    return Path(shutil.copytree(small_library.path, tmp_path / "library"))


@pytest.fixture(scope="session")
def fork_origin() -> Iterator[Origin]:
    """The process that warm_start forks from."""
    with started_origin() as made:
        yield made


@pytest.fixture(scope="module")
def warm_start(fork_origin: Origin) -> Iterator[None]:
    """Our processes are forked where they can be, so that none imports anew what another has imported."""
    with pytest.MonkeyPatch.context() as patch:
        fork_from(fork_origin, patch)
        yield


@pytest.fixture
def warm_start_once(fork_origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for one test of a file, beside others of how a process starts."""
    fork_from(fork_origin, monkeypatch)


def fork_from(origin: Origin, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WarmPopen, "origin", origin, raising=False)
    patch.setattr(subprocess, "Popen", WarmPopen)


@pytest.fixture
def cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test whose subject is a process from its very start, in a file that uses warm_start."""
    monkeypatch.setattr(subprocess, "Popen", POPEN)
