"""An attack on one draw at a time, in the manner of ARC (Dbouk and Shanbhag, 2022), which never gives up a gain.

The averaged gradient may fool no member although one exists that fools some. So each step goes just over the nearest
boundary of one drawn ensemble, linearised where the image stands, and keeps what it gained before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.attacks import EPS, ThreatModel, per_image, project, steepest_direction
from service.audit.evaluation.members import AttackTarget
from service.audit.evaluation.scoring import CERTAIN, failure, wrong

OVERSHOOT = 0.05  # in epsilons, beyond the linearised boundary


@dataclass(frozen=True)
class ArcConfig:
    """sweeps: times the draws still unfooled are counted again.  candidates: draws tried after each count."""

    sweeps: int = 10
    candidates: int = 8


@dataclass
class Reached:
    """images: float [N, ...], accepted so far.  risk: float64 [N], which never falls."""

    images: Tensor
    risk: Tensor

    def offer(self, target: AttackTarget, labels: Tensor, proposed: Tensor) -> None:
        risk = failure(no_grad_logits(target, proposed), labels, target.draws)
        accept = risk >= self.risk
        self.images = torch.where(per_image(accept, proposed), proposed, self.images)
        self.risk = torch.maximum(self.risk, risk)


@torch.no_grad()
def no_grad_logits(target: AttackTarget, images: Tensor) -> Tensor:
    return target(images)


def attack(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    sweeps: ArcConfig,
    generator: torch.Generator,
    warm: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The images reached and their risk on the attacker's draws. warm: the first start, the clean images if empty."""
    parts = []
    for index in torch.split(torch.arange(len(images)), target.batch(images)):
        start = project(warm[0][index], images[index], threat) if warm else images[index]
        parts.append(attack_batch(target, images[index], labels[index], threat, sweeps, generator, start))
    return torch.cat([part.images for part in parts]), torch.cat([part.risk for part in parts])


def attack_batch(
    target: AttackTarget,
    clean: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    sweeps: ArcConfig,
    generator: torch.Generator,
    start: Tensor,
) -> Reached:
    reached = Reached(start, failure(no_grad_logits(target, start), labels, target.draws))
    for _ in range(sweeps.sweeps):
        alive = (reached.risk < CERTAIN).nonzero().flatten()
        if not len(alive):
            break
        part = Reached(reached.images[alive], reached.risk[alive])
        for row in unfooled_rows(target, part.images, labels[alive], sweeps.candidates, generator):
            for step in over_the_boundary(target, row, part.images, labels[alive], threat):
                part.offer(target, labels[alive], project(part.images + step, clean[alive], threat))
        reached.images[alive], reached.risk[alive] = part.images, part.risk
    return reached


def unfooled_rows(
    target: AttackTarget, images: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> list[Tensor]:
    """Draws, likelier the more of the images they still classify rightly."""
    right = ~wrong(no_grad_logits(target, images), labels, target.draws)
    odds = target.draws.weights * right.to(torch.float64).mean(dim=1)
    picked = torch.multinomial(odds.cpu(), min(count, int((odds > 0).sum())), generator=generator)
    return [target.draws.rows[index] for index in picked.tolist()]


def over_the_boundary(
    target: AttackTarget, row: Tensor, images: Tensor, labels: Tensor, threat: ThreatModel
) -> tuple[Tensor, Tensor]:
    """Two steps along the steepest way out of one draw's decision: just over the linearised boundary, and far."""
    lead, gradient = lead_of(target, row, images, labels)
    flat = gradient.flatten(1)
    length = flat.abs().sum(dim=1) if threat.norm == "linf" else flat.norm(dim=1)
    away = lead / length.clamp_min(EPS)
    near = torch.where(lead > 0, (away + OVERSHOOT * threat.epsilon).clamp(max=2 * threat.epsilon), 0)
    far = torch.where(lead > 0, 2 * threat.epsilon, 0.0)
    direction = -steepest_direction(gradient, threat.norm)
    return per_image(near, images) * direction, per_image(far, images) * direction


def lead_of(target: AttackTarget, row: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How far the right class leads the nearest wrong one under this draw, [N], and the gradient in the images."""
    drawn = [(member, float(count)) for member, count in zip(target.members, row, strict=True) if count]
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = torch.stack([member(images) * count for member, count in drawn]).sum(dim=0) / float(row.sum())
        right = logits.gather(1, labels[:, None]).squeeze(1)
        lead = right - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        (gradient,) = torch.autograd.grad(lead.sum(), images)
    return lead.detach(), gradient
