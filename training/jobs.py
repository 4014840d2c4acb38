"""The jobs of a library and where they run: local processes of one thread each, or a Ray cluster.

A job is a folder: its recipe, its checkpoint, its log, and in the end its ticket with the claims that were measured.
Whoever holds the folder's lock works on it; a process that dies releases it, and the next one goes on.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import torch

from model_store.manifest import Claim, Provenance
from model_store.structures import multiply_adds
from model_store.ticket import StrictModel, Ticket, load_ticket, save_ticket
from training import search
from training.data import Split
from training.errors import CheckpointRejected, TrainingError
from training.evaluation import measure
from training.files import commit, write_atomically
from training.recipes import TrainConfig

State = Literal["waiting", "running", "interrupted", "failed", "done"]
PACKAGES: Final = ("torch", "numpy", "safetensors")
POLL_SECONDS: Final = 3
# Operations a second, a multiply-add counting as two. One thread: resnet18·16 on a stem of stride 2, float32, on a busy
# Zen 3 (see LOG.md: 242 images/s, two passes).
THREAD_SPEED: Final = 2.2e10
# No GPU was measured: a tenth of an A100's 312 TFLOP/s in bfloat16 is assumed, what small images usually leave of it.
GPU_SPEED: Final = 0.1 * 312e12
SPEEDS: Final = (
    f"estimates: {THREAD_SPEED / 1e9:.0f} GFLOP/s a thread (measured in float32 on a busy machine: an idle one is "
    f"faster), {GPU_SPEED / 1e12:.0f} TFLOP/s a GPU (assumed: a tenth of an A100's bfloat16 peak)"
)


@dataclass(frozen=True)
class Job:
    """One ticket to be made in `folder`. start: the ticket file that training goes on from, or none.

    masks: the ticket file that has this ticket's masks already, so that nothing is searched; found_in: the seconds that
    finding them took.  data: the data set's name in words, for the claims.  classes: labels in the order of the logits.
    """

    recipe: TrainConfig
    folder: Path
    role: Literal["ticket", "baseline"] = "ticket"
    start: Path | None = None
    masks: Path | None = None
    found_in: float = 0.0
    data: str = ""
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.recipe.name


class Result(StrictModel):
    """A finished job's done.json."""

    provenance: Provenance
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Status:
    """Where a job stands. Rates are fractions; seconds is the time spent on it so far."""

    job: Job
    state: State
    step: int
    seconds: float
    clean: float | None
    robust: float | None
    error: str | None


def cost(recipe: TrainConfig) -> float:
    """Floating-point operations of the whole search: the attack's passes and the update's, forward and backward."""
    low, high = (multiply_adds(recipe.structure, size) for size in (search.LOW_RESOLUTION, 32))
    low_steps = recipe.low_resolution_until * recipe.steps
    passes = 3 + 2 * recipe.attack_steps  # backward costs two forwards for weights and input, one for the input alone
    return 2 * passes * recipe.batch * (low * low_steps + high * (recipe.steps - low_steps))


# --- one job ---------------------------------------------------------------------------------------------------------


def initialize(job: Job) -> None:
    """Writes the job's recipe, or checks that the folder was begun under the same one."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "recipe.json"
    text = json.dumps(fields_of(job), indent=1)
    if not path.exists():
        write_atomically(path, text)
    elif json.loads(path.read_text()) != json.loads(text):
        raise CheckpointRejected(
            f"{job.folder}: begun under another recipe (see {path.name}). "
            "Run it with the options it began with, or choose another --state folder."
        )


def fields_of(job: Job) -> dict[str, Any]:
    fields = {
        "recipe": job.recipe.as_dict(),
        "role": job.role,
        "start": str(job.start) if job.start else None,
        "data": job.data,
        "classes": job.classes,
    }
    return fields | ({"masks": str(job.masks), "found_in": job.found_in} if job.masks else {})


def read_job(folder: Path) -> Job:
    fields = json.loads((folder / "recipe.json").read_text())
    return Job(
        recipe=TrainConfig.from_dict(fields["recipe"]),
        folder=folder,
        role=fields["role"],
        start=Path(fields["start"]) if fields["start"] else None,
        masks=Path(fields["masks"]) if "masks" in fields else None,
        found_in=fields.get("found_in", 0.0),
        data=fields["data"],
        classes=tuple(fields["classes"]),
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """True if nobody else works on this folder. The lock ends with the process that holds it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_job(job: Job, split: Split, device: torch.device) -> None:
    """Carries one job from wherever it stands to its measured ticket. Does nothing if another process is at it."""
    initialize(job)
    with locked(job.folder) as mine:
        if not mine:
            return
        if (job.folder / "done.json").exists():
            search.delete_checkpoints(job.folder)  # of a process that ended between its last two steps
            return
        (job.folder / "failed.txt").unlink(missing_ok=True)
        try:
            complete(job, split, device)
        except Exception as error:
            write_atomically(job.folder / "failed.txt", f"{type(error).__name__}: {error}")
            raise


