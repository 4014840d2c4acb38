"""The report of an audit as data. Its JSON Schema is published: tombola-audit.schema.json, beside this file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from model_store.json_object import digest_of, first_error
from service.audit.errors import AuditError

FORMAT: Final = "tombola-audit"
VERSION: Final = 1
OUTSIDE_DIGEST: Final = ("digest", "timings")  # the digest covers everything else
SCHEMA: Final = Path(__file__).with_name("tombola-audit.schema.json")
OURS: Final = "tombola"
GENERATED: Final = "generated"  # the name of noise that the ensemble labelled itself: no measurement
REPORT: Final = "report.json"
PAGE: Final = "report.html"
Verdict = Literal["valid", "warnings", "invalid"]
CheckOutcome = Literal["pass", "warn", "fail", "skipped", "no power"]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A later version may add fields; readers ignore those that they do not know."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class Interval(Part):
    """A fraction, or a difference of two, and its 95 % interval."""

    value: float
    low: float
    high: float


class Figures(Part):
    """Definitions of accuracy over theta, on the same images."""

    images: int
    expected: Interval = Field(description="chance of the right answer, mean over the images")
    tries: dict[str, Interval] = Field(description="k10: the chance that ten answers in a row are right")
    no_failing_draw: Interval = Field(description="images that no draw misclassifies")
    majority: Interval = Field(description="images that more than half of the draws classify rightly")
    by_size: dict[str, float] = Field(description="expected accuracy by the number of members drawn")


class CurvePoint(Interval):
    epsilon: float = Field(description="in 255ths")
    images: int


class System(Part):
    """One classifier that was compared."""

    about: str
    members: list[str]
    scored_on: str
    clean: Figures
    robust: Figures = Field(description="under the worst of all attacks run on it")
    shared: Figures = Field(description="under the worst of the attacks that all systems faced alike")
    curve: list[CurvePoint]


class Attack(Part):
    """One attack on one system at one epsilon."""

    id: str
    name: str
    system: str
    norm: str
    epsilon: float = Field(description="in 255ths")
    images: int
    settings: dict[str, JsonValue]
    stage: int
    warm: bool
    method: str
    expected: Interval = Field(description="accuracy left to the system that was attacked")
    tombola: float = Field(description="accuracy left to the served ensemble by the same images")
    broken: int = Field(description="images whose majority it turned")
    broken_by_no_other: int
    images_seen: int
    image_steps: int
    trace: dict[str, list[float]] = Field(description="curves by step, best so far, mean over the images")
    converged: float | None = None
    oracle: str | None = None
    averages: int | None = None
    queries: int | None = None
    curve: list[tuple[int, float]] | None = Field(default=None, description="queries an image, accuracy")


class Ticket(Part):
    """One member alone."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    name: str
    structure: str
    role: str
    clean: Interval
    fgsm: Interval | None = None
    pgd_20: Interval | None = Field(default=None, validation_alias="pgd-20", serialization_alias="pgd-20")


class Transfer(Part):
    """Rows: the member attacked. Columns: the member that answers."""

    attack: str
    names: list[str]
    accuracy: list[list[float]]
    blocks: dict[str, float] = Field(description="means over pairs of structures, without the diagonal")
    diagonal: float
    off_diagonal: float | None
    naive_random_against_random: float


class Comparison(Part):
    """The served ensemble less another system: same images, same attacks, paired."""

    against: str
    robust: Interval
    clean: Interval
    words: str
    p: float | None = Field(default=None, description="of no difference in robust accuracy, Holm-corrected")


class Secrecy(Part):
    """What a secret theta is worth: robust accuracy with theta secret less with theta known."""

    difference: Interval = Field(description="with the scatter of the images and of the thetas")
    secret: Interval | None = None
    known: Interval | None = Field(default=None, description="mean over drawn thetas, each known to its attacker")
    thetas: int | None = None
    images: int | None = None


class Contribution(Part):
    """What some attacks add to all others on the served ensemble."""

    name: str
    attacks: list[str]
    lowers: Interval = Field(description="robust accuracy without these attacks less with them, on the same images")


class UniversalSystem(Part):
    clean: Interval
    own: Interval | None
    worst: Interval


class Universal(Part):
    """One perturbation for all images."""

    made_against: list[str]
    images: int
    systems: dict[str, UniversalSystem]


