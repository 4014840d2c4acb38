"""Checks 1 to 8: is what was evaluated the served model, by the right algebra, with chance that nobody steers?"""

import math
import random
import secrets
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_store.attacks import cross_entropy, random_start
from model_store.ensemble import calibrated
from model_store.library import Library
from model_store.policy import draw_theta, inclusion_probabilities, size_probabilities, states
from service.audit.attack_runner import fingerprint, largest_distance
from service.audit.attacks.autoattack import isolated_rng
from service.audit.attacks.eot import PgdConfig, gradient_of, gradients_of
from service.audit.attacks.losses import LOSSES, Stage
from service.audit.checks.base import Check, CheckContext, CheckResult, judged, points
from service.audit.checks.power import Effect
from service.audit.evaluation.draws import DrawSet
from service.audit.evaluation.members import AttackTarget, Member, as_floats, logits_of
from service.audit.evaluation.scoring import failure, scores
from service.audit.target import Target
from service.engine.errors import EngineRejected
from service.engine.factory import open_engine, precision_on_cpu
from service.settings import Settings

PROBE: Final = PgdConfig("mean-loss", steps=20, step=0.125, momentum=0.75)
STAGE: Final = Stage(scale=1.0, progress=0.0)
COMPARED: Final = 64  # images on which networks are compared
DIFFERENCED: Final = 32  # images of central differences, in float64
SAME: Final = 1e-5  # of the largest logit: float32 sums in another order
FOLLOWS: Final = 0.5  # of what 8 bits change, that the attacked network may be away from the engine
SIGMAS: Final = 5.0  # of a binomial count: a false alarm in less than a million


def feasible(context: CheckContext) -> CheckResult:
    over = max(
        (largest_distance(o, context.run.data.pixels) - o.step.threat.epsilon for o in context.run.outcomes),
        default=0.0,
    )
    kinds = {o.pixels.dtype for o in context.run.outcomes}
    return CheckResult(over <= 1e-6 and kinds <= {torch.uint8}, f"furthest outside by {max(0.0, over):.1e}, all uint8")


def deliverable(context: CheckContext) -> CheckResult:
    """The figures are on the grid by construction; this is what rounding cost the attacker."""
    result = context.attack(PROBE, "probe")
    with torch.no_grad():
        raw = 1 - failure(context.target(result.images), context.labels, context.target.draws)
    lost = Effect.between(context.right(result.images), raw.cpu(), 0.01)
    change = replace(lost, value=abs(lost.value))
    return judged(change, f"rounding to 8 bits moves accuracy by {points(change.value)}", warn=change.value <= 0.1)


def same_model(context: CheckContext) -> CheckResult:
    """Against the store's own calibrated tickets, and from `standard` on against the engine, in float32.

    A service that runs in bfloat16 or float16 is a warning, which says what that changes. One in 8 bits is audited so.
    """
    library, pixels = context.run.library, context.run.data.pixels[:COMPARED]
    if isinstance(library, Target):
        return CheckResult(None, "needs a library's stored tickets and the engine that serves them")
    if context.run.candidates.rounded_on is not None:
        return same_rounded_model(context, library, pixels)
    images, worst = as_floats(pixels, context.run.candidates.device), 0.0
    for member, ticket in zip(context.run.candidates.members, library.tickets, strict=False):
        with torch.no_grad():
            worst = max(worst, relative(member(images), calibrated(ticket, context.run.candidates.device)(images)))
    text = f"largest relative difference {worst:.1e} over {len(pixels)} images"
    if context.run.audit.profile == "smoke":
        return CheckResult(worst <= SAME, f"{text}; engine not compared")
    exact = engine_logits(
        library, pixels, Settings(state_dir=context.run.folder, threads=1, device="cpu", precision="float32")
    )
    if isinstance(exact, str):
        return CheckResult(worst <= SAME, f"{text}; engine {exact}")
    worst_of_engine = relative(exact, context.run.candidates.logits(pixels)[: len(exact)])
    text = f"{text}; engine {worst_of_engine:.1e}"
    if max(worst, worst_of_engine) > SAME:
        return CheckResult(False, text)
    effect = served_precision(context, library)
    return CheckResult(True, text) if effect is None else CheckResult(False, f"{text}; {effect}", warn=True)


