"""The jobs of a library as they are stored.

A job is a folder: its recipe, its checkpoint, its log, and in the end its ticket with the claims that were measured.
The process that holds the folder's lock works on it; one that dies releases it, and the next one goes on.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.manifest import Claim, Provenance
from model_store.ticket import StrictModel, Ticket, load_ticket
from training.device import resolve_precision
from training.errors import CheckpointRejected, TrainingError
from training.files import write_text
from training.recipes import TrainConfig
from training.search import OverfitCheck, Step

INPUT: Final = TypeAdapter(InputSpec)
TICKET: Final = "ticket.safetensors"  # in a job's folder, once it is done
State = Literal["waiting", "running", "interrupted", "failed", "done"]


@dataclass(frozen=True)
class Job:
    """One ticket to be made in `folder`. start: the ticket file that training goes on from, or none.

    masks: the ticket file that has this ticket's masks already, so that nothing is searched; search_seconds: what
    finding them took.  data: the data set's name in words, for the claims.  classes: labels in the order of the logits.
    input: the pictures, and the statistics that the networks take.
    """

    recipe: TrainConfig
    folder: Path
    role: Literal["ticket", "baseline"] = "ticket"
    start: Path | None = None
    masks: Path | None = None
    search_seconds: float = 0.0
    data: str = ""
    classes: tuple[str, ...] = ()
    input: InputSpec = CIFAR10_INPUT

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


def initialize(job: Job, device: str = "cpu") -> Job:
    """Writes the job's recipe, or checks that the folder was begun under the same one.

    Returns the job with the recipe as it is stored: a precision that was left open is settled when it is written.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "recipe.json"
    if job.recipe.precision == "auto":
        recipe = resolve_precision(job.recipe, device)
        if path.exists():
            recipe = replace(recipe, precision=read_job(job.folder).recipe.precision)
        job = replace(job, recipe=recipe)
    text = json.dumps(job_fields(job), indent=1)
    if not path.exists():
        write_text(path, text)
    elif json.loads(path.read_text()) != json.loads(text):
        raise CheckpointRejected(
            f"{job.folder}: begun under another recipe (see {path.name}). "
            "Run it with the options it began with, or choose another --state folder."
        )
    return job


def job_fields(job: Job) -> dict[str, Any]:
    fields = {
        "recipe": job.recipe.as_dict(),
        "role": job.role,
        "start": str(job.start) if job.start else None,
        "data": job.data,
        "classes": job.classes,
    }
    if job.input != CIFAR10_INPUT:
        fields["input"] = asdict(job.input)
    return fields | ({"masks": str(job.masks), "search_seconds": job.search_seconds} if job.masks else {})


def read_job(folder: Path) -> Job:
    fields = json.loads((folder / "recipe.json").read_text())
    return Job(
        recipe=TrainConfig.from_dict(fields["recipe"]),
        folder=folder,
        role=fields["role"],
        start=Path(fields["start"]) if fields["start"] else None,
        masks=Path(fields["masks"]) if "masks" in fields else None,
        search_seconds=fields.get("search_seconds", 0.0),
        data=fields["data"],
        classes=tuple(fields["classes"]),
        input=INPUT.validate_json(json.dumps(fields["input"])) if "input" in fields else CIFAR10_INPUT,
    )


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """True if nobody else works on this folder. The lock ends with the process that holds it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class JobLog:
    """The job's log.jsonl: one line for every 20th step and every guard, flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: Step | OverfitCheck) -> None:
        if isinstance(event, Step) and event.step % 20 and event.step != event.steps:
            return
        kind = "step" if isinstance(event, Step) else "guard"
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
    with lock_folder(folder) as mine:
        return not mine


def read_result(folder: Path) -> Result:
    return Result.model_validate_json((folder / "done.json").read_text())


def read_output(folder: Path) -> tuple[Ticket, Provenance, Sequence[Claim]]:
    """What a finished job gives to an export."""
    result = read_result(folder)
    return load_ticket(folder / TICKET), result.provenance, result.claims


def find_jobs(state: Path) -> list[Job]:
    """Every job begun in a state folder, by name."""
    if not state.is_dir():
        raise TrainingError(f"{state}: no such folder; expected the --state folder of a search")
    return [read_job(path.parent) for path in sorted(state.glob("*/recipe.json"))]
