"""The jobs as a user runs them: real processes, killed and continued, and what they leave as a library."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_store.library import EMBEDDED, open_library
from model_store.structures import Structure
from model_store.ticket import load_ticket
from tests.support.digits import digits
from tombola.cli import main
from training import jobs
from training.data import Images, read_split
from training.errors import CheckpointRejected, TrainingError
from training.export import export, table
from training.jobs import Job, find_jobs, initialize, read_result, run_job, run_local, status
from training.recipes import TrainConfig

CPU = torch.device("cpu")


def recipe(seed: int = 1, **changes: object) -> TrainConfig:
    fields: dict[str, object] = {"steps": 30, "batch": 16, "guards": 0, "precision": "float32", **changes}
    return TrainConfig(structure=Structure("resnet18", 2), density=0.3, seed=seed, **fields)  # type: ignore[arg-type]


def write_zip(path: Path, parts: dict[str, Images]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for part, images in parts.items():
            for index, label in enumerate(images.labels.tolist()):
                buffer = io.BytesIO()
                Image.fromarray(images.pixels[index].permute(1, 2, 0).numpy()).save(buffer, "PNG")
                archive.writestr(f"digits/{part}/{label}/{index:04d}.png", buffer.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zip of 1,200 digits to search on and 40 to test on, and a cache of its own."""
    folder = tmp_path_factory.mktemp("digits")
    os.environ["TRAINING_CACHE"] = str(folder / "cache")
    write_zip(folder / "digits.zip", {"train": digits().search.balanced(1150), "test": digits().test.balanced(40)})
    yield folder / "digits.zip"
    del os.environ["TRAINING_CACHE"]


def job_in(folder: Path, made: TrainConfig | None = None, **more: object) -> Job:
    made = made or recipe()
    return Job(made, folder / made.name, data="digits", classes=tuple(map(str, range(10))), **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with one finished ticket."""
    state = tmp_path_factory.mktemp("state")
    run_job(job_in(state), read_split(data), CPU)
    return state


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.02)


def test_a_finished_job_exports_as_a_library_with_its_claims(finished: Path, tmp_path: Path) -> None:
    library = export(tmp_path / "library", [finished])
    again = open_library(tmp_path / "library")
    assert library.digest == again.digest
    (entry,) = again.entries
    assert {(claim.metric, claim.data.split) for claim in entry.claims} == {
        (metric, split) for metric in ("clean", "pgd") for split in ("test", "selection")
    }
    assert entry.provenance.recipe["seed"] == 1
    assert entry.provenance.seconds > 0
    assert "resnet18" in str(entry.structure)
    assert "PGD, ε = 8/255, 20 steps of 2/255, 1 random start" in table(again)


def test_kill_minus_nine_loses_nothing_but_the_current_minute(data: Path, finished: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    initialize(job)
    worker = jobs.start_worker(job, data, "cpu", environment={"TRAINING_CHECKPOINT_SECONDS": "0"})
    until(lambda: (job.folder / "checkpoint.safetensors").exists())
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (job.folder / "done.json").exists()
    assert status(job).state in {"interrupted", "waiting"}
    jobs.record_crash(job, worker.returncode)  # as run_local does, so that the search does not end as if all were done
    assert status(job).error == "its process ended with signal 9"
    assert jobs.start_worker(job, data, "cpu").wait() == 0
    killed, whole = (load_ticket(folder / job.name / "ticket.safetensors") for folder in (tmp_path, finished))
    assert all(torch.equal(killed.values[name], whole.values[name]) for name in whole.values)
    assert [claim.value for claim in read_result(job.folder).claims] == [
        claim.value for claim in read_result(finished / job.name).claims
    ]


def test_a_finished_job_leaves_no_checkpoint(data: Path, finished: Path) -> None:
    folder = finished / recipe().name
    assert not list(folder.glob("*.tmp")) + list(folder.glob("checkpoint*")) + list(folder.glob("good*"))
    (folder / "checkpoint.safetensors").touch()  # as if killed in between
    run_job(job_in(finished), read_split(data), CPU)
    assert not (folder / "checkpoint.safetensors").exists()


def test_a_failed_ticket_is_reported_and_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    good = job_in(tmp_path)
    bad = job_in(tmp_path, replace(recipe(steps=8, mask_share=0.0, weight_rate=1e30), density=0.5))
    rows = {row.job.name: row for row in list(run_local([bad, good], data, workers=1, device="cpu"))[-1]}
    assert rows[good.name].state == "done"
    assert rows[bad.name].state == "failed"
    assert "Lower the rate" in (rows[bad.name].error or "")


def test_a_process_that_dies_before_it_begins_is_a_failed_ticket(data: Path, tmp_path: Path) -> None:
    """What a search reported as done, once."""
    job = job_in(tmp_path)
    (row,) = list(run_local([job], data, workers=1, device="nowhere"))[-1]
    assert row.state == "failed"
    assert row.error == "its process ended with code 2: tombola: --device nowhere: torch cannot use such a device here"


def test_a_search_fails_while_another_process_is_at_one_of_its_jobs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "resnet18-07"
    folder.mkdir()
    with jobs.locked(folder):
        words = ["--data", str(data), "--state", str(tmp_path), "--only", "resnet18-07", "--set", "width=2", "steps=2"]
        assert main(["search", *words]) == 1
    assert "resnet18-07: running, but not by this command" in capsys.readouterr().err


def test_two_processes_never_work_on_one_job(data: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    initialize(job)
    with jobs.locked(job.folder) as mine:
        assert mine
        run_job(job, read_split(data), CPU)  # leaves at once: the lock is held
        assert status(job).state == "running"
    assert not (job.folder / "log.jsonl").exists()


def test_a_folder_of_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(CheckpointRejected, match="begun under another recipe"):
        initialize(job_in(finished, recipe(seed=2)))


def test_training_goes_on_from_a_library_and_the_better_ticket_stays(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = export(tmp_path / "base", [finished])
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


def test_a_library_s_scratch_tickets_are_made_and_exported_without_a_search(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    again = export(tmp_path / "again", [finished])
    assert main(["scratch", str(again.path), *arguments]) == 2
    assert "before epsilon and resolution were whole" in capsys.readouterr().err


def test_baselines_are_exported_beside_the_tickets_and_never_drawn(data: Path, finished: Path, tmp_path: Path) -> None:
    dense = TrainConfig(Structure("resnet18", 2), 1.0, 3, 10, batch=16, guards=0, mask_share=0.0, precision="float32")
    run_job(job_in(tmp_path / "dense", dense, role="baseline"), read_split(data), CPU)
    library = export(tmp_path / "library", [finished, tmp_path / "dense"])
    assert (len(library.tickets), len(library.baselines)) == (1, 1)
    assert "\n| dense, never drawn | " in table(library)
    assert "dense" not in table(export(tmp_path / "alone", [finished]))
    assert library.policy.tickets == 1


def test_nothing_finished_writes_nothing(tmp_path: Path) -> None:
    initialize(job_in(tmp_path))
    with pytest.raises(TrainingError, match="no finished ticket; nothing was written"):
        export(tmp_path / "library", [tmp_path])
    assert not (tmp_path / "library").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--data", "/nowhere", "--state", "s"], "/nowhere: no such file or folder"),
        (["search", "--data", "{data}", "--state", "s", "--only", "vgg16"], "no such ticket"),
        (["plan", "--preset", "huge"], "--preset huge: expected one of compact, paper"),
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