@torch.no_grad()
def same_rounded_model(context: CheckContext, library: Library, pixels: Tensor) -> CheckResult:
    """In 8 bits: scores are the engine's own answers, and what is attacked has to follow them."""
    run, images = context.run, as_floats(pixels)
    served = run.candidates.logits(pixels)
    followed = logits_of(run.candidates.members, pixels, run.candidates.device)
    exact = served.clone()
    for index, ticket in enumerate(library.tickets):
        exact[index] = calibrated(ticket, run.candidates.device)(images)
    tickets = len(library.tickets)
    away, moved = (float((served - other)[:tickets].abs().mean()) for other in (followed, exact))
    before, after = (
        scores(logits, run.data.labels[: len(pixels)], run.scoring(context.ours)).right.mean()
        for logits in (exact, served)
    )
    text = (
        "served in 8 bits: attacked as rounded tickets with straight-through gradients, scored by the engine's own "
        f"answers. The attacked logits are {away:.1e} from these in the mean, float32's {moved:.1e}; rounding moves "
        f"accuracy by {100 * float(after - before):+.2f} points on {len(pixels)} clean images"
    )
    return CheckResult(away <= FOLLOWS * moved, text)


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max().clamp_min(1.0))


def engine_logits(library: Library, pixels: Tensor, settings: Settings) -> Tensor | str:
    """[tickets, N, classes] by an engine of these settings; or why it cannot be opened."""
    try:
        engine = open_engine(library, settings)
    except EngineRejected as error:
        return f"refused: {error!s:.80}"
    each = [engine.forward(index, pixels.numpy()) for index in range(len(library.tickets))]
    return torch.from_numpy(np.stack(each))


def served_precision(context: CheckContext, library: Library) -> str | None:
    """What the precision of the service changes: logits, and accuracy on clean and on attacked images.

    None where it serves in float32, which is what was audited.
    """
    run, device = context.run, context.run.candidates.device
    served_as = Settings(state_dir=run.folder, threads=1, device=str(device), precision=context.run.options.precision)
    name = "float16" if device.type == "cuda" else precision_on_cpu(served_as)
    if name == "float32":
        return None
    attacked = min(context.attacks(), key=lambda o: float(run.scores(context.ours, o).right.mean()), default=None)
    images = {"clean": run.data.pixels[:COMPARED]}
    if attacked is not None:
        images["attacked"] = attacked.pixels[:COMPARED]
    pixels = torch.cat(list(images.values()))
    served = engine_logits(library, pixels, served_as)
    if isinstance(served, str):
        return f"served in {name}: {served}"
    ours = run.candidates.logits(pixels)
    theirs = torch.cat([served, ours[len(served) :]])  # members beyond the tickets are not served
    sizes, changes = [len(part) for part in images.values()], []
    halves = (torch.split(logits, sizes, dim=1) for logits in (ours, theirs))
    for kind, size, exact, rounded in zip(images, sizes, *halves, strict=True):
        before, after = (
            scores(logits, run.data.labels[:size], run.scoring(context.ours)).right.mean()
            for logits in (exact, rounded)
        )
        changes.append(f"{100 * float(after - before):+.2f} points on {size} {kind} images")
    difference = f"logits within {relative(theirs, ours):.1e}, accuracy {', '.join(changes)}"
    return f"served in {name}, audited in float32: {difference}"


