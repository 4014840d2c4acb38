"""`tombola classify`: folders, zips and lists to tables, here and by a service; interrupted, resumed, refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from service.errors import ErrorMessage, Overloaded
from tests.support.planes import StandIn, behind_a_port, png, public_app
from tests.support.serving import environment, tiny_library
from tests.support.tickets import CLASSES
from tests.support.waiting import until
from tombola.cli import main
from tombola.results_file import COLUMNS, ResultsFile, ResultsRejected, Row
from tombola.sources import list_pictures, read_pictures

pytestmark = pytest.mark.usefixtures("warm_start")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, one of each class of the stand-in; a file that is none, and one that only claims to be."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for index in range(10):
        place = root if index < 5 else root / "more"
        (place / f"{index}.png").write_bytes(png(25 * index + 12))
    (root / "notes.md").write_text("no picture")
    (root / "damaged.png").write_bytes(png()[:60])
    return root


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def classify(*words: object) -> int:
    return main(["classify", *map(str, words)])


def test_a_service_s_answers_in_all_three_formats(folder: Path, tmp_path: Path) -> None:
    with behind_a_port(public_app()) as place:
        for suffix in ("jsonl", "csv", "parquet"):
            words = (folder, "--url", f"http://{place}", "--draws", 3, "--out", tmp_path / f"results.{suffix}")
            assert classify(*words) == 1  # one picture is damaged
    rows = lines(tmp_path / "results.jsonl")
    assert [str(Path(row["file"]).relative_to(folder)) for row in rows] == [
        *[f"{index}.png" for index in range(5)],
        "damaged.png",
        *[f"more/{index}.png" for index in range(5, 10)],
    ]
    by_name = {Path(row["file"]).name: row for row in rows}
    assert len(by_name) == 11
    assert by_name["damaged.png"]["error"] == ErrorMessage.IMAGE_DAMAGED
    for index in range(10):
        row = by_name[f"{index}.png"]
        assert (row["label"], row["index"], row["probability"]) == (CLASSES[index], index, 0.62)
        assert (row["agreement"], row["draws"], row["error"]) == (1.0, 3, None)
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{name: row[name] or "" for name in COLUMNS} for row in table] == [
        {name: "" if row[name] is None else str(row[name]) for name in COLUMNS} for row in rows
    ]
    assert parquet.read_table(tmp_path / "results.parquet").to_pylist() == rows
    assert not list(tmp_path.glob(".*"))


def test_folders_zips_and_lists_name_their_pictures(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with zipfile.ZipFile(tmp_path / "photos.ZIP", "w") as archive:
        archive.write(folder / "0.png", "a/0.png")
        archive.write(folder / "0.png", "__MACOSX/._0.png")
        archive.writestr("a/notes.md", "no picture")
    (tmp_path / "list.txt").write_text(f"{folder}/0.png\n\n{tmp_path}/missing.png\n{folder}/0.png\n{folder}\n")
    sources = list_pictures([str(tmp_path / "photos.ZIP"), str(tmp_path / "list.txt"), str(folder)])
    names = [source.name for source in sources]
    assert names[:4] == [
        f"{tmp_path}/photos.ZIP/a/0.png",
        f"{folder}/0.png",
        f"{tmp_path}/missing.png",
        str(folder),
    ]
    assert len(names) == len(set(names)) == 3 + 11 - 1 + 1
    pictures = list(read_pictures(sources))
    assert pictures[0].data == pictures[1].data == png(12)
    assert [picture.error for picture in pictures[2:4]] == ["No such file or directory", "not a file"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "empty: no pictures in it"),
        (["none.zip"], "none.zip: not a readable zip"),
        (["blank.txt"], "blank.txt: the list is empty"),
        (["x.png", "--out", "results.xls"], "--out results.xls: expected a name that ends in .jsonl, .csv, .parquet"),
        (["x.png", "--out", "nowhere/results.csv"], "--out nowhere/results.csv: the folder nowhere is not there"),
        (["x.png", "--out", "x.csv"], "--out x.csv: is there already; delete it"),
        (["x.png", "--library", "somewhere"], "--library and --url: a running service has its own"),
        (["x.png", "--key-file", "nowhere"], "nowhere: No such file or directory"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    words: list[str], text: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.zip").write_bytes(b"none")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "x.png").write_bytes(png())
    assert classify("--out", "results.csv", *words, "--url", "http://127.0.0.1:1") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tombola: {text}")
    assert error.count("\n") == 1


def test_trouble_with_the_service_ends_the_run_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    out, manager = tmp_path / "results.jsonl", StandIn()
    with behind_a_port(public_app(manager)) as place:
        words = (folder, "--url", f"http://{place}", "--concurrency", 1, "--timeout-s", 5, "--out", out)

        kept = manager.scheduler.submit

        async def some(rows: Any, **options: Any) -> Any:
            if len(manager.scheduler.rows) == 4:
                raise Overloaded(retry_after=60)
            return await kept(rows, **options)

        manager.scheduler.submit = some  # type: ignore[method-assign]
        assert classify(*words) == 2
        assert not out.exists()
        begun = (tmp_path / ".results.jsonl.unfinished").read_bytes()
        assert begun.count(b"\n") >= 4
        manager.scheduler.submit = kept  # type: ignore[method-assign]
        assert classify(*words) == 1
    assert len({row["file"] for row in lines(out)}) == len(lines(out)) == 11
    assert len(manager.scheduler.rows) == 10  # no picture was sent twice
    assert out.read_bytes().startswith(b'{"file"')


def test_an_unfinished_table_loses_its_torn_line_and_nothing_else(tmp_path: Path) -> None:
    path, run = tmp_path / "results.csv", {"draws": 1, "url": "u"}
    with ResultsFile(path, run) as results:
        results.add(Row("a.png", "cat"))
        results.add(Row("b.png", "dog"))
    journal = tmp_path / ".results.csv.unfinished"
    whole = journal.read_bytes()
    for cut in range(len(whole) + 1):
        journal.write_bytes(whole[:cut])
        with ResultsFile(path, run) as results:
            count = max(0, whole[:cut].count(b"\n") - 1)
            assert results.done == frozenset(["a.png", "b.png"][:count])
            results.add(Row("c.png"))
            assert [row.file for row in results.rows()] == [*["a.png", "b.png"][:count], "c.png"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"something else\n", "not an unfinished table of `tombola classify`"),
        (b"something else", "not an unfinished table of `tombola classify`"),
        (b'{"tombola": "classify", "draws": 9, "url": "u"}\n', "begun with draws 9, not 1; repeat the options"),
        (b'{"tombola": "classify", "draws": 1, "library": "x"}\n', "begun with url None, not u"),
        (b'{"tombola": "classify", "draws": 1, "url": "u"}\nx\n', "line 2 is damaged"),
    ],
)
def test_an_unfinished_table_of_something_else_is_refused_by_its_name(
    tmp_path: Path, content: bytes, text: str
) -> None:
    journal = tmp_path / ".results.csv.unfinished"
    journal.write_bytes(content)
    with pytest.raises(ResultsRejected, match=f"^{journal}: {text}"):
        ResultsFile(tmp_path / "results.csv", {"draws": 1, "url": "u"})
    assert journal.read_bytes() == content


def test_two_runs_do_not_write_one_table(tmp_path: Path) -> None:
    with (
        ResultsFile(tmp_path / "results.csv", {}),
        pytest.raises(ResultsRejected, match="another process is writing it"),
    ):
        ResultsFile(tmp_path / "results.csv", {})


def test_names_that_are_no_utf_8_are_kept_apart(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    for suffix in ("jsonl", "csv", "parquet"):
        with ResultsFile(tmp_path / f"results.{suffix}", {}) as results:
            results.add(Row(name, error="x"))
            results.finish()
    assert lines(tmp_path / "results.jsonl")[0]["file"] == "\\xff.png"
    assert b"\\xff.png,,,,,0,,x\n" in (tmp_path / "results.csv").read_bytes()
    assert parquet.read_table(tmp_path / "results.parquet").column("file").to_pylist() == ["\\xff.png"]


def test_this_machine_answers_as_the_service_does_and_is_resumed_after_a_kill(folder: Path, tmp_path: Path) -> None:
    """The real command with a real library, killed after its first answers."""
    library = tiny_library(tmp_path / "library")
    for copy in range(40):
        (folder / f"copy{copy:02d}.png").write_bytes(png(5 * copy))
    words = [sys.executable, "-m", "tombola", "classify", str(folder), "--draws", "64", "--out", "results.jsonl"]
    words += ["--library", str(library.path), "--engine", "torch", "--device", "cpu"]
    journal = tmp_path / ".results.jsonl.unfinished"
    with subprocess.Popen(words, cwd=tmp_path, env=environment()) as process:
        until(lambda: (journal.exists() and journal.read_bytes().count(b"\n") > 2) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    begun = journal.read_bytes().count(b"\n") - 1
    assert 0 < begun < 51
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("results.jsonl: 50 pictures classified, 1 with an error; ")
    assert done.stderr == ""
    rows = lines(tmp_path / "results.jsonl")
    assert len({row["file"] for row in rows}) == len(rows) == 51
    for row in rows:
        if row["error"] is None:
            assert row["label"] in CLASSES
            assert row["draws"] == 64
            assert 1 / 10 <= row["agreement"] <= 1
            assert row["library"] == library.digest
    assert any(row["error"] is None and row["agreement"] < 1 for row in rows)  # random tickets do not agree
