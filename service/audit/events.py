"""The events of an audit: what its process writes to events.jsonl, and what the admin plane streams."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class AuditEvent(BaseModel):
    """What all events share."""

    model_config = ConfigDict(frozen=True)

    time: float | None = Field(default=None, description="seconds since the epoch, when it was written")


class CostEvent(AuditEvent):
    """The audit has been planned."""

    event: Literal["cost"] = "cost"
    attacks: int
    giga_multiply_adds: float
    seconds: float = Field(description="estimate, on an idle machine")
    epsilons: tuple[float, ...] = Field(default=(), description="of the figure and its curve, in 255ths")
    epsilons_about: str = Field(default="", description="why they are not those of CIFAR-10's pictures")


class RivalsEvent(AuditEvent):
    """What the law is held against is being chosen."""

    event: Literal["rivals"] = "rivals"
    images: int = Field(description="held-out training images")
    seconds: float = Field(description="estimate, on an idle machine")


class StepEvent(AuditEvent):
    """One attack has ended."""

    event: Literal["step"] = "step"
    id: str
    attack: str
    system: str
    epsilon: float = Field(description="in 255ths")
    images: int
    accuracy: float = Field(description="of the attacked system, mean over the images")
    tombola: float | None = Field(default=None, description="left to the served ensemble by the same images")
    share: float = Field(description="of the attacks' cost that is done, from 0 to 1")
    seconds_left: float


class CheckEvent(AuditEvent):
    """One sanity check has ended."""

    event: Literal["check"] = "check"
    id: int
    name: str
    outcome: Literal["pass", "warn", "fail", "skipped", "no power"]
    value: str
    seconds: float


class FailedEvent(AuditEvent):
    """The audit cannot go on."""

    event: Literal["failed"] = "failed"
    why: str


class StateEvent(AuditEvent):
    """The last event of a stream: the state in which the audit ended."""

    event: Literal["state"] = "state"
    state: str
    why: str


Event = Annotated[
    CostEvent | RivalsEvent | StepEvent | CheckEvent | FailedEvent | StateEvent, Field(discriminator="event")
]
EVENT: Final[TypeAdapter[Event]] = TypeAdapter(Event)


def read_events(text: str) -> list[Event]:
    """One event a line. An unfinished last line is left for the next reading."""
    return [EVENT.validate_json(line) for line in text[: text.rfind("\n") + 1].splitlines()]
