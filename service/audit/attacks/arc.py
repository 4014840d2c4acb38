"""ARC (Dbouk and Shanbhag, 2022), over draws of theta: an attack on one draw at a time that never gives up a gain.

The averaged gradient may fool no member although one exists that fools some. So each step goes over the nearest
boundary of one drawn ensemble, linearised where the image stands. It is the least step that keeps what earlier draws
of the same sweep gained (the paper's beta). A second proposal goes straight over that boundary and far beyond.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from model_store.attacks import EPS, ThreatModel, per_image, project, random_start, steepest_direction
from service.audit.attacks.eot import dual_norm
from service.audit.evaluation.members import AttackTarget
from service.audit.evaluation.scoring import CERTAIN, failure, wrong

OVERSHOOT: Final = 0.05  # in epsilons, beyond the linearised boundary: the paper's rho
LOCAL: Final = 0.5  # in epsilons, the local perturbation of one sweep: the paper's beta_m
POOL: Final = 4  # unfooled draws looked at for each one that is attacked


@dataclass(frozen=True)
class ArcConfig:
    """sweeps: times the draws still unfooled are counted again.  candidates: draws tried after each count.
    classes: the wrong classes whose distance is measured, those with the highest logits.  restarts: random starts,
    after the warm one."""

    sweeps: int = 10
    candidates: int = 8
    classes: int = 4
    restarts: int = 1


@dataclass
class Reached:
    """images: float [N, ...], accepted so far.  risk: float64 [N], which never falls."""

    images: Tensor
    risk: Tensor

    def offer(self, target: AttackTarget, labels: Tensor, proposed: Tensor) -> Tensor:
        """bool [N]: which proposals were accepted."""
        risk = failure(no_grad_logits(target, proposed), labels, target.draws)
        accept = risk >= self.risk
        self.images = torch.where(per_image(accept, proposed), proposed, self.images)
        self.risk = torch.maximum(self.risk, risk)
        return accept


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
    starts = [project(warm[0], images, threat) if warm else images]
    starts += [random_start(images, threat, generator) for _ in range(sweeps.restarts)]
    reached, risk = [], []
    for index in torch.split(torch.arange(len(images)), target.batch(images)):
        clean, right = images[index], labels[index]
        tries = [attack_batch(target, clean, right, threat, sweeps, generator, start[index]) for start in starts]
        risks = torch.stack([each.risk for each in tries])
        pick = risks.argmax(dim=0)
        reached.append(torch.stack([each.images for each in tries])[pick, torch.arange(len(index))])
        risk.append(risks.amax(dim=0))
    return torch.cat(reached), torch.cat(risk)


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
        sweep(target, part, clean[alive], labels[alive], threat, sweeps, generator)
        reached.images[alive], reached.risk[alive] = part.images, part.risk
    return reached


def sweep(
    target: AttackTarget,
    part: Reached,
    clean: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    sweeps: ArcConfig,
    generator: torch.Generator,
) -> None:
    """One pass over several draws, from where the images stand; `local` is what the pass has added so far."""
    origin, local = part.images, torch.zeros_like(part.images)
    for place, row in enumerate(nearest_rows(target, part.images, labels, sweeps.candidates, generator)):
        away, gradient = nearest_boundary(target, row, part.images, labels, threat, sweeps.classes)
        moved = protected_step(local, away, gradient, threat, first=place == 0)
        accepted = part.offer(target, labels, project(origin + moved, clean, threat))
        local = torch.where(per_image(accepted, local), moved, local)
        for step in over_the_boundary(away, gradient, threat):
            accepted = part.offer(target, labels, project(part.images + step, clean, threat))
            local = torch.where(per_image(accepted, local), part.images - origin, local)


def nearest_rows(
    target: AttackTarget, images: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Draws that still classify some images rightly, those with the least lead first.

    A pool is drawn, likelier the more of the images a draw still classifies rightly.
    """
    logits = no_grad_logits(target, images)
    right = ~wrong(logits, labels, target.draws)
    odds = target.draws.weights * right.to(torch.float64).mean(dim=1)
    pool = torch.multinomial(odds.cpu(), min(POOL * count, int((odds > 0).sum())), generator=generator)
    rows = target.draws.rows[pool.to(target.draws.device)]
    outputs = torch.einsum("rm,mnc->rnc", rows / rows.sum(dim=1, keepdim=True), logits)
    leads = outputs.gather(2, labels.expand(len(rows), -1)[..., None]).squeeze(2)
    leads = leads - outputs.scatter(2, labels.expand(len(rows), -1)[..., None], -torch.inf).amax(dim=2)
    nearest = (leads.clamp_min(0).sum(dim=1) / (leads > 0).sum(dim=1).clamp_min(1)).argsort()[:count]
    return iter(rows[nearest])