def complete(job: Job, split: Split, device: torch.device) -> None:
    if job.masks:
        ticket = search.scratch_of(job.recipe, load_ticket(job.masks), split, device)
    else:
        start = load_ticket(job.start) if job.start else None
        ticket = search.run(job.recipe, split, job.folder, Log(job.folder / "log.jsonl").add, device, start)
    save_ticket(job.folder / "ticket.safetensors", ticket)
    claims = measure(ticket, split, job.data, device, job.folder / "measured.json")
    result = Result(provenance=provenance(job, split), claims=tuple(claims))
    write_atomically(job.folder / "done.json", result.model_dump_json(indent=1))
    search.delete_checkpoints(job.folder)


def provenance(job: Job, split: Split) -> Provenance:
    return Provenance(
        recipe=job.recipe.as_dict(),
        data_digest=split.digest,
        seed=job.recipe.seed,
        commit=commit(),
        seconds=round(job.found_in + status(job).seconds, 1),
        packages={name: version(name) for name in PACKAGES},
        parent=job.recipe.parent,
    )


class Log:
    """The job's log.jsonl: one line for every 20th step and every guard, flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: search.Step | search.OverfitCheck) -> None:
        if isinstance(event, search.Step) and event.step % 20 and event.step != event.steps:
            return
        kind = "step" if isinstance(event, search.Step) else "guard"
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **vars(event)}) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log's lines; a last line cut by a crash is passed over."""
    path = folder / "log.jsonl"
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def status(job: Job) -> Status:
    rows = read_log(job.folder)
    steps = [row for row in rows if row["kind"] == "step"]
    guards = [row for row in rows if row["kind"] == "guard"]
    step, seconds = (steps[-1]["step"], steps[-1]["seconds"]) if steps else (0, 0.0)
    clean, robust = (guards[-1]["clean"], guards[-1]["robust"]) if guards else (None, None)
    failed = job.folder / "failed.txt"
    state: State = "interrupted" if steps else "waiting"
    if (job.folder / "done.json").exists():
        state, step = "done", job.recipe.steps
        clean, robust = (
            next(c.value for c in read_result(job.folder).claims if c.metric == m and c.data.split == "test")
            for m in ("clean", "pgd")
        )
    elif is_running(job.folder):
        state = "running"
    elif failed.exists():
        state = "failed"
    return Status(job, state, step, seconds, clean, robust, failed.read_text("utf-8") if state == "failed" else None)


def is_running(folder: Path) -> bool:
    if not (folder / "lock").exists():
        return False
    with locked(folder) as mine:
        return not mine


def read_result(folder: Path) -> Result:
    return Result.model_validate_json((folder / "done.json").read_text())


def read_made(folder: Path) -> tuple[Ticket, Provenance, Sequence[Claim]]:
    """What a finished job gives to an export."""
    result = read_result(folder)
    return load_ticket(folder / "ticket.safetensors"), result.provenance, result.claims


# --- many jobs -------------------------------------------------------------------------------------------------------


def remaining(job: Job) -> float:
    now = status(job)
    return cost(job.recipe) * (1 - now.step / job.recipe.steps)


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Longest first, so that the last hour is not one process alone."""
    waiting = [job for job in jobs if not (job.folder / "done.json").exists()]
    return sorted(waiting, key=remaining, reverse=True)


def run_local(jobs: Sequence[Job], data: Path, workers: int, device: str) -> Iterator[list[Status]]:
    """Runs the jobs in `workers` processes of one thread each; yields every job's status every few seconds.

    A job that fails, or whose process dies, is left with its failed.txt and the others go on. Leaving the iterator ends
    the processes; each job goes on from its checkpoint next time.
    """
    for job in jobs:
        initialize(job)
    waiting = unfinished(jobs)
    running: dict[subprocess.Popen[bytes], Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[start_worker(job, data, device)] = job
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
    write_atomically(job.folder / "failed.txt", f"its process ended with {end}")


def start_worker(
    job: Job, data: Path, device: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process of its own, so that a crash of any kind is one ticket's and memory is given back."""
    command = [sys.executable, "-m", "tombola", "work", str(job.folder), "--data", str(data), "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
    output = (job.folder / "output.txt").open("ab")
    with output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)  # noqa: S603


def find_jobs(state: Path) -> list[Job]:
    """Every job begun in a state folder, by name."""
    if not state.is_dir():
        raise TrainingError(f"{state}: no such folder; expected the --state folder of a search")
    return [read_job(path.parent) for path in sorted(state.glob("*/recipe.json"))]
