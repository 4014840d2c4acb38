"""The same jobs on a Ray cluster: one task a ticket, checkpoints on storage that every node sees.

A task that dies with its worker is started again by Ray elsewhere and goes on from the job's checkpoint. All chance
comes from the recipe's seed, so the library is the one a local run gives.
"""

import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from training.data import CACHE, read_split
from training.errors import TrainingError
from training.executors import POLL_SECONDS, longest_first
from training.jobs import Job, Status, initialize, read_job, status
from training.run_job import run_job

RETRIES = 10
CONNECT_S = 5.0
SMALLEST_GPU_SHARE = 0.1  # of narrow networks, whose searches share a GPU


def run_job_task(folder: str, data: str, device: str, skip_damaged: bool) -> None:
    """What a task runs: one job's folder, to its end."""
    torch.set_num_threads(1)
    job = read_job(Path(folder))
    split = read_split(Path(data), Path(folder).parent / CACHE, job.input, skip_damaged=skip_damaged)
    run_job(job, split, torch.device(device))


def check_reachable(address: str) -> None:
    """Whether anybody answers at host:port, before Ray tries for minutes. Raises TrainingError."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise TrainingError(f"--ray {address}: nobody answers there ({error})") from None


def gpu_share(device: str, gpus: float) -> float:
    """The GPUs to ask Ray for: it hides every GPU from a task that asks for none."""
    return max(gpus, SMALLEST_GPU_SHARE) if device.startswith("cuda") else 0


def run_ray(
    jobs: Sequence[Job],
    data: Path,
    address: str,
    device: str,
    *,
    cores: float,
    gpus: float,
    skip_damaged: bool = False,
) -> Iterator[list[Status]]:
    """Runs every unfinished job as a Ray task; yields all statuses every few seconds.

    The state folders and `data` must be the same paths on every node.

    Args:
        address: "auto" or host:port of a running cluster, or "local" for one inside this process.
        cores: of a task.
        gpus: of a task, where `device` is one.
        skip_damaged: whether damaged pictures are passed over.

    Raises:
        TrainingError: Ray is not installed, or there is no such cluster.
    """
    jobs = [initialize(job, device) for job in jobs]
    with cluster(address) as ray:
        task = ray.remote(num_cpus=cores, num_gpus=gpu_share(device, gpus), max_retries=RETRIES)(run_job_task)
        folders = [job.folder.resolve() for job in longest_first(jobs)]
        waiting = [task.remote(str(folder), str(data.resolve()), device, skip_damaged) for folder in folders]
        try:
            while waiting:
                _, waiting = ray.wait(waiting, timeout=POLL_SECONDS)  # a failed task is ready; its folder says why
                yield [status(job) for job in jobs]
            yield [status(job) for job in jobs]
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster until the block ends. Raises TrainingError."""
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    with ExitStack() as stack:
        if address == "local":  # it reports its use to nobody and keeps its files and its secret in one folder
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            own["_temp_dir"] = stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        try:
            import ray
        except ImportError:
            raise TrainingError("--ray: Ray is not installed; `pip install 'tombola[ray]'` brings it") from None
        check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TrainingError(f"--ray {address}: no such cluster ({error})") from None
        stack.callback(ray.shutdown)
        yield ray
