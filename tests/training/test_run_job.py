from pathlib import Path

from tests.support.jobs import job_in, recipe
from tests.support.searches import CPU
from training.data import read_split
from training.jobs import initialize, lock_folder, status
from training.run_job import run_job


def test_two_processes_never_work_on_one_job(data: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    initialize(job)
    with lock_folder(job.folder) as mine:
        assert mine
        run_job(job, read_split(data), CPU)  # leaves at once: the folder is locked
        assert status(job).state == "running"
    assert not (job.folder / "log.jsonl").exists()


def test_a_done_job_leaves_no_checkpoint(data: Path, done_state: Path) -> None:
    folder = done_state / recipe().name
    assert not list(folder.glob("*.tmp")) + list(folder.glob("checkpoint*")) + list(folder.glob("good*"))
    (folder / "checkpoint.safetensors").touch()  # as if killed in between
    run_job(job_in(done_state), read_split(data), CPU)
    assert not (folder / "checkpoint.safetensors").exists()
