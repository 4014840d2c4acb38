"""The same jobs on a Ray cluster: one task a ticket, checkpoints on storage that every node sees.

A task that dies with its worker is started again by Ray elsewhere and goes on from the job's checkpoint. All chance
comes from the recipe's seed, so the library is the one a local run gives.
"""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from training import jobs as job_store
from training.data import read_split
from training.errors import TrainingError
from training.jobs import POLL_SECONDS, Job, Status

RETRIES = 10
CONNECT_S = 5.0


def run_job_task(folder: str, data: str, device: str) -> None:
    """What a task runs: one job's folder, to its end."""
    torch.set_num_threads(1)
    job_store.run_job(job_store.read_job(Path(folder)), read_split(Path(data)), torch.device(device))


def check_reachable(address: str) -> None:
    """Whether anybody answers at host:port, before Ray tries for minutes. Raises TrainingError."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise TrainingError(f"--ray {address}: nobody answers there ({error})") from None


def run_ray(
    jobs: Sequence[Job], data: Path, address: str, device: str, *, cores: float, gpus: float
) -> Iterator[list[Status]]:
    """Runs every unfinished job as a Ray task; yields all statuses every few seconds.

    address: "auto" or host:port of a running cluster, or "local" for one inside this process.  cores, gpus: of a task.
    The state folders and `data` must be the same paths on every node. Raises TrainingError where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise TrainingError("--ray: Ray is not installed; `pip install 'tombola[ray]'` brings it") from None
    check_reachable(address)
    for job in jobs:
        job_store.initialize(job)
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrainingError(f"--ray {address}: no such cluster ({error})") from None
    task = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=RETRIES)(run_job_task)
    waiting = [
        task.remote(str(job.folder.resolve()), str(data.resolve()), device) for job in job_store.unfinished(jobs)
    ]
    try:
        while waiting:
            _, waiting = ray.wait(waiting, timeout=POLL_SECONDS)  # a failed task is ready too; its folder says why
            yield [job_store.status(job) for job in jobs]
        yield [job_store.status(job) for job in jobs]
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        ray.shutdown()
