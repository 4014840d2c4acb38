"""A forked command against the same one that is started from nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import POPEN
from tests.support.serving import environment, serving, tiny_library
from tests.support.warm_start import WarmPopen
from tombola.sample_image import draw_sample

pytestmark = pytest.mark.usefixtures("warm_start")
TOMBOLA = [sys.executable, "-m", "tombola"]


def result(popen: Any, folder: Path, *words: str, **variables: str) -> tuple[int, bytes, bytes]:
    folder.mkdir(exist_ok=True)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with popen([*TOMBOLA, *words], cwd=folder, env=environment(**variables), **pipes) as process:
        output, error = process.communicate()
    return process.returncode, output, error


@pytest.mark.parametrize(
    ("words", "variables", "code"),
    [
        (["sample"], {}, 0),
        (["sample", "ship.png"], {}, 0),
        (["classify", "nowhere"], {}, 2),
        (["serve"], {"TOMBOLA_PORT": "many"}, 2),
    ],
)
def test_it_answers_and_ends_as_one_that_is_started_from_nothing(
    words: list[str], variables: dict[str, str], code: int, tmp_path: Path
) -> None:
    forked, started = (
        result(popen, tmp_path / name, *words, **variables)
        for name, popen in {"forked": subprocess.Popen, "started": POPEN}.items()
    )
    assert forked == started
    assert forked[0] == code
    assert sorted(path.name for path in (tmp_path / "forked").iterdir()) == words[1:] * (code == 0)


def test_it_is_a_child_of_the_test_that_signals_reach(tmp_path: Path) -> None:
    library = tiny_library(tmp_path / "library", structures=("resnet18",))
    with serving(library.path, tmp_path / "state") as process:
        assert isinstance(process.process, WarmPopen)
        command = Path(f"/proc/{process.process.pid}/cmdline").read_bytes()
        assert b"warm_start" in command  # forked indeed
        assert Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
        assert process.classify(draw_sample())[0] == 200
        assert process.end(signal.SIGKILL) == -signal.SIGKILL


def test_what_counts_at_import_starts_it_from_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*TOMBOLA, "work", "/nowhere"], env=environment(LANG="C.other"), stderr=subprocess.DEVNULL
    ) as process:
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert b"warm_start" not in command


@pytest.mark.usefixtures("cold_start")
def test_a_test_may_do_without() -> None:
    assert subprocess.Popen is POPEN