def no_side_effects(context: CheckContext) -> CheckResult:
    members = context.run.candidates.members
    same = fingerprint(members) == context.run.fingerprint
    training = sum(module.training for member in members for module in member.network.modules())
    gradients = sum(p.grad is not None for member in members for p in member.network.parameters())
    text = f"weights and statistics {'unchanged' if same else 'CHANGED'}, {training} modules in train mode"
    return CheckResult(same and not training and not gradients, f"{text}, {gradients} gradients left behind")


def start(context: CheckContext) -> Tensor:
    return random_start(context.images, context.threat(), context.generator("start"))


def no_zero_gradients(context: CheckContext) -> CheckResult:
    """Of the ensemble's loss, and of each member's own: one masked member is enough to hide."""
    point, labels = start(context), context.labels.to(context.run.candidates.device)
    crafting = context.crafting
    _, _, gradient = gradients_of(crafting, point, labels, LOSSES["mean-loss"], STAGE)
    zero = float((gradient.flatten(1).abs().amax(dim=1) == 0).double().mean())
    shares = {member.name: zero_share(member, point, labels) for member in crafting.members}
    worst = max(shares, key=lambda name: shares[name])
    text = f"{points(zero)} of the ensemble's, {points(shares[worst])} of {worst}'s"
    return CheckResult(zero <= 0.01 and shares[worst] <= 0.01, text)


def zero_share(member: Member, images: Tensor, labels: Tensor) -> float:
    with torch.enable_grad():
        point = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(member(point), labels).sum(), point)
    return float((gradient.flatten(1).abs().amax(dim=1) == 0).double().mean())


def right_gradients(context: CheckContext) -> CheckResult:
    """Central differences in float64, in the full direction of random signs, against autograd's."""
    if context.run.candidates.rounded_on is not None:
        return CheckResult(None, "8 bits: gradients pass straight through the rounding, and no difference shows that")
    target = as_float64(context.target)
    point, labels = (
        start(context)[:DIFFERENCED].double(),
        context.labels[:DIFFERENCED].to(context.run.candidates.device),
    )
    draws = 4
    _, _, gradient = gradient_of(target, point, labels, LOSSES["mean-loss"], STAGE)
    generator, good = context.generator("directions"), []
    for _ in range(draws):
        direction = torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
        ahead, behind = (loss_at(target, point + side * STEP * direction, labels) for side in (1, -1))
        slope = (ahead - behind) / (2 * STEP)
        expected = (gradient * direction).flatten(1).sum(dim=1)
        good.append((slope - expected).abs() <= 0.05 * expected.abs() + 1e-9)
    share = float(torch.stack(good).double().mean())
    return CheckResult(share >= 0.95, f"{points(share)} of {draws * len(point)} within 5 %")


STEP: Final = 1e-7  # small enough that few rectifiers switch in between; float64 keeps 9 digits of the loss


