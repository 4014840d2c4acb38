"""Checks 9 to 27: are the attacks as strong as they look? A defence that only looks strong fails here first."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from model_store.attacks import fgsm, l1_unit, project, random_start, steepest_direction
from model_store.policy import draw_theta, matrix
from service.audit import baselines
from service.audit.attack_runner import AuditRun, Outcome, seed_of
from service.audit.attacks import eot
from service.audit.attacks.autoattack import AutoAttackConfig, ExpectedLogits
from service.audit.attacks.autoattack import attack as library_attack
from service.audit.attacks.eot import gradient_of
from service.audit.attacks.losses import LOSSES, Stage
from service.audit.checks.base import Check, CheckContext, CheckResult, points, tolerance
from service.audit.checks.model import PROBE
from service.audit.config import ATTACKS, LARGEST, ProfileName
from service.audit.evaluation.draws import DrawSet
from service.audit.evaluation.members import AttackTarget, Member, as_floats, logits_of
from service.audit.evaluation.pixel_grid import quantize_to_uint8
from service.audit.evaluation.scoring import CERTAIN, failure, pointwise_worst
from service.audit.profiles import FAR, refine

GRADIENT_ATTACKS: Final = tuple(name for name in ATTACKS if name.startswith(("eot", "paper")))
BLACK_BOX: Final = ("square", "square-queries")
FIXED_DRAWS: Final = 20
FEW_STATES: Final = (4, 16, 256)  # chance switched on again, step by step
NEIGHBOURS: Final = 20
NEVER: Final = 256.0  # of a distance in 255ths: not even the whole range of pixels
SHARPEN: Final = refine(10)


def accuracy(run: AuditRun, outcome: Outcome) -> Tensor:
    """float64 [n]: ours under one attack's images."""
    return run.scores(run.systems[0], outcome).right


def strongest(run: AuditRun, outcomes: list[Outcome], images: int) -> Tensor:
    """float64 [images]: ours under the worst of these, which must cover the images."""
    index = torch.arange(images)
    attempts = [run.clean(run.systems[0]).pick(index)]
    attempts += [run.scores(run.systems[0], o).pick(index) for o in outcomes if o.step.images >= images]
    return pointwise_worst(attempts).right


def convergence(context: CheckContext) -> CheckResult:
    shares = {
        o.step.id: o.extra["converged"]
        for o in context.attacks(*GRADIENT_ATTACKS)
        if "converged" in o.extra and getattr(o.step.settings, "loss", "") != "risk"
    }
    if not shares:
        return CheckResult(None, "no gradient attack ran")
    best = max(shares.values())
    return CheckResult(best >= 0.95, f"{points(best)} of the images in the best-converged attack")


def more_steps(context: CheckContext) -> CheckResult:
    once, twice = (
        context.right(context.attack(replace(PROBE, steps=n), "steps").images) for n in (PROBE.steps, 2 * PROBE.steps)
    )
    limit = max(0.005, tolerance(once, twice))
    gained = float(once.mean() - twice.mean())
    return CheckResult(gained <= limit, f"{PROBE.steps} to {2 * PROBE.steps} steps: {points(gained)} lower")


def more_restarts(context: CheckContext) -> CheckResult:
    counts = (1, 5, 10) if context.full else (1, 2, 4)
    means = [float(context.right(context.attack(replace(PROBE, restarts=n), "restarts").images).mean()) for n in counts]
    text = ", ".join(f"{n}: {points(value)}" for n, value in zip(counts, means, strict=True))
    return CheckResult(means[-2] - means[-1] <= max(0.005, 1 / context.count), text)


