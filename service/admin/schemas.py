"""What the admin plane answers about the library and to the console, as types: for mypy, and for OpenAPI."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from model_store.attacks import Norm
from model_store.input_spec import Interpolation, Resize
from model_store.library_diff import LibraryDiff
from model_store.manifest import Manifest
from service.admin.audit_store import Summary

# The library


class LibraryDescription(Manifest):
    """A manifest, with its library's size."""

    tickets: int = Field(description="that may be drawn")
    baselines: int = Field(description="that are there to be compared with")


class Swap(TypedDict):
    """Digests of the library that is served now, and of the one before."""

    digest: str
    before: str


class DryRun(LibraryDiff):
    """What a swap would change: the configured library against the one that is served."""

    source: str = Field(description="where the configured library is: a folder, a location, or embedded")


class PolicyDescription(TypedDict):
    """The exact sampling policy of theta over the library."""

    library: Annotated[str, Field(description="its digest")]
    groups: Annotated[list[list[str]], Field(description="tickets by name")]
    sizes: Annotated[list[float], Field(description="weights of the sizes 1, 2, ...")]
    every: bool
    replacement: bool
    states: Annotated[int, Field(description="how many thetas there are")]
    entropy_bits: float
    expected_size: float
    size_probabilities: dict[str, float]
    inclusion_probabilities: Annotated[dict[str, float], Field(description="by ticket")]


# The console


class Traffic(TypedDict):
    """Counters since the process began."""

    outcomes: dict[str, float]
    shed: dict[str, float]
    images: float


class TrafficFigures(TypedDict):
    """Traffic over some seconds; null where nothing can be said."""

    at_s: Annotated[float, Field(description="their end, in seconds since the process began")]
    seconds: Annotated[float, Field(description="how long they are of")]
    requests_per_s: float | None
    images_per_s: float | None
    p50_s: Annotated[float | None, Field(description="median time to an answer; at most 10, the last bucket's bound")]
    p99_s: Annotated[float | None, Field(description="99 % were answered in at most so many seconds; at most 10")]
    turned_away: Annotated[float | None, Field(description="share of the requests")]
    failed: Annotated[float | None, Field(description="share of the requests: errors, and answers that came too late")]
    queue_depth: Annotated[float, Field(description="images that wait, at the end")]


class History(TypedDict):
    """The last quarter of an hour, oldest first."""

    uptime_s: float
    interval_s: float
    keep_s: float
    points: list[TrafficFigures]


class Queue(TypedDict):
    depth: float
    limit: int
    in_flight: float
    in_flight_limit: int


class EngineState(TypedDict):
    name: str
    device: str
    threads: int
    note: str
    restarts: float


class Picture(TypedDict):
    """What the library's networks take, and what becomes of pictures of other sizes."""

    height: int
    width: int
    resize: Resize
    interpolation: Interpolation


class LibrarySummary(TypedDict):
    digest: str
    tickets: int
    baselines: int
    classes: int
    input: Picture


class TicketDraws(TypedDict):
    """Draws of the tickets of one structure and density, beside their probability."""

    structure: str
    density: str
    probability: Annotated[float, Field(description="members of this kind in an ensemble, on average")]
    drawn: float
    expected: float
    deviation: Annotated[float | None, Field(description="of drawn from expected, in standard deviations")]


class Draws(TypedDict):
    lot: Annotated[int, Field(description="images whose draws are published together")]
    images: Annotated[int, Field(description="that are compared")]
    seconds: Annotated[float | None, Field(description="in the last so many seconds; null: since the process began")]
    odd: Annotated[float, Field(description="standard deviations that chance hardly ever exceeds")]
    tickets: list[TicketDraws]
    size_law: Annotated[dict[str, float], Field(description="probability of each ensemble size")]
    sizes: Annotated[list[float], Field(description="images whose ensemble had at most 1, 2, ... members")]


class Overview(TypedDict):
    """The state at a glance; null before a library is served."""

    ready: bool
    reason: str
    version: str
    commit: str
    uptime_s: float
    traffic: Traffic
    now: Annotated[TrafficFigures, Field(description="of the last minute")]
    queue: Queue
    engine: EngineState | None
    library: LibrarySummary | None
    draws: Draws | None
    audit: Annotated[Summary | None, Field(description="the last that measured: of this library, else of another")]


class ClassVotes(TypedDict):
    """A class, the draws that chose it, and its probability over the draws."""

    label: str
    votes: int
    mean: float
    low: float
    high: float


class DrawSummary(TypedDict):
    label: str
    agreement: float
    classes: list[ClassVotes]


class TriedImage(DrawSummary):
    library: str
    draws: int
    seconds: float


class ProfileSummary(TypedDict):
    name: str
    about: str
    images: int
    attacks: Annotated[dict[Norm, list[str]], Field(description="by norm")]


class AuditOptions(TypedDict):
    profiles: list[ProfileSummary]
    attacks: list[str]
    epsilons: Annotated[dict[Norm, list[float]], Field(description="by norm, in 255ths")]
    headline: dict[Norm, float]
    max_images: int
