"""Expectation over theta, exactly: projected gradient ascent on a factored loss, the best iterate kept by exact risk.

Steps are constant (PGD, with momentum) or adaptive: APGD's momentum and halving (Croce and Hein, 2020), which is sound
here because the factored loss is no estimate: every iterate is judged by the same draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from model_store.attacks import EPS, ThreatModel, l1_unit, per_image, project, random_start, steepest_direction
from service.audit.attacks.losses import LOSSES, Loss, Stage, member_shares, typical_margin
from service.audit.evaluation.draws import DrawSet
from service.audit.evaluation.members import AttackTarget
from service.audit.evaluation.scoring import CERTAIN, failure

DAMPING: Final = 0.75  # APGD's alpha
RISING: Final = 0.75  # APGD's rho: the share of steps that must raise the loss
FIRST_CHECK, LEAST_GAP, GAP_SHRINKS = 0.22, 0.06, 0.03  # APGD's checkpoints, as shares of the steps
SCALED_ON: Final = 256  # images that the typical margin is taken from
LEAD: Final = 0.05  # of the range of a member's logits, by which a class leads beyond what bfloat16 rounds
DOUBT: Final = 1e-6  # of a risk of 1, where some draw that nobody made may be right
Risk = Callable[[Tensor, Tensor, DrawSet], Tensor]


@dataclass(frozen=True)
class PgdConfig:
    """loss: a name of LOSSES.  step: in epsilons (constant: of every step; adaptive: of the first).  momentum: of
    constant steps (Dong et al., 2018).  restarts: random starts, after the warm starts if any are given."""

    loss: str = "mean-loss"
    targets: int = 0  # wrong classes that a targeted loss tries one by one, the nearest by linearised distance first
    steps: int = 20
    step: float = 0.25
    restarts: int = 1
    momentum: float = 0.0
    schedule: Literal["constant", "adaptive"] = "constant"
    temperature: float = 1.0  # that logits are divided by before the loss: its scale decides what cross-entropy sees

    of_every_draw: ClassVar[bool] = False  # an image is left once all of the attacker's own draws misread it


class Reach(PgdConfig):
    """Leaves an image only once no draw at all can be right: where the law is sampled, one that the attacker did not
    make may still be right about an image that all of his misread."""

    of_every_draw: ClassVar[bool] = True


@dataclass(frozen=True)
class AttackResult:
    """images: the riskiest met, float [N, 3, H, W].  risk: float64 [N] on the attacker's draws.
    risks, losses: [steps + 1, N], the best so far at each step of the first start; the clean images come first."""

    images: Tensor
    risk: Tensor
    risks: Tensor
    losses: Tensor
    passes: int


@dataclass
class PgdState:
    """One start under way; row i belongs to image `rows[i]`. All tensors have the images first."""

    rows: Tensor
    clean: Tensor
    labels: Tensor
    images: Tensor
    previous: Tensor
    velocity: Tensor
    step: Tensor
    best_images: Tensor  # by loss, where adaptive steps return to
    best_gradient: Tensor
    best_loss: Tensor
    loss: Tensor
    rises: Tensor
    loss_at_check: Tensor
    halved: Tensor

    def keep(self, index: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[index])


@dataclass
class Best:
    """The riskiest images so far, by risk and then by loss."""

    images: Tensor
    risk: Tensor
    loss: Tensor

    def take(self, rows: Tensor, images: Tensor, risk: Tensor, loss: Tensor) -> None:
        better = (risk > self.risk[rows]) | ((risk == self.risk[rows]) & (loss > self.loss[rows]))
        chosen = rows[better]
        self.images[chosen], self.risk[chosen], self.loss[chosen] = images[better], risk[better], loss[better]


def attack(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    ascent: PgdConfig,
    generator: torch.Generator,
    warm: Sequence[Tensor] = (),
    known: Sequence[Tensor] = (),
) -> AttackResult:
    """Ascends from each start and keeps the riskiest image met.

    Args:
      images: float [N, 3, H, W] in [0, 1].
      warm: starts of the same shape, tried before the random ones.
      known: images of earlier attacks. Those that all draws misread already are not attacked again.
    """
    scale = typical_margin(target.logits(images[:SCALED_ON]), labels[:SCALED_ON], target.draws)
    begin, passes = Stage(scale, 0.0), len(images) * (1 + len(known))
    aims: Sequence[Tensor | None] = [None]
    if ascent.targets:
        aims, cost = nearest_classes(target, images, labels, threat, ascent.targets)
        begin, passes = replace(begin, targets=aims[0]), passes + cost
    loss, risk_of = loss_of(ascent), risk_of_every_draw if ascent.of_every_draw else failure
    best = score_clean(target, images, labels, loss, risk_of, begin)
    clean = best.risk.clone(), best.loss.clone()
    for earlier in known:
        inside = project(earlier, images, threat)
        tried = score_clean(target, inside, labels, loss, risk_of, begin)
        best.take(torch.arange(len(images), device=images.device), inside, tried.risk, tried.loss)
    traces = []
    for aim in aims:
        for start in [*(project(start, images, threat) for start in warm), *[None] * ascent.restarts]:
            fresh = random_start(images, threat, generator) if start is None else start  # drawn even if nothing is left
            stage = replace(begin, targets=aim)
            trace, cost = run_restart(target, images, labels, threat, ascent, risk_of, fresh, best, stage)
            traces.append(trace)
            passes += cost
    risks, losses = traces[0]
    risks[0], losses[0] = clean
    return AttackResult(best.images, best.risk, risks, losses, passes=passes)


def nearest_classes(
    target: AttackTarget, images: Tensor, labels: Tensor, threat: ThreatModel, count: int
) -> tuple[list[Tensor], int]:
    """The wrong classes of each image, int64 [N], the nearest first; and the passes that it took to order them.

    Distance is linearised: the lead of the right class in the mean over theta, over the dual norm of its gradient
    (MALT, Melamed et al., 2024). Of the classes that the logits put first, twice as many as are taken are measured.
    """
    classes = target.logits(images[:1]).shape[2]
    count = min(count, classes - 1)
    shares = member_shares(target.draws, images)
    mean = torch.einsum("m,mnc->nc", shares, target.logits(images))
    rivals = mean.scatter(1, labels[:, None], -torch.inf).topk(min(2 * count, classes - 1), dim=1).indices
    measured = []
    for place in range(rivals.shape[1]):
        parts = [lead_over(target, *part) for part in target.parts(images, labels, rivals[:, place])]
        lead, gradient = (torch.cat(values) for values in zip(*parts, strict=True))
        measured.append(lead / dual_norm(gradient, threat).clamp_min(EPS))
    order = torch.stack(measured, dim=1).argsort(dim=1)[:, :count]
    return list(rivals.gather(1, order).T), len(images) * rivals.shape[1]


def lead_over(target: AttackTarget, images: Tensor, labels: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    """How far the right class leads one other in the mean logits over theta, [N], and the gradient in the images."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        mean = torch.einsum("m,mnc->nc", member_shares(target.draws, images), target(images))
        lead = (mean.gather(1, labels[:, None]) - mean.gather(1, rivals[:, None])).squeeze(1)
        (gradient,) = torch.autograd.grad(lead.sum(), images)
    return lead.detach(), gradient