def more_draws(context: CheckContext) -> CheckResult:
    """An attacker who samples m draws for each step, against the factored one; all scored exactly."""
    counts = (1, 5, 20)
    rights = [context.right(sampled_attack(context, m)) for m in counts] + [
        context.right(context.attack(PROBE, "probe").images)
    ]
    means = [float(value.mean()) for value in rights]
    text = ", ".join(f"{m}: {points(value)}" for m, value in zip((*map(str, counts), "exact"), means, strict=True))
    ordered = all(
        after <= before + tolerance(one, other)
        for before, after, one, other in zip(means, means[1:], rights, rights[1:], strict=False)
    )
    masks = means[0] - means[-1] > 0.05
    return CheckResult(ordered and not masks, text + ("; randomness masks gradients" if masks else ""))


def sampled_attack(context: CheckContext, draws: int) -> Tensor:
    """PGD whose gradients come from fresh draws at every step, as one without the factored form would do it."""
    rng, threat = random.Random(f"eot {context.run.audit.seed} {draws}"), context.threat()
    images, labels = (
        random_start(context.images, threat, context.generator("sampled")),
        context.labels.to(context.run.candidates.device),
    )
    velocity = torch.zeros_like(images)
    for _ in range(PROBE.steps):
        gradient = torch.zeros_like(images)
        for _ in range(draws):
            gradient += gradient_of(known_draw(context, rng), images, labels, LOSSES["mean-loss"], Stage(1.0, 0.0))[2]
        velocity = PROBE.momentum * velocity + l1_unit(gradient)
        images = project(
            images + PROBE.step * threat.epsilon * steepest_direction(velocity, threat.norm), context.images, threat
        )
    return images


def known_draw(context: CheckContext, rng: random.Random) -> AttackTarget:
    """One theta, known."""
    members = tuple(context.run.candidates.members[index] for index in draw_theta(context.ours.policy, rng).members)
    draws = DrawSet(torch.ones(1, len(members)), torch.ones(1, dtype=torch.float64), exhaustive=True)
    return AttackTarget(members, draws.to(context.run.candidates.device))


def iterative_below_single_step(context: CheckContext) -> CheckResult:
    rows = []
    for index in range(context.run.candidates.tickets):
        own = baselines.single(context.run.candidates, index)
        by_name = {
            o.step.name: context.run.scores(own, o).right for o in context.run.outcomes if o.step.system == own.name
        }
        if {"fgsm", "pgd-20"} <= set(by_name):
            excess = float((by_name["pgd-20"] - by_name["fgsm"]).mean()) - tolerance(by_name["pgd-20"], by_name["fgsm"])
            rows.append((excess, own.name))
    if not rows:
        return CheckResult(None, "FGSM and PGD-20 did not both run")
    return CheckResult(
        max(rows)[0] <= 0, f"{len(rows)} tickets; closest: {max(rows)[1]}, {points(-max(rows)[0])} to spare"
    )


def same_attack_by_epsilon(run: AuditRun) -> list[tuple[float, Tensor]]:
    """Ours under eot-mean-loss at each epsilon, on the images that it saw there."""
    outcomes = [o for o in run.outcomes if o.step.system == run.systems[0].name and o.step.name == "eot-mean-loss"]
    lowest: dict[float, Tensor] = {0.0: run.clean(run.systems[0]).right}
    for outcome in outcomes:
        lowest[outcome.step.epsilon] = accuracy(run, outcome)
    return sorted(lowest.items())


def monotone(context: CheckContext) -> CheckResult:
    curve = same_attack_by_epsilon(context.run)
    if len(curve) < 3:
        return CheckResult(None, "fewer than two epsilons above 0")
    rises = []
    for (_, before), (_, after) in itertools.pairwise(curve):  # on the images of both
        count = min(len(before), len(after))
        rises.append(float((after[:count] - before[:count]).mean()) - tolerance(before[:count], after[:count]))
    text = ", ".join(f"{epsilon:g}: {points(float(right.mean()))}" for epsilon, right in curve)
    return CheckResult(max(rises) <= 0, text)


def accuracy_at(context: CheckContext, epsilon: float) -> float | None:
    outcomes = context.attacks("eot-mean-loss", epsilon=epsilon)
    return float(accuracy(context.run, outcomes[0]).mean()) if outcomes else None


