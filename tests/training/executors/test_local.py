"""Real processes, killed and continued."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_store.ticket import load_ticket
from tests.support.jobs import job_in, recipe
from tests.support.waiting import until
from training.executors.local import record_crash, run_local, start_worker
from training.jobs import initialize, read_result, status

pytestmark = pytest.mark.usefixtures("warm_start")


def test_kill_minus_nine_loses_nothing_but_the_current_minute(data: Path, done_state: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    initialize(job)
    worker = start_worker(job, data, "cpu", environment={"TOMBOLA_CHECKPOINT_SECONDS": "0"})
    until(lambda: (job.folder / "checkpoint.safetensors").exists())
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert not (job.folder / "done.json").exists()
    assert status(job).state in {"interrupted", "waiting"}
    record_crash(job, worker.returncode)  # as run_local does, so that the search does not end as if all were done
    assert status(job).error == "its process ended with signal 9"
    assert start_worker(job, data, "cpu").wait() == 0
    killed, whole = (load_ticket(folder / job.name / "ticket.safetensors") for folder in (tmp_path, done_state))
    assert all(torch.equal(killed.values[name], whole.values[name]) for name in whole.values)
    assert [claim.value for claim in read_result(job.folder).claims] == [
        claim.value for claim in read_result(done_state / job.name).claims
    ]


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


@pytest.mark.usefixtures("cold_start")
def test_a_worker_has_one_thread_and_keeps_its_memory(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")  # a user's own setting stands
    job = job_in(tmp_path)
    initialize(job)
    worker = start_worker(job, data, "cpu")
    until(lambda: b"OMP_NUM_THREADS" in Path(f"/proc/{worker.pid}/environ").read_bytes())
    environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    worker.kill()
    worker.wait()
    assert {b"OMP_NUM_THREADS=1", b"MALLOC_MMAP_THRESHOLD_=33554432", b"MALLOC_TRIM_THRESHOLD_=123"} <= {*environment}
