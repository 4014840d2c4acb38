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
from service.audit.attacks.autoattack import AutoAttackConfig, ExpectedLogits, Method
from service.audit.attacks.autoattack import attack as library_attack
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.attacks.eot import gradient_of
from service.audit.attacks.losses import LOSSES, Stage
from service.audit.attacks.simple import SingleModelPgd, attack_member
from service.audit.checks.base import Check, CheckContext, CheckResult, TicketAlone, judged, points, right_at_first
from service.audit.checks.model import PROBE
from service.audit.checks.power import Effect, Share, worst
from service.audit.config import ATTACKS, ProfileName
from service.audit.evaluation.draws import DrawSet
from service.audit.evaluation.members import AttackTarget, Member, as_floats, logits_of
from service.audit.evaluation.pixel_grid import quantize_to_uint8
from service.audit.evaluation.scoring import CERTAIN, failure, pointwise_worst
from service.audit.profiles import refine
from service.audit.secrecy import read_secrecy

GRADIENT_ATTACKS: Final = tuple(name for name in ATTACKS if name.startswith(("eot", "paper", "mora")))
BLACK_BOX: Final = ("square", "square-queries")
FEW_STATES: Final = (4, 16, 256)  # chance switched on again, step by step
NEIGHBOURS: Final = 20
NEVER: Final = 256.0  # of a distance in 255ths: not even the whole range of pixels
SHARPEN: Final = refine(10)
CONVERGED: Final = 0.95  # of the images
MASKS: Final = 0.05  # of accuracy, that a sampled draw a step leaves more than all states
MASKED: Final = 0.06  # of accuracy between PGD-20 and APGD-T: sound networks lose 2 to 4 points on RobustBench
OVERFIT: Final = 0.25  # of all images, that FGSM leaves more than PGD-20: it climbs a slope that is not there
HEATS: Final = (0.1, 10.0)  # temperatures that cross-entropy is tried at
LARGEST_LEAD: Final = 50.0  # of one logit over the next: the other classes' gradient is exp(-50), far from float32's 0
HEATED: Final = replace(PROBE, steps=10)  # the figure has these temperatures already: another start of them
PROBES_ENOUGH: Final = 5_000  # queries of each image that Square and HopSkipJump have in the literature
HARD_LABEL_IMAGES: Final = 50


def accuracy(run: AuditRun, outcome: Outcome) -> Tensor:
    """float64 [n]: ours under one attack's images."""
    return run.scores(run.systems[0], outcome).right


def strongest(run: AuditRun, outcomes: list[Outcome], index: Tensor) -> Tensor:
    """float64 [len(index)]: ours under the worst of these on these images, which they must cover."""
    attempts = [run.clean(run.systems[0]).pick(index)]
    attempts += [run.scores(run.systems[0], o).pick(index) for o in outcomes if o.step.images > int(index.max())]
    return pointwise_worst(attempts).right


def images_of_all(context: CheckContext, outcomes: list[Outcome]) -> Tensor:
    """int64: the images right at first that every one of these attacks was run on."""
    count = min(o.step.images for o in outcomes)
    return right_at_first(context.run)[:count].nonzero().flatten()


def convergence(context: CheckContext) -> CheckResult:
    """Each attack of the figure, the smoothed risk among them. The paper's is run as it is worded, not as it should."""
    shares = {
        o.step.id: o.extra["converged"]
        for o in context.attacks(*GRADIENT_ATTACKS)
        if "converged" in o.extra and o.step.name != "paper-eot"
    }
    if not shares:
        return CheckResult(None, "no gradient attack ran")
    least = min(shares, key=lambda step: shares[step])
    short = sum(share < CONVERGED for share in shares.values())
    text = f"{points(shares[least])} of the images in {least}; {short} of {len(shares)} attacks are short"
    return CheckResult(short == 0, text)


def more_steps(context: CheckContext) -> CheckResult:
    once, twice = (
        context.right(context.attack(replace(PROBE, steps=n), "probe").images) for n in (PROBE.steps, 2 * PROBE.steps)
    )
    gained = Effect.between(once, twice)
    return judged(gained, f"{PROBE.steps} to {2 * PROBE.steps} steps: {points(gained.value)} lower")


def rounding_in_attacks(context: CheckContext) -> CheckResult:
    """The same attack, from the same start, crafted as this audit crafts and in float32: what the former loses."""
    if context.run.crafted_in == "float32":
        return CheckResult(None, "attacks were crafted in float32")
    crafted = context.right(context.attack(PROBE, "probe").images)
    exact = context.right(context.attack(PROBE, "probe", context.target).images)
    lost = Effect.between(crafted, exact)
    return judged(lost, f"crafted in {context.run.crafted_in} leaves {points(lost.value)} more than in float32")


