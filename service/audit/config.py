"""The request for an audit, one attack of it, and the threat model in words."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.dataclasses import dataclass

from model_store.attacks import Norm, ThreatModel
from model_store.input_spec import MAX_SIDE
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.attacks.eot import PgdConfig
from service.audit.attacks.simple import RandomCorners, SingleModelPgd, UniversalPerturbation
from service.audit.errors import AuditRejected

ProfileName = Literal["smoke", "standard", "full", "reference"]
AttackConfig = (
    PgdConfig
    | ArcConfig
    | AutoAttackConfig
    | SingleModelPgd
    | UniversalPerturbation
    | RandomCorners
    | QueryAttackConfig
)
NORMS: Final[tuple[Norm, ...]] = get_args(Norm)
PROFILES: Final[tuple[ProfileName, ...]] = get_args(ProfileName)
LARGEST: Final[dict[Norm, float]] = {"linf": 255.0, "l2": 255 * math.sqrt(3) * MAX_SIDE}  # of pictures of any size
MAX_IMAGES: Final = 10_000
ATTACKS: Final = (
    "paper-eot",
    "eot-mean-output",
    "eot-mean-loss",
    "eot-mean-loss-sharp",
    "eot-mean-loss-flat",
    "eot-mean-loss-normalised",
    "eot-hinge",
    "eot-probability-margin",
    "eot-targeted",
    "eot-alternating",
    "mora",
    "eot-risk",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "fab-t",
    "square",
    "arc",
    "fgsm",
    "pgd-20",
    "universal",
    "noise",
    "square-queries",
    "hopskipjump-queries",
)
MAX_ATTACKS: Final = 32
MAX_TICKETS: Final = 1000
MAX_EPSILONS: Final = 32
MAX_SEED: Final = 2**31 - 1


def expect(words: str) -> WrapValidator:
    """Refuses what pydantic refuses, in one line that says what was expected."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise AuditRejected(f"{info.field_name} {value!r:.60}; expected {words}") from None

    return WrapValidator(check)


def one_of(allowed: Sequence[str]) -> WrapValidator:
    return expect(f"one of {', '.join(allowed)}")