def reaches_zero(context: CheckContext) -> CheckResult:
    sizes = FAR[context.run.audit.norm]
    near, far = (accuracy_at(context, size) for size in sizes)
    if near is None or far is None:
        return CheckResult(None, "the far end did not run")
    text = ", ".join(f"{e:g}/255: {points(value)}" for e, value in zip(sizes, (near, far), strict=True))
    return CheckResult(near <= 0.01 and far <= 0.005, text)


def unbounded(context: CheckContext) -> CheckResult:
    left = accuracy_at(context, LARGEST[context.run.audit.norm])
    return CheckResult(None, "did not run") if left is None else CheckResult(left == 0, points(left))


def below_transfer(context: CheckContext) -> CheckResult:
    """The adaptive attack against every image made on another model. Images only transfer breaks must be rare."""
    others = [
        o
        for o in context.run.outcomes
        if o.step.name in ("fgsm", "pgd-20") and o.step.epsilon == context.run.audit.headline
    ]
    mine = [o for o in context.attacks(*GRADIENT_ATTACKS) if not o.step.warm]  # a warm start has seen the transfers
    if not others or not mine:
        return CheckResult(None, "transfer or the adaptive attack did not run")
    count = min(o.step.images for o in (*others, *mine))
    white = strongest(context.run, mine, count)
    transfers = torch.stack([accuracy(context.run, o)[:count] for o in others])
    best = transfers[transfers.mean(dim=1).argmin()]
    only = float(((transfers.amin(dim=0) < 0.5) & (white >= 0.5)).double().mean())
    holds = float((white - best).mean()) <= tolerance(white, best) and only <= max(0.01, 1 / count)
    text = f"adaptive {points(float(white.mean()))}, best transfer {points(float(best.mean()))}"
    return CheckResult(holds, f"{text}; only transfer: {points(only)}")


def below_black_box(context: CheckContext) -> CheckResult:
    black, mine = context.attacks(*BLACK_BOX), context.attacks(*GRADIENT_ATTACKS)
    if not black or not mine:
        return CheckResult(None, "Square did not run")
    count = min(o.step.images for o in (*black, *mine))
    white, square = strongest(context.run, mine, count), strongest(context.run, black, count)
    lower = float((white - torch.minimum(white, square)).mean())
    holds = float((white - square).mean()) <= tolerance(white, square)
    text = (
        f"white box {points(float(white.mean()))}, Square {points(float(square.mean()))}, lowers it by {points(lower)}"
    )
    return CheckResult(holds and lower <= 0.002, text, warn=holds)


def below_hard_label(context: CheckContext) -> CheckResult:
    """The nearest image that fools most draws: HopSkipJump's, against the white box's by bisection on epsilon."""
    labels = context.attacks("hopskipjump-queries")
    if not labels:
        return CheckResult(None, "HopSkipJump did not run")
    count = min(o.step.images for o in labels)
    hard = torch.full((count,), NEVER)
    for outcome in labels:
        away, right = torch.tensor(outcome.extra["nearest"])[:count].T
        hard = torch.minimum(hard, torch.where(right < 0.5, away, NEVER))
    right = context.run.clean(context.ours).right[:count] >= 0.5
    if not bool(right.any()):
        return CheckResult(None, f"none of {count} images is right at first for most draws")
    hard, white = hard[right], least_epsilons(context, count)[right]
    nearer = float((hard < white).double().mean())
    medians = ", ".join(
        f"{name} {float(distances.median()):g}/255" if float(distances.median()) < NEVER else f"{name} none"
        for name, distances in (("HopSkipJump", hard), ("white box", white))
    )
    text = f"median distance {medians}; HopSkipJump nearer on {points(nearer)} of the {len(hard)} images right at first"
    return CheckResult(nearer <= 0.05, text)