def nearest_boundary(
    target: AttackTarget, row: Tensor, images: Tensor, labels: Tensor, threat: ThreatModel, classes: int
) -> tuple[Tensor, Tensor]:
    """The linearised distance [N] to the nearest wrong class of one draw, and the gradient of the lead over it.

    The distance is at most 0 where the draw errs already.
    """
    drawn = [(member, float(count)) for member, count in zip(target.members, row, strict=True) if count]
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = torch.stack([member(images) * count for member, count in drawn]).sum(dim=0) / float(row.sum())
        others = logits.detach().scatter(1, labels[:, None], -torch.inf)
        rivals = others.topk(min(classes, logits.shape[1] - 1), dim=1).indices
        right = logits.gather(1, labels[:, None]).squeeze(1)
        nearest, steepest = torch.full_like(right.detach(), torch.inf), torch.zeros_like(images)
        for place in range(rivals.shape[1]):
            lead = right - logits.gather(1, rivals[:, place : place + 1]).squeeze(1)
            (gradient,) = torch.autograd.grad(lead.sum(), images, retain_graph=place + 1 < rivals.shape[1])
            away = lead.detach() / dual_norm(gradient, threat).clamp_min(EPS)
            closer = away < nearest
            nearest = torch.where(closer, away, nearest)
            steepest = torch.where(per_image(closer, steepest), gradient, steepest)
    return nearest, steepest.detach()


def protected_step(local: Tensor, away: Tensor, gradient: Tensor, threat: ThreatModel, *, first: bool) -> Tensor:
    """The local perturbation of length beta_m that crosses this draw's boundary (Dbouk and Shanbhag, algorithm 1).

    It gives up as little as it can of what it crossed before.
    """
    radius = LOCAL * threat.epsilon
    direction = -steepest_direction(gradient, threat.norm)
    unit = -gradient / per_image(dual_norm(gradient, threat).clamp_min(EPS), gradient)
    beta = torch.full_like(away, radius)
    if not first:
        along = (unit * local).flatten(1).sum(dim=1)
        within = radius / (radius - away).clamp_min(EPS) * (away - along).abs() + OVERSHOOT * threat.epsilon
        beta = torch.where(away < radius, within, beta)
    moved = local + per_image(beta, local) * direction
    flat = moved.flatten(1)
    length = flat.abs().amax(dim=1) if threat.norm == "linf" else flat.norm(dim=1)
    moved = moved * per_image(radius / length.clamp_min(EPS), moved)
    return torch.where(per_image(away > 0, local), moved, local)


def over_the_boundary(away: Tensor, gradient: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Two steps along the steepest way out of one draw's decision: just over the linearised boundary, and far."""
    near = torch.where(away > 0, (away + OVERSHOOT * threat.epsilon).clamp(max=2 * threat.epsilon), 0)
    far = torch.where(away > 0, 2 * threat.epsilon, 0.0)
    direction = -steepest_direction(gradient, threat.norm)
    return per_image(near, gradient) * direction, per_image(far, gradient) * direction
