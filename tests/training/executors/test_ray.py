"""The jobs on a real local Ray cluster, one of whose workers is killed in the middle."""

import os
import signal
from pathlib import Path

import pytest
import torch

from model_store.ticket import Ticket, load_ticket
from tests.support.jobs import job_in, recipe
from tests.support.searches import CPU
from training.data import read_split
from training.errors import TrainingError
from training.executors.ray import gpu_share, run_ray
from training.run_job import run_job

ray = pytest.importorskip("ray")

# Ray itself leaves sockets and files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("TOMBOLA_CHECKPOINT_SECONDS", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def equal(first: Ticket, second: Ticket) -> bool:
    return all(torch.equal(first.values[name], second.values[name]) for name in first.values)


@pytest.mark.usefixtures("environment")
def test_a_cluster_that_loses_a_worker_gives_the_tickets_of_a_local_run(data: Path, tmp_path: Path) -> None:
    recipes = [recipe(), recipe(seed=2, mask_share=1.0)]
    jobs = [job_in(tmp_path / "cluster", made) for made in recipes]
    killed: list[int] = []
    for _ in run_ray(jobs, data, "local", "cpu", cores=1, gpus=0):
        if (
            not killed
            and (jobs[0].folder / "checkpoint.safetensors").exists()
            and not (jobs[0].folder / "done.json").exists()
        ):
            killed += kill_worker(jobs[0].folder)
    assert killed, "the job was over before its worker could be killed"
    for made, job in zip(recipes, jobs, strict=True):
        local = job_in(tmp_path / "local", made)
        run_job(local, read_split(data), CPU)
        assert equal(*(load_ticket(folder / "ticket.safetensors") for folder in (job.folder, local.folder)))


def kill_worker(folder: Path) -> list[int]:
    """Kills whichever process holds the job's lock, as a machine's end would."""
    inode = (folder / "lock").stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            os.kill(int(fields[4]), signal.SIGKILL)
            return [int(fields[4])]
    return []


def test_no_cluster_at_the_address_is_a_clear_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no such cluster"):
        list(run_ray([job_in(tmp_path)], data, "not an address", "cpu", cores=1, gpus=0))
    with pytest.raises(TrainingError, match="nobody answers there"):  # at once: Ray itself tries for minutes
        list(run_ray([job_in(tmp_path)], data, "127.0.0.1:1", "cpu", cores=1, gpus=0))


@pytest.mark.parametrize(("device", "gpus", "expected"), [("cuda", 0, 0.1), ("cuda:0", 1, 1), ("cpu", 1, 0)])
def test_a_task_on_a_gpu_asks_for_a_share_of_one(device: str, gpus: float, expected: float) -> None:
    assert gpu_share(device, gpus) == expected


def test_the_share_is_what_the_cluster_is_asked_for(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, object] = {}

    def remote(**given: object) -> None:
        options.update(given)
        raise InterruptedError

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "remote", remote)
    with pytest.raises(InterruptedError):
        list(run_ray([job_in(tmp_path)], data, "local", "cuda", cores=1, gpus=0))
    assert (options["num_cpus"], options["num_gpus"]) == (1, 0.1)