def least_epsilons(context: CheckContext, count: int) -> Tensor:
    """float32 [count], in 255ths: the least epsilon at which a gradient attack turns most draws, to one grey level.

    Bisected between what the audit's own attacks reached; images that share a middle are attacked together.
    """
    ours = context.ours
    low, high = torch.zeros(count), torch.full((count,), NEVER)
    high[context.run.clean(ours).right[:count] < 0.5] = 0
    for outcome in context.run.outcomes:
        if outcome.step.system == ours.name and outcome.step.name in GRADIENT_ATTACKS:
            fooled = accuracy(context.run, outcome)[:count] < 0.5
            some = high[: len(fooled)]
            some[fooled] = some[fooled].clamp(max=math.floor(outcome.step.epsilon + 1e-6))
    while bool((apart := high - low > 1).any()):
        middle = ((low + high) / 2).floor()
        for size in sorted(set(middle[apart].tolist())):
            at = ((middle == size) & apart).nonzero().flatten()
            fooled = fools_most_draws(context, at, size)
            high[at[fooled]], low[at[~fooled]] = size, size
    return high


def fools_most_draws(context: CheckContext, which: Tensor, size: float) -> Tensor:
    """bool: whether most draws fall for what ascent on the loss, and on the risk from there, makes of these images."""
    device, threat = context.run.candidates.device, context.threat(size)
    pixels, labels = context.run.data.pixels[which], context.run.data.labels[which]
    images, generator = as_floats(pixels, device), context.generator(f"least {size}")
    ascended = eot.attack(context.target, images, labels.to(device), threat, PROBE, generator).images
    refined = eot.attack(context.target, images, labels.to(device), threat, SHARPEN, generator, [ascended]).images
    moved = quantize_to_uint8(refined, pixels, threat.norm, threat.epsilon)
    return context.run.rights(context.ours, moved, labels) < 0.5


def above_noise(context: CheckContext) -> CheckResult:
    noise, mine = context.attacks("noise"), context.attacks(*GRADIENT_ATTACKS)
    if not noise or not mine:
        return CheckResult(None, "noise did not run")
    count = min(o.step.images for o in (*noise, *mine))
    white, random_corners = strongest(context.run, mine, count), strongest(context.run, noise, count)
    only = float(((random_corners < 0.5) & (white >= 0.5)).double().mean())
    return CheckResult(only <= 0.005, f"broken by random corners alone: {points(only)}")


def known_theta(context: CheckContext) -> CheckResult:
    """Knowing theta can only help, a theorem: the mean over drawn thetas of the accuracy left is a floor for ours."""
    rng = random.Random(f"known {context.run.audit.seed}")
    count = FIXED_DRAWS if context.full else 8
    rows = [accuracy_left(context, f"known {place}", known_draw(context, rng)) for place in range(count)]
    known = torch.stack(rows).mean(dim=0)
    secret = strongest(context.run, context.attacks(*GRADIENT_ATTACKS), context.count)
    few = ", ".join(f"{states}: {points(float(among(context, states, rng).mean()))}" for states in FEW_STATES)
    text = f"theta known {points(float(known.mean()))} ({count} thetas), secret {points(float(secret.mean()))}"
    return CheckResult(
        float((known - secret).mean()) <= tolerance(known, secret), f"{text}; one of so many states {few}"
    )


def among(context: CheckContext, count: int, rng: random.Random) -> Tensor:
    """float64 [n]: accuracy where the attacker knows that theta is one of so many drawn states."""
    used = list(context.ours.used)
    thetas = [draw_theta(context.ours.policy, rng) for _ in range(count)]
    rows = matrix(thetas, context.ours.policy.tickets)[:, used]
    draws = DrawSet(rows, torch.full((count,), 1 / count, dtype=torch.float64), exhaustive=True).to(
        context.run.candidates.device
    )
    return accuracy_left(context, f"among {count}", AttackTarget(context.target.members, draws))


