"""What is asked of an audit, what one attack of it is, and the threat model in words."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from model_store.attacks import Norm, ThreatModel
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.attacks.eot import PgdConfig
from service.audit.attacks.simple import RandomCorners, SingleModelPgd, UniversalPerturbation
from service.audit.errors import AuditRejected

ProfileName = Literal["smoke", "standard", "full"]
Settings = (
    PgdConfig
    | ArcConfig
    | AutoAttackConfig
    | SingleModelPgd
    | UniversalPerturbation
    | RandomCorners
    | QueryAttackConfig
)
PROFILES: Final[tuple[ProfileName, ...]] = get_args(ProfileName)
EPSILONS: Final[dict[Norm, tuple[float, ...]]] = {
    "linf": (0.0, 2.0, 4.0, 8.0, 12.0, 20.0),
    "l2": (0.0, 32.0, 64.0, 128.0, 192.0, 320.0),  # lengths over 3072 numbers: 128/255 is the literature's 0.5
}
HEADLINE: Final[dict[Norm, float]] = {"linf": 8.0, "l2": 128.0}
LARGEST: Final[dict[Norm, float]] = {"linf": 255.0, "l2": 255 * math.sqrt(3 * 32 * 32)}  # from any image to any other
MAX_IMAGES: Final = 10_000
ATTACKS: Final = (
    "paper-eot",
    "eot-mean-output",
    "eot-mean-loss",
    "eot-mean-loss-normalised",
    "eot-hinge",
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
FIELDS: Final = ("profile", "attacks", "tickets", "epsilons", "norm", "data", "images", "seed", "defender_seed")
LISTS: Final = {"attacks": 32, "tickets": 1000, "epsilons": 32}  # fields that are lists, and how long they may be


@dataclass(frozen=True)
class Audit:
    """One audit, whole: two of the same code, library and data have the same report, timings apart.

    attacks: names of ATTACKS, all of the profile's if empty.  tickets: those to attack one by one, for Table 1 and the
    transfer matrix, all of the library if empty.  epsilons: in 255ths, ascending; the norm's own if none
    are given.  images: None for the profile's.  data: a configured data set's name, or None for generated images.
    seed: of everything the attacker draws.  defender_seed: of the draws that score.
    """

    profile: ProfileName = "standard"
    attacks: tuple[str, ...] = ()
    tickets: tuple[str, ...] = ()
    epsilons: tuple[float, ...] = ()
    norm: Norm = "linf"
    data: str | None = None
    images: int | None = None
    seed: int = 0
    defender_seed: int = 0

    def __post_init__(self) -> None:
        one_of("profile", self.profile, PROFILES)
        one_of("norm", self.norm, get_args(Norm))
        for name in self.attacks:
            one_of("attacks", name, ATTACKS)
        object.__setattr__(self, "epsilons", self.epsilons or EPSILONS[self.norm])
        check_epsilons(self.epsilons, LARGEST[self.norm])
        if self.images is not None:
            whole("images", self.images, 2, MAX_IMAGES)
        whole("seed", self.seed, 0, 2**31 - 1)
        whole("defender_seed", self.defender_seed, 0, 2**31 - 1)
        if self.data is not None and not isinstance(self.data, str):
            raise AuditRejected(f"data {self.data!r}; expected the name of a data set")

    @property
    def headline(self) -> float:
        """The epsilon, in 255ths, that all systems face with every attack."""
        usual = HEADLINE[self.norm]
        return usual if usual in self.epsilons else max(self.epsilons)

    def wants(self, attack: str) -> bool:
        return not self.attacks or attack in self.attacks


@dataclass(frozen=True)
class Step:
    """One attack on one system at one size. name: of ATTACKS.  stage: of the plan.  warm: starts from the riskiest
    images that earlier stages found, for whichever system they were made."""

    name: str
    system: str
    norm: Norm
    epsilon: float
    images: int
    settings: Settings
    stage: int = 0
    warm: bool = False

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
        return {**asdict(self), "method": type(self.settings).__name__}


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_audit(fields: Any) -> Audit:
    """From a request's JSON. Raises AuditRejected, saying what was found and what was expected."""
    if not isinstance(fields, Mapping):
        raise AuditRejected('expected a JSON object such as {"profile": "standard"}')
    unknown = sorted(set(map(str, fields)) - set(FIELDS))
    if unknown:
        raise AuditRejected(f"{unknown[0][:40]!r} is no field of an audit; expected {', '.join(FIELDS)}")
    if "profile" not in fields:
        raise AuditRejected(f"profile is missing; expected one of {', '.join(PROFILES)}")
    given = {name: value for name, value in fields.items() if value is not None}
    for name in LISTS:
        if name in given:
            given[name] = listed(name, given[name])
    return Audit(**given)


def listed(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not 0 < len(value) <= LISTS[name]:
        raise AuditRejected(f"{name} {value!r:.60}; expected a list of 1 to {LISTS[name]}")
    if name != "epsilons":
        return tuple(value)
    if not all(type(number) in (int, float) for number in value):
        raise AuditRejected(f"epsilons {value!r:.60}; expected numbers, in 255ths")
    return tuple(sorted({float(number) for number in value}))


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise AuditRejected(f"{name} {value!r:.60}; expected one of {', '.join(allowed)}")


def whole(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise AuditRejected(f"{name} {value!r:.60}; expected a whole number from {least} to {most}")


def check_epsilons(epsilons: tuple[float, ...], largest: float) -> None:
    if not epsilons or list(epsilons) != sorted(set(epsilons)) or max(epsilons) <= 0:
        raise AuditRejected(f"epsilons {list(epsilons)}; expected different numbers in ascending order, one above 0")
    for epsilon in epsilons:
        if not (math.isfinite(epsilon) and (epsilon == 0 or 1 <= epsilon <= largest)):
            raise AuditRejected(
                f"epsilon {epsilon!r}; expected 0, or 1 to {largest:.0f}: they are in 255ths, so that 8 is 8/255"
            )


# In words


def threat_model(audit: Audit) -> dict[str, str]:
    """Every field that a robustness figure needs to mean anything."""
    norm = {"linf": "l-infinity: no channel of no pixel changes by more than epsilon", "l2": "l2 length"}[audit.norm]
    return {
        "goal": "untargeted: any label but the image's own",
        "norm": norm,
        "epsilon": f"{audit.headline:g}/255 for the headline; swept: {', '.join(f'{e:g}' for e in audit.epsilons)}",
        "pixels": "[0, 1], delivered as 8-bit 32x32 RGB, scored on that grid",
        "knowledge": "weights, temperatures and the law of theta are public; theta is secret and fresh for each image",
        "order": "the attacker chooses the image before theta is drawn",
        "queries": "none for gradient attacks; counted one by one for black-box attacks",
        "compute": f"profile {audit.profile}",
    }


NOT_COVERED: Final = (
    "Changes outside the norm ball: rotations, crops, patches, corruptions, other images of the class.",
    "Attackers who see theta, the latency of single requests, or the memory of the server.",
    "Poisoned training data, stolen or extracted weights, and images larger than 32x32 before they are resized.",
    "Attacks stronger or longer than those run: every figure is an upper bound.",
    "The list of checks is neither necessary nor sufficient (Carlini et al., 2019): passing it proves no robustness.",
)
