"""Jobs in processes of one thread each on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from training.executors import POLL_SECONDS, longest_first
from training.files import write_text
from training.jobs import Job, Status, initialize, status

# glibc otherwise returns each step's buffers to the system and takes them anew, page by page (LOG.md).
MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}


def run_local(
    jobs: Sequence[Job], data: Path, workers: int, device: str, *, skip_damaged: bool = False
) -> Iterator[list[Status]]:
    """Runs the jobs in `workers` processes of one thread each; yields every job's status every few seconds.

    A job that fails, or whose process dies, is left with its failed.txt and the others go on. Leaving the iterator ends
    the processes; each job goes on from its checkpoint next time.
    """
    jobs = [initialize(job, device) for job in jobs]
    waiting = longest_first(jobs)
    running: dict[subprocess.Popen[bytes], Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[start_worker(job, data, device, skip_damaged=skip_damaged)] = job
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                record_crash(running.pop(process), process.returncode)
            yield [status(job) for job in jobs]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def record_crash(job: Job, code: int) -> None:
    """Says in the job's folder what became of a process that could not say it: killed, out of memory, never begun."""
    if code == 0 or status(job).state in ("done", "running", "failed"):
        return
    if code < 0:
        end = f"signal {-code}"  # what stands last in its output was said before, perhaps by an earlier process
    else:
        words = (job.folder / "output.txt").read_text("utf-8", "replace").splitlines()
        end = ": ".join([f"code {code}", *words[-1:]])
    write_text(job.folder / "failed.txt", f"its process ended with {end}")


def start_worker(
    job: Job,
    data: Path,
    device: str,
    environment: Mapping[str, str] | None = None,
    *,
    skip_damaged: bool = False,
) -> subprocess.Popen[bytes]:
    """A process of its own, so that a crash of any kind is one ticket's and memory is given back."""
    command = [sys.executable, "-m", "tombola", "work", str(job.folder), "--data", str(data), "--device", device]
    command += ["--skip-damaged"] if skip_damaged else []
    environment = {**MALLOC, **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
    output = (job.folder / "output.txt").open("ab")
    with output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)  # noqa: S603