def accuracy_left(context: CheckContext, name: str, target: AttackTarget) -> Tensor:
    """float64 [n]: accuracy of a target under the attack that knows it, on its own draws."""
    result = context.attack(PROBE, name, target)
    pixels = quantize_to_uint8(result.images, context.pixels, context.threat().norm, context.threat().epsilon)
    return 1 - failure(logits_of(target.members, pixels, context.run.candidates.device), context.labels, target.draws)


def baselines_present(context: CheckContext) -> CheckResult:
    names = [system.name for system in context.run.systems]
    there = {baselines.MEAN, baselines.BEST, baselines.COST} <= set(names)
    attacked = {o.step.system for o in context.run.outcomes if o.step.epsilon == context.run.audit.headline}
    missing = [name for name in names if name not in attacked and not context.run.audit.attacks]
    return CheckResult(there and not missing, f"{len(names) - 1} systems beside ours under the same attacks")


def no_masked_ticket(context: CheckContext) -> CheckResult:
    """PGD-20 against AutoAttack's APGD on each ticket: a wide gap is a masked gradient, FGSM above clean an overfit."""
    overfit, gaps = [], {}
    for index, member in enumerate(context.run.candidates.members[: context.run.candidates.tickets]):
        own = baselines.single(context.run.candidates, index)
        by_name = {
            o.step.name: context.run.scores(own, o).right for o in context.run.outcomes if o.step.system == own.name
        }
        if not {"fgsm", "pgd-20"} <= set(by_name):
            continue
        single_step, iterated = float(by_name["fgsm"].mean()), float(by_name["pgd-20"].mean())
        if single_step - iterated > 0.25 or single_step > float(context.run.clean(own).right.mean()) + 0.02:
            overfit.append(member.name)
        gaps[member.name] = float(by_name["pgd-20"][: context.count].mean()) - against_library(context, member)
    if not gaps:
        return CheckResult(None, "FGSM and PGD-20 did not both run")
    wide = [name for name, gap in gaps.items() if gap > max(0.1, 1.5 / context.count)]
    text = f"largest gap {points(max(gaps.values()))} on {context.count} images"
    if overfit:
        return CheckResult(False, f"catastrophic overfitting: {', '.join(overfit)}; {text}")
    return CheckResult(not wide, text + (f"; wide: {', '.join(wide)}" if wide else ""), warn=True)


def against_library(context: CheckContext, member: Member) -> float:
    """A ticket's accuracy under AutoAttack's untargeted APGD on the DLR loss."""
    alone = AttackTarget((member,), DrawSet(torch.ones(1, 1), torch.ones(1, dtype=torch.float64), exhaustive=True))
    standard = AutoAttackConfig("apgd-dlr" if context.run.library.classes[3:] else "apgd-ce", "mean-logits", 20)
    labels = context.labels.to(context.run.candidates.device)
    seed = seed_of("masked", context.run.audit.seed, member.name)
    attacked = library_attack(alone, context.images, labels, context.threat(), standard, seed)
    pixels = quantize_to_uint8(attacked, context.pixels, context.threat().norm, context.threat().epsilon)
    right = logits_of((member,), pixels, context.run.candidates.device)[0].argmax(dim=1) == context.labels
    return float(right.double().mean())


def no_label_leak(context: CheckContext) -> CheckResult:
    """FGSM with the true labels against FGSM with the predicted ones, mean over tickets (Kurakin et al., 2017)."""
    rows = []
    for member in context.target.members:
        with torch.no_grad():
            predicted = member(context.images).argmax(dim=1)
        one, other = (
            member_accuracy(context, member, labels) for labels in (context.labels.to(predicted.device), predicted)
        )
        rows.append(one - other)
    gap = torch.stack(rows).mean(dim=0)
    limit = max(0.02, 1 / context.count)
    return CheckResult(float(gap.mean()) <= limit, f"true labels leave {points(float(gap.mean()))} more")


def member_accuracy(context: CheckContext, member: Member, labels: Tensor) -> Tensor:
    attacked = fgsm(member, context.images, labels, context.threat())
    with torch.no_grad():
        return (member(attacked).argmax(dim=1).cpu() == context.labels).double()