def dual_norm(gradient: Tensor, threat: ThreatModel) -> Tensor:
    """[N]: what a step of length 1 in the threat model's norm can change along the gradient."""
    flat = gradient.flatten(1)
    return flat.abs().sum(dim=1) if threat.norm == "linf" else flat.norm(dim=1)


def loss_of(ascent: PgdConfig) -> Loss:
    """The attack's loss, of logits at its temperature."""
    loss, temperature = LOSSES[ascent.loss], ascent.temperature
    if temperature == 1.0:
        return loss
    return lambda logits, labels, draws, stage: loss(
        logits / temperature, labels, draws, replace(stage, scale=stage.scale / temperature)
    )


def risk_of_every_draw(logits: Tensor, labels: Tensor, draws: DrawSet) -> Tensor:
    """float64 [N]: the risk on the draws, and CERTAIN only where it is so for any draw: one wrong class leads the right
    one in every member, and so in every sum of members."""
    risk = failure(logits, labels, draws)
    right = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])
    spread = logits.amax(dim=2, keepdim=True) - logits.amin(dim=2, keepdim=True)
    led = (logits - right > LEAD * spread).all(dim=0).any(dim=1)
    return torch.where(led, risk, risk * (1 - DOUBT))


@torch.no_grad()
def score_clean(target: AttackTarget, images: Tensor, labels: Tensor, loss: Loss, risk_of: Risk, stage: Stage) -> Best:
    risks, losses = [], []
    rows = torch.arange(len(images), device=images.device)
    for some, right, index in target.parts(images, labels, rows):
        logits = target(some)
        risks.append(risk_of(logits, right, target.draws))
        losses.append(loss(logits, right, target.draws, stage.of(index)))
    return Best(images.clone(), torch.cat(risks), torch.cat(losses))


