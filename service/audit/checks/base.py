"""A sanity check: something that must hold if the figures mean anything, its criterion, and what was found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import Tensor

from model_store.attacks import ThreatModel
from service.audit.attack_runner import AuditRun, Outcome, seed_of
from service.audit.attacks import eot
from service.audit.attacks.eot import AttackResult, PgdConfig
from service.audit.checks.power import ENOUGH, Seen
from service.audit.config import ProfileName
from service.audit.evaluation.draws import Defense
from service.audit.evaluation.members import AttackTarget, as_floats
from service.audit.evaluation.pixel_grid import quantize_to_uint8
from service.audit.profiles import PROFILES, Profile

Result = Literal["pass", "warn", "fail", "skipped", "no power"]
OF_ANSWERS: Final = frozenset((1, 28, 29, 30, 31, 33, 34))  # checks that need no network
RANK: Final[dict[ProfileName, int]] = {"smoke": 0, "standard": 1, "full": 2, "reference": 1}


@dataclass(frozen=True)
class CheckResult:
    """ok: None where there was nothing to judge.  value: what was found, in words with its numbers."""

    ok: bool | None
    value: str
    warn: bool = False  # not ok, but only a warning here
    seen: Seen | None = None  # what was looked for, where images could show it
    enough: int = ENOUGH  # images without which nothing seen means nothing

    @property
    def powerless(self) -> bool:
        """Whether nothing was seen on too few images to see it."""
        return bool(self.ok) and self.seen is not None and self.seen.images < self.enough

    @property
    def text(self) -> str:
        """What was found, and the smallest effect that could have been."""
        if self.seen is None:
            return self.value
        size = f"could have seen {points(self.seen.detectable)} on {self.seen.images} images right at first"
        return f"{self.value}; {size}"


def judged(seen: Seen, value: str, *, holds: bool = True, warn: bool = False, enough: int = ENOUGH) -> CheckResult:
    """Not ok if the effect shows. holds: what else the check requires."""
    return CheckResult(holds and not seen.shows, value, warn, seen, enough)


@dataclass(frozen=True)
class Check:
    """One row of the table. hard: whether a failure makes the audit invalid."""

    id: int
    name: str
    criterion: str
    hard: bool
    least: ProfileName
    run: Callable[["CheckContext"], CheckResult]


@dataclass(frozen=True)
class TicketAlone:
    """One ticket under attacks on it, on images that it reads rightly. single_step, iterated: float64 [images], FGSM
    and PGD-20.  index: int64 [images]."""

    index: Tensor
    single_step: Tensor
    iterated: Tensor


@dataclass
class CheckContext:
    """What checks share: a run, images that are right at first, and the attacks made on them so far."""

    run: AuditRun
    cache: dict[str, AttackResult] = field(default_factory=dict)
    alone: dict[int, TicketAlone] = field(default_factory=dict)  # by the ticket's place

    @property
    def profile(self) -> Profile:
        return PROFILES[self.run.audit.profile]

    @property
    def full(self) -> bool:
        return self.run.audit.profile == "full"

    @cached_property
    def index(self) -> Tensor:
        """int64 [count]: the first images that are right at first, as many as the profile checks; any if none is."""
        right = right_at_first(self.run).nonzero().flatten()
        chosen = right if len(right) else torch.arange(len(self.run.data))
        return chosen[: self.profile.check_images]

    @property
    def count(self) -> int:
        return len(self.index)

    @property
    def pixels(self) -> Tensor:
        """uint8 [count, 3, H, W]."""
        return self.run.data.pixels[self.index]

    @property
    def images(self) -> Tensor:
        return as_floats(self.pixels, self.run.candidates.device)

    @property
    def labels(self) -> Tensor:
        return self.run.data.labels[self.index]

    @property
    def ours(self) -> Defense:
        return self.run.systems[0]

    @property
    def target(self) -> AttackTarget:
        """Ours in float32, as it is scored."""
        return self.run.target(self.ours.name, exact=True)

    @property
    def crafting(self) -> AttackTarget:
        """Ours as attacks are crafted on it."""
        return self.run.target(self.ours.name)

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of("check", self.run.audit.seed, name))

    def attack(
        self, ascent: PgdConfig, name: str = "", target: AttackTarget | None = None, epsilon: float | None = None
    ) -> AttackResult:
        """On the checks' images at the headline epsilon, remembered by its settings."""
        attacked = target or self.crafting
        key = repr((ascent, name, epsilon, attacked.members[0].bfloat16))
        if key not in self.cache:
            threat = self.threat(epsilon)
            device = self.run.candidates.device
            self.cache[key] = eot.attack(
                attacked, self.images, self.labels.to(device), threat, ascent, self.generator(name)
            )
        return self.cache[key]

    def threat(self, epsilon: float | None = None) -> ThreatModel:
        size = self.run.epsilons.headline if epsilon is None else epsilon
        return ThreatModel(self.run.audit.norm, size / 255)

    def right(self, images: Tensor, system: Defense | None = None, epsilon: float | None = None) -> Tensor:
        """float64 [count]: p_i of images on the grid, under the scoring draws."""
        threat = self.threat(epsilon)
        pixels = quantize_to_uint8(images, self.pixels, threat.norm, threat.epsilon)
        return self.run.rights(system or self.ours, pixels, self.labels)

    def attacks(self, *names: str, epsilon: float | None = None) -> list[Outcome]:
        """Ours, at the headline epsilon, by the attacks' names."""
        size = self.run.epsilons.headline if epsilon is None else epsilon
        return [
            o
            for o in self.run.outcomes
            if o.step.system == self.ours.name and o.step.epsilon == size and (not names or o.step.name in names)
        ]


def right_at_first(run: AuditRun, system: Defense | None = None) -> Tensor:
    """bool [N]: the images that most draws classify rightly as they are. Only these can show that an attack is weak."""
    return run.clean(system or run.systems[0]).right >= 0.5


def points(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def evaluate_check(check: Check, context: CheckContext) -> dict[str, Any]:
    """The row of the table."""
    row = {"id": check.id, "name": check.name, "criterion": check.criterion, "hard": check.hard}
    if RANK[context.run.audit.profile] < RANK[check.least]:
        return {**row, "outcome": "skipped", "value": f"runs from profile {check.least} on", "detectable": None}
    if context.run.endpoint is not None and check.id not in OF_ANSWERS:
        text = "needs the model's weights or gradients; an endpoint gives answers alone"
        return {**row, "outcome": "skipped", "value": text, "detectable": None}
    result = check.run(context)
    if result.ok is None:
        outcome: Result = "skipped"
    elif result.powerless:
        outcome = "no power"
    elif result.ok:
        outcome = "pass"
    else:
        outcome = "fail" if check.hard and not result.warn else "warn"
    detectable = None if result.seen is None else round(result.seen.detectable, 6)
    return {**row, "outcome": outcome, "value": result.text, "detectable": detectable}