@torch.no_grad()
def loss_at(target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
    return LOSSES["mean-loss"](target(images), labels, target.draws, STAGE)


def as_float64(target: AttackTarget) -> AttackTarget:
    members = tuple(replace(member, network=deepcopy(member.network).double()) for member in target.members)
    return AttackTarget(members, target.draws)


def factored_is_sampled(context: CheckContext) -> CheckResult:
    """Against the plain way: draw theta, run its members, add up; as the service does it."""
    rng = random.Random(f"sampled {context.run.audit.seed}")
    used, count = list(context.ours.used), 2000
    exact = 1 - context.right(context.images)
    failed = torch.zeros(context.count, dtype=torch.float64)
    with torch.no_grad():
        own = context.target(context.images).cpu()
    if context.run.candidates.rounded_on is not None:  # the networks only follow what is scored
        own = context.run.candidates.logits(context.pixels)[used]
    for _ in range(count):
        members = draw_theta(context.ours.policy, rng).members
        total = sum((own[used.index(member)] for member in members), start=torch.zeros_like(own[0]))
        failed += (total.argmax(dim=1) != context.labels).double() / count
    error = (exact * (1 - exact) / count).sqrt()
    excess = float(((failed - exact).abs() - SIGMAS * error).max())
    cosine = sampled_cosine(context, rng) if context.run.audit.profile != "smoke" else None
    text = f"p within {SIGMAS:g} standard errors of 2,000 draws" if excess <= 1e-9 else f"p off by {excess:.4f} beyond"
    agree = cosine is None or cosine >= 0.95
    return CheckResult(excess <= 1e-9 and agree, f"{text}; gradients' cosine {cosine or 'not run'}")


def sampled_cosine(context: CheckContext, rng: random.Random) -> float:
    """The median over images of the cosine between the factored gradient and one of sampled draws, run one by one."""
    images, labels = start(context)[:4], context.labels[:4].to(context.run.candidates.device)
    _, _, exact = gradient_of(context.target, images, labels, LOSSES["mean-loss"], STAGE)
    total = torch.zeros_like(images)
    for _ in range(512 if context.full else 128):
        members = tuple(context.run.candidates.members[index] for index in draw_theta(context.ours.policy, rng).members)
        alone = AttackTarget(
            members, DrawSet(torch.ones(1, len(members)), torch.ones(1, dtype=torch.float64), exhaustive=True)
        )
        total += gradient_of(alone, images, labels, LOSSES["mean-loss"], STAGE)[2]
    return round(float(torch.cosine_similarity(exact.flatten(1), total.flatten(1)).median()), 4)


def independent_chance(context: CheckContext) -> CheckResult:
    policy, count = context.ours.policy, 100_000 if context.run.audit.profile != "smoke" else 10_000
    with isolated_rng(0):
        first = [draw_theta(policy, secrets.SystemRandom()) for _ in range(100)]
    with isolated_rng(0):
        second = [draw_theta(policy, secrets.SystemRandom()) for _ in range(100)]
    steered = first == second and states(policy) > 1
    rng = random.Random(f"law {context.run.audit.defender_seed}")
    thetas = [draw_theta(policy, rng) for _ in range(count)]
    sizes, members = Counter(len(t.members) for t in thetas), Counter(m for t in thetas for m in set(t.members))
    worst = max(
        *(off(sizes[n], count, p) for n, p in size_probabilities(policy).items()),
        *(off(members[m], count, p) for m, p in enumerate(inclusion_probabilities(policy))),
    )
    text = f"largest deviation {worst:.2f} standard errors over {count} draws"
    return CheckResult(worst <= SIGMAS and not steered, text + (", and a seed FIXES theta" if steered else ""))


def off(count_seen: int, count: int, p: float) -> float:
    spread = math.sqrt(count * p * (1 - p))
    if spread == 0:  # always or never drawn
        return 0.0 if count_seen == round(count * p) else math.inf
    return abs(count_seen - count * p) / spread


CHECKS: Final = (
    Check(1, "feasible set", "every image inside epsilon + 1e-6 and on the 8-bit grid", True, "smoke", feasible),
    Check(
        2,
        "deliverable",
        "rounding to 8 bits changes accuracy by at most 1 point or two standard errors",
        True,
        "smoke",
        deliverable,
    ),
    Check(3, "same model", "audit, store and service agree to 1e-5 of the largest logit", True, "smoke", same_model),
    Check(
        4,
        "no side effects",
        "weights and statistics unchanged, eval mode, no gradients left",
        True,
        "smoke",
        no_side_effects,
    ),
    Check(
        5,
        "zero gradients",
        "at most 1 % of the images, at a random start, for ensemble and members",
        True,
        "smoke",
        no_zero_gradients,
    ),
    Check(6, "right gradients", "central differences within 5 % on at least 95 %", True, "smoke", right_gradients),
    Check(
        7,
        "factored = sampled",
        "p within 5 standard errors; cosine of the gradients at least 0.95",
        True,
        "smoke",
        factored_is_sampled,
    ),
    Check(
        8,
        "independent chance",
        "seeding global generators fixes nothing; members and sizes follow the law",
        True,
        "smoke",
        independent_chance,
    ),
)
