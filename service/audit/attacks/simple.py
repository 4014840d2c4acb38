"""What needs no expectation: single tickets one by one, random corners of the ball, one perturbation for all images."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from model_store.attacks import (
    EPS,
    Loss,
    ThreatModel,
    cross_entropy,
    fgsm,
    l1_unit,
    per_image,
    pgd,
    project,
    random_start,
    steepest_direction,
)
from model_store.ensemble import Classifier
from service.audit.attacks.losses import LOSSES, Stage, typical_margin
from service.audit.evaluation.members import CUDA_PASS_IMAGES, AttackTarget
from service.audit.evaluation.scoring import failure
from service.audit.evaluation.threads import WorkerThreads

BATCH: Final = 64
PART: Final = 64  # images of one PGD on one ticket


@dataclass(frozen=True)
class SingleModelPgd:
    """PGD on one ticket alone, as Table 1 has it; steps 0 is FGSM. step: in epsilons."""

    steps: int = 20
    step: float = 0.25
    restarts: int = 1


@dataclass(frozen=True)
class UniversalPerturbation:
    """One perturbation for every image: found on the first half of them, measured on the others. batch: images of one
    step, for every system the same."""

    loss: str = "mean-loss"
    epochs: int = 10
    batch: int = 8
    step: float = 0.125
    momentum: float = 0.9


@dataclass(frozen=True)
class RandomCorners:
    """Random corners of the ball, the riskiest kept."""

    count: int = 100


def attack_member(
    member: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    single: SingleModelPgd,
    generator: torch.Generator,
    loss: Loss = cross_entropy,
    threads: WorkerThreads | None = None,
) -> Tensor:
    """Part by part, each with a generator of its own, in parallel on a CPU. member: images to logits [N, classes]."""

    def run(some: Tensor, right: Tensor, seed: int) -> Tensor:
        if single.steps == 0:
            return fgsm(member, some, right, threat, loss=loss)
        return pgd(
            member,
            some,
            right,
            threat,
            steps=single.steps,
            step_size=single.step * threat.epsilon,
            restarts=single.restarts,
            generator=torch.Generator().manual_seed(seed),
            loss=loss,
        )

    size = PART if images.device.type == "cpu" else CUDA_PASS_IMAGES
    some, right = torch.split(images, size), torch.split(labels, size)
    seeds = torch.randint(2**62, (len(some),), generator=generator).tolist()
    return torch.cat(list((threads or WorkerThreads()).map(run, some, right, seeds)))


@torch.no_grad()
def corners(
    target: AttackTarget, images: Tensor, labels: Tensor, threat: ThreatModel, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The riskiest of `count` random corners of each image's ball (l2: points of its sphere), and its risk [N]."""
    best = images.clone()
    risk = failure(torch.cat([target(part) for part in torch.split(images, BATCH)], dim=1), labels, target.draws)
    for _ in range(count):
        noise = torch.randn(images.shape, generator=generator).to(images)
        tried = project(images + threat.epsilon * steepest_direction(noise, threat.norm), images, threat)
        logits = torch.cat([target(part) for part in torch.split(tried, BATCH)], dim=1)
        now = failure(logits, labels, target.draws)
        best = torch.where(per_image(now > risk, best), tried, best)
        risk = torch.maximum(now, risk)
    return best, risk


def universal(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    settings: UniversalPerturbation,
    generator: torch.Generator,
) -> Tensor:
    """The images with one perturbation [1, 3, H, W] added, which has seen only the first half of them."""
    seen = max(1, len(images) // 2)
    shift = random_start(torch.full_like(images[:1], 0.5), threat, generator) - 0.5
    velocity = torch.zeros_like(shift)
    best, highest = shift, -torch.inf
    scale = typical_margin(target.logits(images[:seen]), labels[:seen], target.draws)
    for _ in range(settings.epochs):
        order = torch.randperm(seen, generator=generator).to(images.device)
        for index in torch.split(order, settings.batch):
            gradient = shared_gradient(target, images[index], labels[index], shift, settings.loss, scale)
            velocity = settings.momentum * velocity + l1_unit(gradient)
            shift = within(shift + settings.step * threat.epsilon * steepest_direction(velocity, threat.norm), threat)
        risk = shared_risk(target, images[:seen], labels[:seen], shift)
        if risk > highest:
            best, highest = shift, risk
    return (images + best).clamp(0, 1)


def within(shift: Tensor, threat: ThreatModel) -> Tensor:
    if threat.norm == "linf":
        return shift.clamp(-threat.epsilon, threat.epsilon)
    length = float(shift.norm())
    return shift * (threat.epsilon / max(length, threat.epsilon, EPS))


def shared_gradient(
    target: AttackTarget, images: Tensor, labels: Tensor, shift: Tensor, loss: str, scale: float
) -> Tensor:
    """[1, 3, H, W]: of the summed loss, in parts that fit into memory."""
    total = torch.zeros_like(shift)
    for some, right in target.parts(images, labels):
        with torch.enable_grad():
            moved = shift.detach().requires_grad_(True)
            losses = LOSSES[loss](target((some + moved).clamp(0, 1)), right, target.draws, Stage(scale, 1.0))
            total += torch.autograd.grad(losses.sum(), moved)[0]
    return total


def shared_risk(target: AttackTarget, images: Tensor, labels: Tensor, shift: Tensor) -> float:
    logits = target.logits((images + shift).clamp(0, 1))
    return float(failure(logits, labels, target.draws).mean())
