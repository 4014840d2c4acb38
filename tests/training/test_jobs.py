"""The jobs as a user runs them, and what they leave as a library."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from model_store.library import EMBEDDED
from tests.support.jobs import job_in, recipe
from tests.support.searches import CPU
from tombola.cli import main
from training import device
from training.data import read_split
from training.errors import CheckpointRejected
from training.export import export
from training.jobs import TICKET, find_jobs, initialize, lock_folder, read_job, read_result, status
from training.run_job import run_job

pytestmark = pytest.mark.usefixtures("warm_start")


def test_a_search_fails_while_another_process_is_at_one_of_its_jobs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "resnet18-07"
    folder.mkdir()
    with lock_folder(folder):
        words = ["--data", str(data), "--state", str(tmp_path), "--only", "resnet18-07", "--set", "width=2", "steps=2"]
        assert main(["search", *words]) == 1
    assert "resnet18-07: running, but not by this command" in capsys.readouterr().err


def test_a_folder_of_another_recipe_is_refused(done_state: Path) -> None:
    with pytest.raises(CheckpointRejected, match="begun under another recipe"):
        initialize(job_in(done_state, recipe(seed=2)))


def test_an_open_precision_is_settled_when_the_recipe_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = job_in(tmp_path, recipe(precision="auto"))
    for cpu_has_it in (True, False):  # begun on one machine, taken up on another
        monkeypatch.setattr(device, "has_bfloat16", lambda answer=cpu_has_it: answer)
        assert initialize(job).recipe.precision == "bfloat16"
        assert read_job(job.folder).recipe.precision == "bfloat16"
    with pytest.raises(CheckpointRejected, match="begun under another recipe"):
        initialize(job_in(tmp_path, recipe(precision="float32")))


def test_training_goes_on_from_a_library_and_the_better_ticket_stays(
    data: Path, done_state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = export(tmp_path / "base", [done_state])
    arguments = [
        "--data",
        str(data),
        "--data-name",
        "digits",
        "--state",
        str(tmp_path / "more"),
        "--from",
        str(base.path),
    ]
    assert main(["search", *arguments, "--epochs", "0.5", "--workers", "1"]) == 0
    (job,) = find_jobs(tmp_path / "more")
    assert job.recipe.parent == base.manifest.entries[0].sha256
    both = export(tmp_path / "both", [tmp_path / "more"], tmp_path / "base")
    assert len(both.tickets) == 1
    kept = both.manifest.entries[0]
    values = [
        sum(claim.value for claim in claims if claim.data.split == "selection")
        for claims in (base.manifest.entries[0].claims, read_result(job.folder).claims)
    ]
    assert (kept.provenance.parent is None) == (values[0] > values[1])


def test_a_search_inside_a_dense_network_says_whose_weights_it_has(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), "--data-name", "digits", "--workers", "1"]
    dense = [*common, "--state", str(tmp_path / "dense"), "--only", "resnet18", "--set", "width=2", "steps=2"]
    assert main(["baseline", *dense]) == 0
    arguments = ["search", *common, "--state", str(tmp_path / "state"), "--only", "resnet18-20"]
    arguments += ["--dense", str(tmp_path / "dense"), "--set", "steps=4"]
    assert main(arguments) == 2
    assert "resnet18-100/ticket.safetensors: resnet18" in (error := capsys.readouterr().err)
    assert "Give search and baseline the same --set" in error
    assert main([*arguments, "width=2"]) == 0
    library = export(tmp_path / "library", [tmp_path / "state"])
    file = tmp_path / "dense" / "resnet18-100" / "ticket.safetensors"
    assert library.entries[0].provenance.parent == hashlib.sha256(file.read_bytes()).hexdigest()
    assert main(["scratch", str(library.path), *common, "--state", str(tmp_path / "scratch")]) == 2
    assert "its recipe says nothing of its masks" in capsys.readouterr().err


def test_a_preset_with_dense_networks_trains_them_first_and_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    arguments = ["search", "--preset", "wide", "--data", str(data), "--data-name", "digits", "--workers", "1"]
    arguments += ["--state", str(state), "--dense-epochs", "0.2", "--set", "width=2", "batch=10"]
    assert main([*arguments, "--epochs", "0.1", "--only", "resnet18-20"]) == 0
    capsys.readouterr()
    dense = state / "resnet18-100"
    assert read_job(dense).role == "baseline"
    assert not (state / "resnet34-100").exists()
    made = (dense / TICKET).stat().st_mtime_ns
    assert main([*arguments, "--epochs", "0.2", "--only", "resnet18-30"]) == 0
    assert (dense / TICKET).stat().st_mtime_ns == made
    library = export(tmp_path / "library", [state])
    assert [entry.name for entry in library.entries] == ["resnet18-20", "resnet18-30"]
    assert [entry.name for entry in library.manifest.entries if entry.role == "baseline"] == ["resnet18-100"]
    digest = hashlib.sha256((dense / TICKET).read_bytes()).hexdigest()
    assert {entry.provenance.parent for entry in library.entries} == {digest}
    steps = [read_job(state / name).recipe.steps for name in ("resnet18-100", "resnet18-20", "resnet18-30")]
    images = len(read_split(data).search)
    assert steps == [max(1, round(epochs * images / 10)) for epochs in (0.2, 0.1, 0.2)]


def test_a_library_s_scratch_tickets_are_made_and_exported_without_a_search(
    data: Path, done_state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(job_in(tmp_path / "run", recipe(mask_share=0.5)), read_split(data), CPU)
    base = export(tmp_path / "base", [tmp_path / "run"])
    arguments = ["--data", str(data), "--data-name", "digits", "--state", str(tmp_path / "scratch"), "--workers", "1"]
    assert main(["scratch", str(base.path), *arguments]) == 0
    library = export(tmp_path / "library", [tmp_path / "scratch"])
    (trained,), (entry,) = base.entries, library.entries
    assert (entry.name, entry.kind, trained.kind) == (trained.name, "scratch", "fine-tuned")
    assert entry.provenance.recipe["steps"] == 15
    assert entry.provenance.seconds == pytest.approx(trained.provenance.seconds / 2, abs=0.1)
    assert len(entry.claims) == 4
    again = export(tmp_path / "again", [done_state])
    assert main(["scratch", str(again.path), *arguments]) == 2
    assert "before epsilon and resolution were whole" in capsys.readouterr().err


def test_every_command_that_reads_pictures_passes_over_damaged_ones_when_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts and lists them each time, from a cache too. Otherwise the first one ends the command in one line."""
    run_job(job_in(tmp_path / "run", recipe(steps=4, mask_share=0.5)), read_split(data), CPU)
    base, damaged = str(export(tmp_path / "base", [tmp_path / "run"]).path), tmp_path / "damaged.zip"
    with zipfile.ZipFile(data) as whole, zipfile.ZipFile(damaged, "w") as out:
        *others, last = whole.namelist()
        for name in others:
            out.writestr(name, whole.read(name))
        out.writestr(last, whole.read(last)[:-30])
    quick = ["--workers", "1", "--set", "width=2", "steps=2"]
    commands = [
        ["compare", base, "--images", "10"],
        ["search", "--state", str(tmp_path / "search"), "--only", "resnet18-07", *quick],
        ["baseline", "--state", str(tmp_path / "baseline"), "--only", "resnet18", *quick],
        ["scratch", base, "--state", str(tmp_path / "scratch"), "--workers", "1"],
    ]
    for command in commands:
        assert main([*command, "--data", str(damaged)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"damaged.zip: {last}: not a readable image" in line
        assert main([*command, "--data", str(damaged), "--skip-damaged"]) == 0
        counted, listed = capsys.readouterr().err.splitlines()
        assert counted == "damaged.zip: 1 damaged pictures passed over:"
        assert f"{last}: not a readable image" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--data", "/nowhere", "--state", "s"], "/nowhere: no such file or folder"),
        (["search", "--data", "{data}", "--state", "s", "--only", "vgg16"], "no such ticket"),
        (["plan", "--preset", "huge"], "--preset huge: expected one of compact, wide, paper"),
        (
            ["search", "--data", "{data}", "--state", "s", "--dense", "d", "--dense-epochs", "3"],
            "--dense-epochs: with --from or --dense no dense network is trained",
        ),
        (["plan", "--dense-epochs", "3"], "--dense-epochs: tickets of --preset compact start from random weights"),
        (["plan", "--preset", "wide", "--scratch"], "--scratch: a mask over a dense network's weights"),
        (["search", "--data", "{data}", "--state", "s", "--set", "speed=9"], "expected FIELD=VALUE"),
        (["search", "--data", "{data}", "--state", "s", "--set", "density=0.5"], "expected FIELD=VALUE"),
        (["search", "--data", "{data}", "--state", "s", "--set", "steps=many"], "--set steps=many: input should be a"),
        (["search", "--data", "{data}", "--state", "s", "--set", "batch=0"], "expected a number from 1"),
        (["search", "--data", "{data}", "--state", "s", "--set", "noise=NaN"], "expected a number from 0"),
        (["search", "--data", "{data}", "--state", "s", "--set", "attack=magic"], "should be 'n-fgsm'"),
        (["search", "--data", "{data}", "--state", "s", "--device", "magic"], "--device magic: torch cannot use"),
        (
            ["search", "--data", "{data}", "--state", "s", "--from", str(EMBEDDED), "--set", "width=8"],
            "--set width: settled",
        ),
        (["search", "--data", "{data}", "--state", "s", "--from", str(EMBEDDED), "--scratch"], "--scratch: settled by"),
        (["search", "--data", "{data}", "--state", "s", "--from", "/nowhere"], "/nowhere: no such folder"),
        (["search", "--data", "{data}", "--state", "s", "--dense", "/nowhere"], "expected a --state folder of"),
        (["search", "--data", "{data}", "--state", "s", "--dense", "d", "--scratch"], "is no scratch ticket"),
        (["scratch", str(EMBEDDED), "--data", "{data}", "--state", "s", "--only", "vgg16"], "no ticket matches --only"),
        (["status", "--state", "/nowhere"], "/nowhere: no such folder"),
        (["export", "library"], "no finished ticket"),
        (["table", "/nowhere"], "/nowhere: no such folder"),
        (["table", "--into", "/nowhere/page.md"], "/nowhere/page.md: No such file or directory"),
    ],
)
def test_every_mistake_is_one_line_and_a_failing_exit(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("{data}", str(data)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tombola: ")
    assert error.count("\n") == 1
    assert message in error


def test_the_plan_shows_forty_jobs_and_their_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert sum(shown.count(f" {name}-") for name in ("resnet18", "resnet34", "wideresnet32", "wideresnet38")) == 40


def test_the_plan_counts_the_dense_networks_that_tickets_start_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", "--preset", "wide", "--only", "resnet34", "wideresnet32-20"]) == 0
    shown = capsys.readouterr().out
    dense = [line.split()[1] for line in shown.splitlines() if "│ dense" in line]
    assert dense == ["resnet34-100", "wideresnet32-100"]
    assert shown.count(" fine-tuned ") == 11


def test_help_teaches_the_way_from_data_to_a_library() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tombola", "search", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "tombola export --state run my-library" in shown


def test_status_reads_a_log_whose_last_line_was_cut(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    initialize(job)
    line = {"kind": "step", "step": 20, "seconds": 3.0}
    (job.folder / "log.jsonl").write_text(json.dumps(line) + "\n" + '{"kind": "st')
    assert (status(job).state, status(job).step) == ("interrupted", 20)
