"""docs/TRAINING.md's walk from a folder of pictures to an audited service, at a small scale: its own commands."""

import json
import re
import shlex
import urllib.request
from pathlib import Path

import pytest

from model_store.library import open_library
from tests.support.serving import fetch, serving
from tombola.cli import main
from tools.shapes import SHAPES, write_shapes

pytestmark = pytest.mark.usefixtures("warm_start")

GUIDE = (Path(__file__).parents[2] / "docs" / "TRAINING.md").read_text(encoding="utf-8")
SMALLER = {  # of the same options: what takes seconds instead of half an hour
    "plan": ["--only", "resnet18", "--seconds", "0.01", "--set", "width=4", "batch=16"],
    "search": ["--workers", "1", "--only", "resnet18-30", "--epochs", "1", "--set", "width=4", "batch=16"],
    "audit": ["--images", "4"],
}


def commands(program: str) -> list[list[str]]:
    """The walk's commands of one program, as words."""
    lines = re.findall(rf"^\$ {program} (.*?)(?: &)?$", GUIDE, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_walk_of_the_guide_leads_from_a_folder_to_an_audited_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOMBOLA_CACHE", raising=False)
    drawn = commands("python -m tools.shapes")
    assert [words[0] for words in drawn] == ["shapes", "fresh"]
    for place, words in enumerate(drawn):
        assert write_shapes(tmp_path / words[0], 6, seed=place) == 30
    steps = commands("tombola")
    assert [words[0] for words in steps] == ["plan", "search", "export", "table", "check", "serve", "audit"]
    for words in steps:
        if words[0] != "serve":
            assert main([*words, *SMALLER.get(words[0], [])]) == 0, words
    assert "input      3x64x64, cover, bilinear" in capsys.readouterr().out
    library = open_library(tmp_path / "my-library")
    assert library.classes == tuple(SHAPES)
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["library"]["digest"] == library.digest
    with serving(library.path, tmp_path / "state") as planes:
        body = (tmp_path / "shapes" / "star" / "0003.jpg").read_bytes()
        status, answer = fetch(urllib.request.Request(f"{planes.public}/v1/classify", body))
        assert (status, json.loads(answer)["predictions"][0]["label"] in library.classes) == (200, True)
        status, answer = planes.get(f"{planes.public}/v2/models/tombola")
        assert (status, json.loads(answer)["inputs"][1]["shape"]) == (200, [-1, 3, 64, 64])
