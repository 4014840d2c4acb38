"""Figures of searches and of libraries."""

from pathlib import Path

import pytest

from model_store.library import EMBEDDED, open_library
from tombola.cli import main
from training.plots import seconds_spent


def test_a_ticket_bears_its_share_of_the_dense_network_that_it_was_searched_in() -> None:
    wide = open_library(Path(__file__).parents[2] / "libraries" / "wide")
    (dense,) = wide.baseline_entries
    own = [entry.provenance.seconds for entry in wide.entries]
    assert all(entry.provenance.parent == dense.sha256 for entry in wide.entries)
    shares = [spent - alone for spent, alone in zip(seconds_spent(wide), own, strict=True)]
    assert shares == pytest.approx([dense.provenance.seconds / len(own)] * len(own))
    alone = open_library(EMBEDDED)
    assert seconds_spent(alone) == [entry.provenance.seconds for entry in alone.entries]


def test_libraries_are_drawn_side_by_side_and_always_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        libraries = ["--library", str(EMBEDDED), "--library", "libraries/wide"]
        assert main(["figures", *libraries, "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert f"figure in {files[1]}" in capsys.readouterr().out
    assert main(["figures", "--library", "/nowhere", "--out", str(files[0])]) == 2
    assert "/nowhere: no such folder" in capsys.readouterr().err
    assert main(["figures", "--library", str(EMBEDDED), "--out", str(tmp_path / "a.bmp")]) == 2
    assert "expected a name that ends in .svg or .png" in capsys.readouterr().err


def test_without_a_log_there_is_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "--state", str(tmp_path), "--out", str(tmp_path / "a.svg")]) == 2
    assert "no search has logged a step yet" in capsys.readouterr().err