def smooth_landscape(context: CheckContext) -> CheckResult:
    """Losses on a grid spanned by the gradient's sign and a random one: few points above what the attack reached."""
    side, count = (21, 16) if context.full else (11, 4)
    count = min(count, context.count)
    probe, loss = context.attack(PROBE, "probe"), LOSSES["mean-loss"]
    open_still = (probe.risk < CERTAIN).nonzero().flatten()[:count].cpu()  # on the others the attack has stopped
    if not len(open_still):
        return CheckResult(None, "the attack left no image to look at")
    reached_images, images, threat = probe.images[open_still], context.images[open_still], context.threat()
    labels, count = context.labels[open_still].to(context.run.candidates.device), len(open_still)
    stage, target = Stage(1.0, 0.0), context.target
    _, _, gradient = gradient_of(target, images, labels, loss, stage)
    noise = torch.randn(images.shape, generator=context.generator("landscape")).to(images)
    with torch.no_grad():
        reached = loss(target(reached_images), labels, target.draws, stage)
        above = []
        for a in torch.linspace(-1, 1, side).tolist():
            for b in torch.linspace(-1, 1, side).tolist():
                moved = images + threat.epsilon * (
                    a * steepest_direction(gradient, threat.norm) + b * steepest_direction(noise, threat.norm)
                )
                now = loss(target(project(moved, images, threat)), labels, target.draws, stage)
                above.append(now > reached * (1 + 1e-4) + 1e-4)
    share = float(torch.stack(above).double().mean())
    moves = jitter(context, images, labels)
    text = f"{points(share)} of {side}x{side} points for {count} images above the attack"
    return CheckResult(share <= 0.005 and moves <= 0.1, f"{text}; small random steps move the loss by {points(moves)}")


@torch.no_grad()
def jitter(context: CheckContext, images: Tensor, labels: Tensor) -> float:
    """How far the loss moves, relative to itself and at most 1, when every pixel does by up to half of 8/255: the mean
    over steps and images (Pintor et al., 2022, unstable predictions)."""
    loss, target, stage = LOSSES["mean-loss"], context.target, Stage(1.0, 0.0)
    generator, moves = context.generator("jitter"), []
    before = loss(target(images), labels, target.draws, stage)
    for _ in range(5 * NEIGHBOURS if context.full else NEIGHBOURS):
        noise = (torch.rand(images.shape, generator=generator) - 0.5).to(images) * 8 / 255
        after = loss(target((images + noise).clamp(0, 1)), labels, target.draws, stage)
        moves.append(((after - before).abs() / before.abs().clamp_min(1e-12)).clamp(max=1))
    return float(torch.stack(moves).mean())


def targeted_too(context: CheckContext) -> CheckResult:
    targeted, mine = context.attacks("apgd-t"), context.attacks(*GRADIENT_ATTACKS)
    if not targeted or not mine:
        return CheckResult(None, "the targeted attack did not run")
    count = min(o.step.images for o in (*targeted, *mine))
    white, aimed = strongest(context.run, mine, count), strongest(context.run, targeted, count)
    only = float(((aimed < 0.5) & (white >= 0.5)).double().mean())
    return CheckResult(only <= 0.02, f"broken by targets alone: {points(only)} of {count} images")


def output_range(context: CheckContext) -> CheckResult:
    """Logits, no probabilities, of a size that cross-entropy can tell apart; no temperature makes attacks better."""
    with torch.no_grad():
        logits = context.target(context.images)
        proxy = ExpectedLogits(context.target, "mean-logits")(context.images)
    shares = bool(((proxy.sum(dim=1) - 1).abs() < 1e-3).all()) and bool((proxy >= 0).all())
    largest = float(logits.abs().max())
    base = context.right(context.attack(PROBE, "probe").images)
    rows = {
        heat: context.right(context.attack(PROBE, f"heat {heat}", at_temperature(context.target, heat)).images)
        for heat in (0.1, 10.0)
    }
    gain = max(float((base - right).mean()) for right in rows.values())
    within = gain <= max(0.005, 1.5 / context.count)
    text = f"largest logit {largest:.1f}; temperature 0.1 and 10 lower accuracy by at most {points(max(0.0, gain))}"
    return CheckResult(not shares and largest <= 50 and within, text + ("; these are probabilities" if shares else ""))