def more_restarts(context: CheckContext) -> CheckResult:
    counts = (1, 5, 10) if context.full else (1, 2)
    starts = [
        context.right(context.attack(PROBE, name).images) for name in ("probe", *map(str, range(2, counts[-1] + 1)))
    ]
    rights = [torch.stack(starts[:n]).amin(dim=0) for n in counts]
    text = ", ".join(f"{n}: {points(float(right.mean()))}" for n, right in zip(counts, rights, strict=True))
    return judged(Effect.between(rights[-2], rights[-1]), text)


def more_draws(context: CheckContext) -> CheckResult:
    """An attacker who samples m draws for each step, against the factored one; all scored exactly."""
    counts = (1, 5, 20) if context.full else (1, 5)
    rights = [context.right(sampled_attack(context, m)) for m in counts] + [
        context.right(context.attack(PROBE, "probe").images)
    ]
    means = [float(value.mean()) for value in rights]
    text = ", ".join(f"{m}: {points(value)}" for m, value in zip((*map(str, counts), "exact"), means, strict=True))
    weaker = worst([Effect.between(after, before) for before, after in itertools.pairwise(rights)])
    masks = Effect.between(rights[0], rights[-1], MASKS).shows
    return judged(weaker, text + ("; randomness masks gradients" if masks else ""), holds=not masks)


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
    members = tuple(context.run.crafting.members[index] for index in draw_theta(context.ours.policy, rng).members)
    return AttackTarget(members, DrawSet.single(len(members), context.run.candidates.device))


def iterative_below_single_step(context: CheckContext) -> CheckResult:
    rows = {}
    for place in attacked_alone(context):
        alone = ticket_alone(context, place)
        rows[place] = Effect.between(alone.iterated, alone.single_step)
    if not rows:
        return CheckResult(None, "FGSM and PGD-20 did not both run")
    highest = worst(list(rows.values()))
    name = next(context.run.candidates.names[place] for place, effect in rows.items() if effect is highest)
    return judged(highest, f"{len(rows)} tickets; closest: {name}, PGD-20 {points(highest.value)} above FGSM")


def attacked_alone(context: CheckContext) -> list[int]:
    """The tickets on which the audit ran both FGSM and PGD-20."""
    ran = {(o.step.system, o.step.name) for o in context.run.outcomes}
    names = [baselines.single(context.run.candidates, place).name for place in range(context.run.candidates.tickets)]
    return [place for place, name in enumerate(names) if {(name, "fgsm"), (name, "pgd-20")} <= ran]


def ticket_alone(context: CheckContext, place: int) -> TicketAlone:
    """The audit's own FGSM and PGD-20, on as many images as checks look at. Remembered."""
    if place not in context.alone:
        run, member = context.run, context.run.crafting.members[place]
        own = baselines.single(run.candidates, place)
        index = right_at_first(run, own).nonzero().flatten()[: context.profile.check_images]
        images = as_floats(run.data.pixels[index], run.candidates.device)
        labels = run.data.labels[index].to(run.candidates.device)
        rights = []
        for steps in (0, 20):
            settings, generator = SingleModelPgd(steps=steps), context.generator(f"alone {member.name} {steps}")
            args = (member, images, labels, context.threat(), settings, generator)
            rights.append(reads_rightly(context, place, index, attack_member(*args, threads=run.candidates.threads)))
        context.alone[place] = TicketAlone(index, *rights)
    return context.alone[place]


def reads_rightly(context: CheckContext, place: int, index: Tensor, images: Tensor) -> Tensor:
    """float64: whether one ticket reads these images rightly, on the grid of pixels."""
    run, threat = context.run, context.threat()
    moved = quantize_to_uint8(images, run.data.pixels[index], threat.norm, threat.epsilon)
    logits = logits_of((run.candidates.members[place],), moved, run.candidates.device)[0]
    return (logits.argmax(dim=1) == run.data.labels[index]).double()


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
    for (_, before), (_, after) in itertools.pairwise(curve):  # on the images of both that are right at first
        count = min(len(before), len(after))
        right = right_at_first(context.run)[:count]
        rises.append(Effect.between(after[:count][right], before[:count][right]))
    text = ", ".join(f"{epsilon:g}: {points(float(right.mean()))}" for epsilon, right in curve)
    return judged(worst(rises), text)