def check_attacks(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in ATTACKS:
            raise AuditRejected(f"attacks {name!r:.60}; expected one of {', '.join(ATTACKS)}")
    return names


Names = Annotated[tuple[Annotated[str, Strict()], ...], Field(max_length=MAX_TICKETS)]
Number = Annotated[float, Strict()]
Seed = Annotated[int, Strict(), Field(ge=0, le=MAX_SEED), expect(f"a whole number from 0 to {MAX_SEED}")]


def require_profile(schema: dict[str, Any]) -> None:
    """In a request the profile has no default."""
    schema["required"] = ["profile"]
    del schema["properties"]["profile"]["default"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", json_schema_extra=require_profile))
class Audit:
    """The request for one audit: equal requests of equal code, library and data give equal reports, timings apart."""

    profile: Annotated[ProfileName, one_of(PROFILES)] = "standard"
    attacks: Annotated[
        Names,
        Field(max_length=MAX_ATTACKS, description=f"only these of the profile's attacks: {', '.join(ATTACKS)}"),
        expect(f"a list of 1 to {MAX_ATTACKS}"),
        AfterValidator(check_attacks),
    ] = ()
    tickets: Annotated[
        Names,
        Field(description="attacked one by one, for the transfer matrix; all if empty"),
        expect(f"a list of 1 to {MAX_TICKETS}"),
    ] = ()
    epsilons: Annotated[
        tuple[Number, ...],
        Field(max_length=MAX_EPSILONS, description="in 255ths; those of the norm and the size of pictures if empty"),
        expect(f"numbers, in 255ths, in a list of 1 to {MAX_EPSILONS}"),
    ] = ()
    norm: Annotated[Norm, one_of(NORMS)] = "linf"
    data: Annotated[
        Annotated[str, Strict()] | None,
        Field(description="the name of a data set; null for generated images"),
        expect("the name of a data set"),
    ] = None
    images: Annotated[
        Annotated[int, Strict(), Field(ge=2, le=MAX_IMAGES)] | None,
        Field(description="how many; null for the profile's number"),
        expect(f"a whole number from 2 to {MAX_IMAGES}"),
    ] = None
    seed: Annotated[Seed, Field(description="of everything that the attacker draws")] = 0
    defender_seed: Annotated[Seed, Field(description="of the draws that score")] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilons", tuple(sorted(set(self.epsilons))))
        if self.epsilons:
            check_epsilons(self.epsilons, LARGEST[self.norm])

    def wants(self, attack: str) -> bool:
        return not self.attacks or attack in self.attacks


FIELDS: Final = tuple(field.name for field in dataclasses.fields(Audit))
LISTS: Final = {"attacks": MAX_ATTACKS, "tickets": MAX_TICKETS, "epsilons": MAX_EPSILONS}


@dataclasses.dataclass(frozen=True)
class Step:
    """One attack on one system at one size."""

    name: str  # of ATTACKS
    system: str
    norm: Norm
    epsilon: float  # in 255ths
    images: int
    settings: AttackConfig
    stage: int = 0  # of the plan
    warm: bool = False  # starts from the riskiest images of earlier stages, for whichever system they were made

    @property
    def id(self) -> str:
        size = f"{self.norm} {self.epsilon:g}/255, {self.images} images"
        match self.settings:
            case PgdConfig(steps=steps, restarts=restarts):
                return f"{self.name} on {self.system}, {size}, {steps} steps, {restarts} restarts"
            case QueryAttackConfig(averages=averages):
                return f"{self.name} on {self.system}, {size}, q = {averages}"
            case _:
                return f"{self.name} on {self.system}, {size}"

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(self.norm, self.epsilon / 255)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "method": type(self.settings).__name__}


def read_audit(request: Any) -> Audit:
    """Reads a request's JSON. Raises AuditRejected, which says what it found and what was expected."""
    if not isinstance(request, Mapping):
        raise AuditRejected('expected a JSON object such as {"profile": "standard"}')
    unknown = sorted(set(map(str, request)) - set(FIELDS))
    if unknown:
        raise AuditRejected(f"{unknown[0][:40]!r} is no field of an audit; expected {', '.join(FIELDS)}")
    if "profile" not in request:
        raise AuditRejected(f"profile is missing; expected one of {', '.join(PROFILES)}")
    given = {name: value for name, value in request.items() if value is not None}
    for name, most in LISTS.items():
        if given.get(name) == []:
            raise AuditRejected(f"{name} []; expected a list of 1 to {most}")
    return Audit(**given)


def check_epsilons(epsilons: tuple[float, ...], largest: float) -> None:
    """Raises AuditRejected. epsilons: in 255ths, ascending."""
    if max(epsilons) <= 0:
        raise AuditRejected(f"epsilons {list(epsilons)}; expected at least one above 0")
    for epsilon in epsilons:
        if not (math.isfinite(epsilon) and (epsilon == 0 or 1 <= epsilon <= largest)):
            raise AuditRejected(
                f"epsilon {epsilon!r}; expected 0, or 1 to {largest:.0f}: they are in 255ths, so that 8 is 8/255"
            )


# In words

BLACK_BOX: Final = {
    "knowledge": "answers alone: neither weights, nor gradients, nor the law of chance",
    "order": "the attacker chooses the image before it is answered; scoring asks anew",
    "queries": "every image that the endpoint is asked about is counted against the budget",
}
"""What differs in the threat model of an endpoint."""

NOT_COVERED: Final = (
    "Changes outside the norm ball: rotations, crops, patches, corruptions, other images of the class.",
    "Attackers who see theta, the latency of single requests, or the memory of the server.",
    "Poisoned training data, stolen or extracted weights, and images before they are resized to the model's input.",
    "Attacks stronger or longer than those run: every figure is an upper bound.",
    "The list of checks is neither necessary nor sufficient (Carlini et al., 2019): passing it proves no robustness.",
)