class Check(Part):
    """One sanity check of the attacks."""

    id: int
    name: str
    criterion: str
    hard: bool = Field(description="whether a failure makes the audit invalid")
    outcome: CheckOutcome = Field(description="no power: nothing was seen, on too few images to see it")
    value: str
    detectable: float | None = Field(default=None, description="the smallest effect seen in four of five such audits")


class PerImage(Part):
    """The chance over theta that each image is classified rightly."""

    clean: list[float]
    robust: list[float]


class OutsideLibrary(Part):
    digest: str
    members: list[str]


class LibraryPart(Part):
    digest: str
    classes: list[str]
    tickets: list[str]
    baselines: list[str]
    outside: OutsideLibrary | None
    states: int
    effective_states: float
    entropy_bits: float
    expected_size: float


class DataPart(Part):
    name: str
    origin: str
    held_out: bool
    images: int
    digest: str
    ids_digest: str
    ids: list[str]


class AuditPart(Part):
    """What was asked of the audit, defaults filled in."""

    profile: str
    attacks: list[str]
    tickets: list[str]
    epsilons: list[float]
    norm: str
    data: str | None
    images: int
    seed: int
    defender_seed: int
    headline: float = Field(description="the epsilon, in 255ths, of the figures")


class ProfilePart(Part):
    about: str
    left_out: list[str]
    crafted_in: str = Field(default="float32", description="what attacks computed in; every image is scored in float32")


class Timings(Part):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    seconds: float
    finished_at: str = Field(validation_alias="finished", serialization_alias="finished", description="ISO 8601, UTC")
    attacks: dict[str, float]


class Report(Part):
    """The whole report of one audit."""

    format: Literal["tombola-audit"]
    version: Literal[1]
    verdict: Verdict = Field(description="of the measurement, not of the robustness")
    failed: list[int] = Field(description="hard checks that failed")
    warned: list[int]
    audit: AuditPart
    profile: ProfilePart
    threat_model: dict[str, str]
    not_covered: list[str]
    library: LibraryPart
    data: DataPart
    versions: dict[str, str]
    systems: dict[str, System]
    attacks: list[Attack]
    tickets: list[Ticket]
    transfer: Transfer | None
    comparisons: list[Comparison]
    secrecy: Secrecy | None = None
    contributions: list[Contribution] = Field(default_factory=list)
    universal: Universal | None
    checks: list[Check]
    per_image: dict[str, PerImage]
    digest: Sha256 = Field(description="SHA-256 of the canonical JSON of all but digest and timings")
    timings: Timings

    @property
    def ours(self) -> System:
        return self.systems[OURS]

    @property
    def clean(self) -> Interval:
        """Expected accuracy on clean images."""
        return self.ours.clean.expected

    @property
    def robust(self) -> Interval:
        """Expected accuracy under the worst of all attacks, at the headline epsilon."""
        return self.ours.robust.expected

    @property
    def ten_tries(self) -> Interval:
        """The chance that ten answers in a row are right, under attack."""
        return self.ours.robust.tries["k10"]

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def as_bytes(self) -> bytes:
        return json.dumps(self.as_json(), indent=1, allow_nan=False).encode()


def digest_of_report(report: Mapping[str, Any]) -> str:
    return digest_of({name: value for name, value in report.items() if name not in OUTSIDE_DIGEST})


def digest_holds(report: Mapping[str, Any]) -> bool:
    return digest_of_report(report) == report.get("digest")


def read_report(path: Path) -> Report:
    """Reads a report's JSON. Raises AuditError if it is not a report, or was changed since it was written."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AuditError(f"{path}: not a report of an audit ({error!r:.100})") from None
    return parse_report(fields, str(path))


def parse_report(fields: Any, origin: str) -> Report:
    """Raises AuditError, which names the origin, if it is not a report, or was changed since it was written."""
    if not isinstance(fields, dict):
        raise AuditError(f"{origin}: not a report of an audit (expected a JSON object)")
    if not digest_holds(fields):
        raise AuditError(f"{origin}: its digest does not hold: no report, or one that was changed")
    try:
        return Report.model_validate(fields)
    except ValidationError as error:
        raise AuditError(f"{origin}: not a report of an audit ({first_error(error):.200})") from None


def schema() -> dict[str, Any]:
    """The JSON Schema that is published."""
    body = Report.model_json_schema(mode="validation", by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body}