def gradients_of(
    target: AttackTarget, images: Tensor, labels: Tensor, loss: Loss, stage: Stage, risk_of: Risk = failure
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as gradient_of, for as many images as there are: in even parts, each of which fits into memory."""
    parts = torch.arange(len(images), device=images.device).tensor_split(-(-len(images) // target.batch(images)))
    parts_of = [gradient_of(target, images[part], labels[part], loss, stage.of(part), risk_of) for part in parts]
    risk, losses, gradient = (torch.cat(values) for values in zip(*parts_of, strict=True))
    return risk, losses, gradient


def gradient_of(
    target: AttackTarget, images: Tensor, labels: Tensor, loss: Loss, stage: Stage, risk_of: Risk = failure
) -> tuple[Tensor, Tensor, Tensor]:
    """The risk [N], the loss [N] and its gradient in the images; one forward and one backward of each member."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = target(images)
        losses = loss(logits, labels, target.draws, stage)
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return risk_of(logits.detach(), labels, target.draws), losses.detach(), gradient


def run_restart(
    target: AttackTarget,
    clean: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    ascent: PgdConfig,
    risk_of: Risk,
    start: Tensor,
    best: Best,
    stage: Stage,
) -> tuple[tuple[Tensor, Tensor], int]:
    """One start, updating `best`. Returns the trace of best risk and loss so far, and the image-steps it cost."""
    loss = loss_of(ascent)
    state = initial_state(clean, labels, start, threat, ascent)
    checks = checkpoints(ascent.steps)
    risks, losses, passes = [best.risk.clone()], [best.loss.clone()], 0
    for step in range(ascent.steps + 1):
        state.keep(best.risk[state.rows] < CERTAIN)
        if len(state.rows):
            stage = stage.at(step / max(1, ascent.steps))
            some = stage.of(state.rows)
            risk, now, gradient = gradients_of(target, state.images, state.labels, loss, some, risk_of)
            passes += len(state.rows)
            best.take(state.rows, state.images, risk, now)
            record(state, now, gradient, step)
            if ascent.schedule == "adaptive" and step in checks:
                gradient = halve_steps(state, gradient, step - checks[step])
            if step < ascent.steps:
                step_images(state, gradient, threat, ascent, step)
        risks.append(best.risk.clone())
        losses.append(best.loss.clone())
    return (torch.stack(risks), torch.stack(losses)), passes


def initial_state(clean: Tensor, labels: Tensor, start: Tensor, threat: ThreatModel, ascent: PgdConfig) -> PgdState:
    zeros = torch.zeros(len(clean), device=clean.device)
    return PgdState(
        rows=torch.arange(len(clean), device=clean.device),
        clean=clean,
        labels=labels,
        images=start,
        previous=start,
        velocity=torch.zeros_like(clean),
        step=zeros + (2.0 if ascent.schedule == "adaptive" else ascent.step) * threat.epsilon,
        best_images=start,
        best_gradient=torch.zeros_like(clean),
        best_loss=zeros - torch.inf,
        loss=zeros - torch.inf,
        rises=zeros,
        loss_at_check=zeros - torch.inf,
        halved=zeros.bool(),
    )


def record(state: PgdState, losses: Tensor, gradient: Tensor, step: int) -> None:
    """Counts the rises since the last checkpoint and keeps the point of the highest loss."""
    if step > 0:
        state.rises = state.rises + (losses > state.loss)
    higher = losses > state.best_loss
    state.best_images = torch.where(per_image(higher, state.images), state.images, state.best_images)
    state.best_gradient = torch.where(per_image(higher, gradient), gradient, state.best_gradient)
    state.best_loss = torch.maximum(losses, state.best_loss)
    state.loss = losses


def checkpoints(steps: int) -> dict[int, int]:
    """APGD's: step -> the checkpoint before it."""
    gap = max(int(FIRST_CHECK * steps), 1)
    previous, at = {}, 0
    while at + gap <= steps:
        previous[at + gap] = at
        at += gap
        gap = max(gap - max(int(GAP_SHRINKS * steps), 1), max(int(LEAST_GAP * steps), 1))
    return previous


def halve_steps(state: PgdState, gradient: Tensor, gap: int) -> Tensor:
    """Halves the step of images whose loss seldom rose or stood still, and takes them back to their best point."""
    stuck = ~state.halved & (state.best_loss <= state.loss_at_check)
    halve = (state.rises < RISING * gap) | stuck
    state.step = torch.where(halve, state.step / 2, state.step)
    back = per_image(halve, state.images)
    state.images = torch.where(back, state.best_images, state.images)
    state.previous = torch.where(back, state.best_images, state.previous)
    state.loss = torch.where(halve, state.best_loss, state.loss)
    state.halved, state.loss_at_check = halve, state.best_loss
    state.rises = torch.zeros_like(state.rises)
    return torch.where(back, state.best_gradient, gradient)


def step_images(state: PgdState, gradient: Tensor, threat: ThreatModel, ascent: PgdConfig, step: int) -> None:
    size = per_image(state.step, state.images)
    if ascent.schedule == "constant":
        state.velocity = ascent.momentum * state.velocity + l1_unit(gradient)
        state.images = project(
            state.images + size * steepest_direction(state.velocity, threat.norm), state.clean, threat
        )
        return
    ahead = project(state.images + size * steepest_direction(gradient, threat.norm), state.clean, threat)
    damping = DAMPING if step else 1.0
    drift = (1 - damping) * (state.images - state.previous)
    moved = project(state.images + damping * (ahead - state.images) + drift, state.clean, threat)
    state.previous, state.images = state.images, moved
