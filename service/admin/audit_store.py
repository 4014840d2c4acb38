"""Audits on disk: one folder each, with its job, its events and its report."""

import re
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from model_store.files import write_atomically
from service.audit.errors import AuditConflict, AuditUnknown
from service.audit.events import Event, StepEvent, read_events
from service.audit.report.model import CurvePoint, Interval
from service.audit.report.verdicts import Judgement
from service.settings import PrecisionChoice

ID: Final = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
JOB: Final = "job.json"
EVENTS: Final = "events.jsonl"
State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
PENDING: Final[tuple[State, ...]] = ("queued", "running")
RESUMABLE: Final[tuple[State, ...]] = (*PENDING, "interrupted")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)


class Cost(Record):
    """An audit's cost, known before it starts."""

    attacks: int
    giga_multiply_adds: float
    seconds: int = Field(description="on an idle machine")
    cpu_share: float = Field(default=1.0, description="of the cores it may use, what other processes left it lately")
    seconds_now: int | None = Field(default=None, description="seconds at that share")
    epsilons: tuple[float, ...] = Field(default=(), description="of the figure and its curve, in 255ths")
    headline: float | None = Field(default=None, description="the epsilon of the figures, in 255ths")
    epsilons_about: str = Field(default="", description="why they are not those of CIFAR-10's pictures")


class Result(Record):
    """The figures of a finished audit that a list shows."""

    verdict: Literal["valid", "warnings", "invalid"]
    measurement: bool = Field(description="false for generated images: their accuracy is not a measurement")
    images: int
    clean: Interval
    robust: Interval
    ten_tries: Interval
    secrecy: Interval | None = Field(default=None, description="robust with theta secret less with theta known")
    norm: str | None = None
    epsilon: float | None = Field(default=None, description="in 255ths, of the robust figure")
    curve: tuple[CurvePoint, ...] = Field(default=(), description="robust accuracy by epsilon")
    judgement: Judgement | None = Field(default=None, description="of the measurement, in words")

    @property
    def has_figures(self) -> bool:
        return self.measurement and self.verdict != "invalid"


class Summary(Record):
    """An audit in the list."""

    id: str
    state: State
    created: float = Field(description="seconds since the epoch")
    started: float | None = None
    finished_at: float | None = Field(default=None, validation_alias="finished", serialization_alias="finished")
    request: dict[str, JsonValue]
    cost: Cost
    digest: str = Field(description="of the library that it was asked of")
    why: str = ""
    result: Result | None = None


class Job(Summary):
    """An audit with all that its process needs."""

    attempts: int = 0
    library: str | None = None
    data: str | None = None
    outside: str | None = None
    precision: PrecisionChoice = "auto"
    int8_images: str | None = None
    threads: int = 1
    device: str = "cpu"
    url: str | None = None


class View(Summary):
    """An audit without its paths, with its last progress."""

    attempts: int
    progress: StepEvent | None


class JobStore:
    """Reads and writes the folders of audits. Only the server writes jobs; only an audit's process writes events."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache: dict[Path, tuple[int, Job]] = {}

    def all(self) -> list[Job]:
        """Every job, the newest first. A job is parsed again only when its file has changed."""
        paths = [path for path in self.folder.glob(f"*/{JOB}") if ID.fullmatch(path.parent.name)]
        return sorted((self.read(path) for path in paths), key=lambda job: -job.created)

    def last_measurement(self, digest: str | None) -> Job | None:
        """The last audit with figures: of the library of this digest if there is one, whole profiles first."""
        measured = [job for job in self.all() if job.result is not None and job.result.has_figures]
        return max(
            measured,
            key=lambda job: (job.digest == digest, not job.request.get("attacks"), job.finished_at or job.created),
            default=None,
        )

    def read(self, path: Path) -> Job:
        written = path.stat().st_mtime_ns
        known = self.cache.get(path)
        if known is None or known[0] != written:
            known = self.cache[path] = (written, Job.model_validate_json(path.read_bytes()))
        return known[1]

    def get(self, id: str) -> Job:
        """Raises AuditUnknown."""
        path = self.folder / id / JOB
        if not ID.fullmatch(id) or not path.exists():
            raise AuditUnknown("no such audit")
        return self.read(path)

    def save(self, job: Job) -> None:
        folder = self.folder / job.id
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(folder / JOB, job.model_dump_json(indent=1))
        except OSError:
            if created:
                folder.rmdir()  # a full disk leaves no audit without its job
            raise

    def view(self, id: str) -> View:
        """Raises AuditUnknown."""
        job = self.get(id)
        steps = [event for event in self.events(id) if isinstance(event, StepEvent)]
        return View(**{**dict(job), "progress": steps[-1] if steps else None})

    def events(self, id: str) -> list[Event]:
        """The events so far. A line that is still being written is left for the next time."""
        path = self.folder / id / EVENTS
        return read_events(path.read_text(encoding="utf-8")) if path.exists() else []

    def truncate_partial_event(self, id: str) -> None:
        """Removes the line that a killed process began, so that the next one's begins on its own."""
        path = self.folder / id / EVENTS
        if path.exists():
            text = path.read_bytes()
            write_atomically(path, text[: text.rfind(b"\n") + 1])

    def report_file(self, id: str, name: str) -> bytes:
        """A finished audit's report. Raises AuditUnknown, AuditConflict."""
        job = self.get(id)
        if job.state != "done":
            raise AuditConflict(f"the audit is {job.state}; it has no report yet")
        return (self.folder / id / name).read_bytes()