def at_temperature(target: AttackTarget, factor: float) -> AttackTarget:
    members = tuple(replace(member, temperature=member.temperature * factor) for member in target.members)
    return AttackTarget(members, target.draws)


Row = tuple[int, str, str, bool, ProfileName, Callable[[CheckContext], CheckResult]]
ROWS: Final[tuple[Row, ...]] = (
    (
        9,
        "convergence",
        "the rescaled loss moves at most 0.05 in the last 10 steps on 95 % of images",
        False,
        "standard",
        convergence,
    ),
    (10, "steps doubled", "lowers accuracy by at most 0.5 points or the tolerance", True, "standard", more_steps),
    (
        11,
        "restarts",
        "the last doubling lowers accuracy by at most 0.5 points or 1 image",
        False,
        "standard",
        more_restarts,
    ),
    (
        12,
        "draws of the attacker",
        "1, 5, 20, exact: not weaker; from 1 to exact at most 5 points",
        False,
        "standard",
        more_draws,
    ),
    (
        13,
        "iterative below single-step",
        "PGD-20 at most FGSM + tolerance on each ticket",
        True,
        "smoke",
        iterative_below_single_step,
    ),
    (14, "monotone in epsilon", "accuracy does not rise by more than the tolerance", True, "smoke", monotone),
    (15, "reaches zero", "at most 1 % at 64/255 and 0.5 % at 128/255 (l2: 4 and 8)", True, "smoke", reaches_zero),
    (16, "unbounded", "0 % where every image is in reach of every other", True, "smoke", unbounded),
    (
        17,
        "white box below transfer",
        "by the tolerance; images only transfer breaks at most 1 % or 1 image",
        True,
        "smoke",
        below_transfer,
    ),
    (
        18,
        "white box below black box",
        "Square, no early stop, answers averaged; it lowers accuracy by at most 0.2 points (else a warning)",
        True,
        "standard",
        below_black_box,
    ),
    (
        19,
        "hard label",
        "HopSkipJump finds a nearer image than the white box on at most 5 % of those that are right at first",
        False,
        "standard",
        below_hard_label,
    ),
    (20, "random noise", "images that random corners break alone at most 0.5 %", True, "standard", above_noise),
    (21, "randomness fixed", "mean accuracy with theta known at most ours + tolerance", True, "standard", known_theta),
    (
        22,
        "deterministic baselines",
        "mean of all, best ticket, fixed of equal cost, R2S: same attacks",
        True,
        "smoke",
        baselines_present,
    ),
    (
        23,
        "masking of single tickets",
        "PGD-20 less APGD-DLR at most 10 points (warning); FGSM neither 25 points above PGD-20 nor above clean",
        True,
        "standard",
        no_masked_ticket,
    ),
    (
        24,
        "label leaking",
        "FGSM with true and predicted labels differ by at most 2 points or 1 image",
        False,
        "standard",
        no_label_leak,
    ),
    (
        25,
        "loss landscape",
        "at most 0.5 % of the grid's points above the attack's loss; small random steps move it by at most 10 %",
        False,
        "standard",
        smooth_landscape,
    ),
    (26, "targeted too", "images only targeted attacks break at most 2 %", False, "standard", targeted_too),
    (
        27,
        "output range",
        "logits within 50, no probabilities; other temperatures gain at most 0.5 points or 1 image",
        True,
        "standard",
        output_range,
    ),
)
CHECKS: Final = tuple(Check(i, name, text, hard, least, run) for i, name, text, hard, least, run in ROWS)
