"""Check 35: are examples that are known to exist found (Zimmermann et al., 2022)?

For each image a readout of the networks' own logits is made. It calls random points of the ball right and one corner
of it wrong. That corner is a planted example: an attack that cannot find one as bad fails where an answer is known.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from model_store.attacks import ThreatModel, project, random_start, steepest_direction
from service.audit.attacks import eot
from service.audit.attacks.eot import PgdConfig
from service.audit.attacks.losses import ensemble_logits
from service.audit.checks.base import Check, CheckContext, CheckResult, points
from service.audit.evaluation.members import AttackTarget, Member
from service.audit.evaluation.scoring import failure

IMAGES: Final = 16
POINTS: Final = 48  # random points that the readout calls right
CORNERS: Final = 16  # random corners, of which the one that stands out most is planted
RIDGE: Final = 1e-2  # of the mean variance: keeps the discriminant finite
FINDS: Final = PgdConfig("hinge", steps=40, step=0.1, momentum=0.75, restarts=2)
LEAST: Final = 0.9  # of the planted examples, that have to be found


class Readout(nn.Module):
    """Two classes from one network's logits: wrong beyond the threshold of a linear discriminant."""

    def __init__(self, member: Member, weight: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.member, self.weight, self.threshold = member, weight, threshold

    def forward(self, images: Tensor) -> Tensor:
        beyond = self.member(images) @ self.weight - self.threshold
        return torch.stack([-beyond, beyond], dim=1)


@dataclass(frozen=True)
class Planted:
    """A target with an example that exists. image: [1, 3, H, W].  risk: over theta, of that example."""

    target: AttackTarget
    image: Tensor
    risk: float


@torch.no_grad()
def plant(target: AttackTarget, image: Tensor, threat: ThreatModel, generator: torch.Generator) -> Planted:
    """Hides an example in the ball around one image, [1, 3, H, W]."""
    many = image.expand(POINTS, *image.shape[1:])
    points_right = torch.cat([image, random_start(many, threat, generator)])
    noise = torch.randn((CORNERS, *image.shape[1:]), generator=generator).to(image)
    corners = project(image + threat.epsilon * steepest_direction(noise, threat.norm), image, threat)
    inner, outer = mean_logits(target, points_right), mean_logits(target, corners)
    centre = inner.mean(dim=0)
    spread = torch.cov(inner.T)
    ridge = RIDGE * spread.diagonal().mean().clamp_min(1e-12) * torch.eye(len(spread)).to(spread)
    directions = torch.linalg.solve(spread + ridge, (outer - centre).T).T  # one discriminant for each corner
    gaps = (directions * outer).sum(dim=1) - (inner @ directions.T).amax(dim=0)
    best = int((gaps / directions.norm(dim=1)).argmax())
    weight = directions[best] / directions[best].norm()
    reach, inner_reach = outer[best] @ weight, (inner @ weight).amax()
    threshold = (reach + inner_reach) / 2
    members = tuple(Member(each.name, Readout(each, weight, threshold).eval(), 1.0) for each in target.members)
    hidden = AttackTarget(members, target.draws, target.threads)
    corner = corners[best : best + 1]
    label = torch.zeros(1, dtype=torch.int64, device=image.device)
    return Planted(hidden, corner, float(failure(hidden.logits(corner), label, target.draws)))


def mean_logits(target: AttackTarget, images: Tensor) -> Tensor:
    """[N, classes]: the mean over theta of the ensemble's logits."""
    outputs = ensemble_logits(target.logits(images), target.draws)
    return torch.einsum("r,rnc->nc", target.draws.weights.to(outputs), outputs)


def attack_finds(planted: Planted, image: Tensor, threat: ThreatModel, generator: torch.Generator) -> bool:
    """Whether an attack meets an example at least as bad as the planted one."""
    label = torch.zeros(1, dtype=torch.int64, device=image.device)
    reached = eot.attack(planted.target, image, label, threat, FINDS, generator)
    return float(reached.risk) >= planted.risk - 1e-9


def planted_examples(context: CheckContext) -> CheckResult:
    """Those of the served law, on images that are right at first."""
    threat, generator = context.threat(), context.generator("planted")
    successes = []
    for image in torch.split(context.images[:IMAGES], 1):
        planted = plant(context.target, image, threat, generator)
        if planted.risk > 0:
            successes.append(attack_finds(planted, image, threat, generator))
    if not successes:
        return CheckResult(None, "no corner of the ball stands out from its inside")
    share = sum(successes) / len(successes)
    return CheckResult(share >= LEAST, f"{points(share)} of {len(successes)} planted examples found")


CHECKS: Final = (
    Check(
        35,
        "planted examples",
        f"at least {100 * LEAST:.0f} % of examples that are known to exist are found",
        True,
        "standard",
        planted_examples,
    ),
)