def left_at(context: CheckContext, epsilon: float) -> Tensor | None:
    """float64: what is left, at this epsilon, of the images right at first; None where the attack did not run."""
    outcomes = context.attacks("eot-mean-loss", epsilon=epsilon)
    if not outcomes:
        return None
    return accuracy(context.run, outcomes[0])[images_of_all(context, outcomes[:1])]


def reaches_zero(context: CheckContext) -> CheckResult:
    sizes = context.run.epsilons.far
    near, far = (left_at(context, size) for size in sizes)
    if near is None or far is None:
        return CheckResult(None, "the far end did not run")
    text = ", ".join(f"{e:g}/255: {points(mean_of(left))}" for e, left in zip(sizes, (near, far), strict=True))
    holds = mean_of(near) <= 0.01 and mean_of(far) <= 0.005
    return judged(Share.of(far >= 0.5, 0.0), text, holds=holds)


def mean_of(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def unbounded(context: CheckContext) -> CheckResult:
    left = left_at(context, context.run.epsilons.largest)
    if left is None:
        return CheckResult(None, "did not run")
    return judged(Share.of(left > 0, 0.0), points(mean_of(left)))


def below_transfer(context: CheckContext) -> CheckResult:
    """The adaptive attack against every image made on another model. Images only transfer breaks must be rare."""
    others = [
        o
        for o in context.run.outcomes
        if o.step.name in ("fgsm", "pgd-20") and o.step.epsilon == context.run.epsilons.headline
    ]
    mine = [o for o in context.attacks(*GRADIENT_ATTACKS) if not o.step.warm]  # a warm start has seen the transfers
    if not others or not mine:
        return CheckResult(None, "transfer or the adaptive attack did not run")
    index = images_of_all(context, [*others, *mine])
    if not len(index):
        return CheckResult(None, "no image is right at first")
    white = strongest(context.run, mine, index)
    transfers = torch.stack([accuracy(context.run, o)[index] for o in others])
    best = transfers[transfers.mean(dim=1).argmin()]
    only = Share.of((transfers.amin(dim=0) < 0.5) & (white >= 0.5), 0.01)
    text = f"adaptive {points(float(white.mean()))}, best transfer {points(float(best.mean()))}"
    weaker = Effect.between(white, best)
    return judged(only, f"{text}; only transfer: {points(only.value)}", holds=not weaker.shows)


def below_black_box(context: CheckContext) -> CheckResult:
    black, mine = context.attacks(*BLACK_BOX), context.attacks(*GRADIENT_ATTACKS)
    if not black or not mine:
        return CheckResult(None, "Square did not run")
    widest = max(o.step.images for o in black)  # those on fewer images would leave too few to judge
    index = images_of_all(context, [*(o for o in black if o.step.images == widest), *mine])
    if not len(index):
        return CheckResult(None, "no image is right at first")
    white, square = strongest(context.run, mine, index), strongest(context.run, black, index)
    weaker, lower = Effect.between(white, square), Effect.between(white, torch.minimum(white, square), 0.002)
    text = (
        f"white box {points(float(white.mean()))}, Square {points(float(square.mean()))}, "
        f"lowers it by {points(lower.value)}"
    )
    return judged(lower, text, holds=not weaker.shows, warn=not weaker.shows)


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
    medians = ", ".join(
        f"{name} {float(distances.median()):g}/255" if float(distances.median()) < NEVER else f"{name} none"
        for name, distances in (("HopSkipJump", hard), ("white box", white))
    )
    share = Share.of(hard < white, 0.05)
    probes = max(o.step.settings.probes for o in labels if isinstance(o.step.settings, QueryAttackConfig))
    text = f"median distance {medians}; HopSkipJump nearer on {points(share.value)} with {probes} probes"
    few = probes < PROBES_ENOUGH
    return judged(share, text, enough=len(hard) + 1 if few and not share.shows else HARD_LABEL_IMAGES)


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
    ascended = eot.attack(context.crafting, images, labels.to(device), threat, PROBE, generator).images
    refined = eot.attack(context.crafting, images, labels.to(device), threat, SHARPEN, generator, [ascended]).images
    moved = quantize_to_uint8(refined, pixels, threat.norm, threat.epsilon)
    return context.run.rights(context.ours, moved, labels) < 0.5


def broken_alone(context: CheckContext, attack: str, name: str, limit: float) -> CheckResult:
    """The share of images that one attack breaks and no gradient attack does. Gradients should miss few of them."""
    others, mine = context.attacks(attack), context.attacks(*GRADIENT_ATTACKS)
    if not others or not mine:
        return CheckResult(None, f"{attack} or the gradient attacks did not run")
    index = images_of_all(context, [*others, *mine])
    if not len(index):
        return CheckResult(None, "no image is right at first")
    white, other = strongest(context.run, mine, index), strongest(context.run, others, index)
    only = Share.of((other < 0.5) & (white >= 0.5), limit)
    return judged(only, f"broken by {name} alone: {points(only.value)}")


def above_noise(context: CheckContext) -> CheckResult:
    return broken_alone(context, "noise", "random corners", 0.005)


def known_theta(context: CheckContext) -> CheckResult:
    """Knowing theta can only help, a theorem: the same attacks leave known thetas no more than the secret one."""
    reading = read_secrecy(context.run)
    if reading is None:
        return CheckResult(None, "nothing is secret, or the shared attacks did not run")
    right = right_at_first(context.run)[: len(reading.secret)]
    known, secret = reading.known[:, right], reading.secret[right]
    above = Effect.between(known.mean(dim=0), secret)
    scatter = float(known.mean(dim=1).std()) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    above = replace(above, error=math.hypot(above.error, scatter))
    text = f"theta known {points(mean_of(known))} ({len(known)} thetas), secret {points(mean_of(secret))}"
    if context.full:
        rng = random.Random(f"known {context.run.audit.seed}")
        few = ", ".join(f"{states}: {points(float(among(context, states, rng).mean()))}" for states in FEW_STATES)
        text += f"; one of so many states {few}"
    return judged(above, text)


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
    logits = logits_of(target.members, pixels, context.run.candidates.device)
    return 1 - failure(logits, context.labels, target.draws).cpu()


def baselines_present(context: CheckContext) -> CheckResult:
    names = [system.name for system in context.run.systems]
    there = {baselines.MEAN, baselines.BEST, baselines.COST} <= set(names)
    attacked = {o.step.system for o in context.run.outcomes if o.step.epsilon == context.run.epsilons.headline}
    missing = [name for name in names if name not in attacked and not context.run.audit.attacks]
    return CheckResult(there and not missing, f"{len(names) - 1} systems beside ours under the same attacks")


def no_masked_ticket(context: CheckContext) -> CheckResult:
    """PGD-20 against AutoAttack's targeted APGD on each ticket: a wide gap is a masked gradient, FGSM above clean an
    overfit."""
    overfit, gaps, run = [], {}, context.run
    for place in attacked_alone(context):
        name, own = run.candidates.names[place], baselines.single(run.candidates, place)
        alone = ticket_alone(context, place)
        outcome = next(o for o in run.outcomes if o.step.system == own.name and o.step.name == "fgsm")
        above_clean = float(run.scores(own, outcome).right.mean() - run.clean(own).right[: outcome.step.images].mean())
        wrong_slope = mean_of(alone.single_step - alone.iterated) * float(run.clean(own).right.mean())
        if wrong_slope > OVERFIT or above_clean > 0.02:
            overfit.append(name)
        gaps[name] = gap_to_library(context, place, alone)
    if not gaps:
        return CheckResult(None, "FGSM and PGD-20 did not both run")
    widest = worst(list(gaps.values()))
    name = next(name for name, gap in gaps.items() if gap is widest)
    text = f"AutoAttack's APGD-T leaves {points(widest.value)} less than PGD-20 to {name}, the widest gap"
    if overfit:
        return CheckResult(False, f"catastrophic overfitting: {', '.join(overfit)}; {text}")
    return judged(widest, text, warn=True)


def gap_to_library(context: CheckContext, place: int, alone: TicketAlone) -> Effect:
    """How much AutoAttack's targeted APGD takes from what PGD-20 left to one ticket, of the images right at first."""
    after, left = alone.iterated.clone(), (alone.iterated >= 0.5).nonzero().flatten()
    if len(left):
        after[left] = under_library(context, place, alone.index[left])
    return Effect.between(alone.iterated, after, MASKED)


def under_library(context: CheckContext, place: int, index: Tensor) -> Tensor:
    """float64: whether one ticket still reads these images rightly under APGD-T; on CE with fewer than four classes."""
    device, data, member = context.run.candidates.device, context.run.data, context.run.crafting.members[place]
    target = AttackTarget((member,), DrawSet.single(1, device))
    classes = len(context.run.library.classes)
    method: Method = "apgd-t" if classes > 3 else "apgd-ce"
    standard = AutoAttackConfig(method, "mean-logits", 20, targets=min(3, classes - 1))
    images, labels = as_floats(data.pixels[index], device), data.labels[index].to(device)
    seed = seed_of("masked", context.run.audit.seed, member.name)
    return reads_rightly(
        context, place, index, library_attack(target, images, labels, context.threat(), standard, seed)
    )


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
    more = Effect.between(gap, torch.zeros_like(gap), 0.02)
    return judged(more, f"true labels leave {points(more.value)} more")


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
    return broken_alone(context, "apgd-t", "targets", 0.02)


def output_range(context: CheckContext) -> CheckResult:
    """Logits, no probabilities, whose classes cross-entropy can tell apart; no temperature lowers the figure.

    What all logits of an image share says nothing, as softmax takes no notice of it: only leads between classes count.
    """
    with torch.no_grad():
        logits = context.target(context.images)
        proxy = ExpectedLogits(context.target, "mean-logits")(context.images)
    shares = bool(((proxy.sum(dim=1) - 1).abs() < 1e-3).all()) and bool((proxy >= 0).all())
    first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    lead = float((first - second).max())
    figure = context.run.robust(context.ours, context.run.epsilons.headline, len(context.run.data)).right[context.index]
    gains = []
    for heat in HEATS:
        heated = context.attack(HEATED, f"heat {heat}", at_temperature(context.crafting, heat)).images
        gains.append(Effect.between(figure, torch.minimum(figure, context.right(heated))))
    gain = worst(gains)
    text = f"largest lead of a class {lead:.1f}; temperatures {HEATS[0]:g} and {HEATS[1]:g} lower the figure"
    text += f" by at most {points(max(0.0, gain.value))}"
    return judged(
        gain, text + ("; these are probabilities" if shares else ""), holds=not shares and lead <= LARGEST_LEAD
    )


def at_temperature(target: AttackTarget, factor: float) -> AttackTarget:
    members = tuple(replace(member, temperature=member.temperature * factor) for member in target.members)
    return AttackTarget(members, target.draws)


Row = tuple[int, str, str, bool, ProfileName, Callable[[CheckContext], CheckResult]]
ROWS: Final[tuple[Row, ...]] = (
    (
        9,
        "convergence",
        "each attack of the figure: its rescaled aim moves at most 0.05 in the last 10 steps on 95 % of images",
        False,
        "standard",
        convergence,
    ),
    (10, "steps doubled", "lowers accuracy by at most 0.5 points or two standard errors", True, "standard", more_steps),
    (
        11,
        "restarts",
        "the last doubling lowers accuracy by at most 0.5 points or two standard errors",
        False,
        "standard",
        more_restarts,
    ),
    (
        12,
        "draws of the attacker",
        "1, 5, in full 20, exact: not weaker; from 1 to exact at most 5 points",
        False,
        "standard",
        more_draws,
    ),
    (
        13,
        "iterative below single-step",
        "PGD-20 at most 0.5 points or two standard errors above FGSM on each ticket",
        True,
        "smoke",
        iterative_below_single_step,
    ),
    (14, "monotone in epsilon", "accuracy rises by at most 0.5 points or two standard errors", True, "smoke", monotone),
    (
        15,
        "reaches zero",
        "at most 1 % at 64/255 and 0.5 % at 128/255 (l2: 4 and 8, by size of the pictures)",
        True,
        "smoke",
        reaches_zero,
    ),
    (16, "unbounded", "0 % where every image is in reach of every other", True, "smoke", unbounded),
    (
        17,
        "white box below transfer",
        "transfer not lower by two standard errors; images only transfer breaks at most 1 %",
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
    (
        21,
        "randomness fixed",
        "mean accuracy with theta known at most 0.5 points or two standard errors above ours",
        True,
        "standard",
        known_theta,
    ),
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
        "PGD-20 less APGD-T at most 6 points (warning); FGSM neither 25 points above PGD-20 nor above clean",
        True,
        "standard",
        no_masked_ticket,
    ),
    (
        24,
        "label leaking",
        "FGSM with true and predicted labels differ by at most 2 points or two standard errors",
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
        "leads of classes within 50, no probabilities; no temperature of cross-entropy gains 0.5 points",
        True,
        "standard",
        output_range,
    ),
)
ROUNDING: Final = Check(
    36,
    "rounding in attacks",
    "crafted in bfloat16 leaves at most 0.5 points or two standard errors more than in float32",
    True,
    "standard",
    rounding_in_attacks,
)
CHECKS: Final = tuple(Check(i, name, text, hard, least, run) for i, name, text, hard, least, run in ROWS)
