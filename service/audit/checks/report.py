"""Checks 28 to 34: controls with known answers, and whether the report says what it must."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from model_store.attacks import Norm, ThreatModel
from service.audit.attack_runner import AuditRun, Outcome
from service.audit.attacks import arc, eot
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.eot import PgdConfig
from service.audit.checks.base import Check, CheckContext, CheckResult, judged, points
from service.audit.checks.model import PROBE
from service.audit.checks.power import Effect
from service.audit.epsilons import threat_model
from service.audit.evaluation.draws import DrawSet
from service.audit.evaluation.members import AttackTarget, Member
from service.audit.evaluation.pixel_grid import quantize_to_uint8


class Linear(nn.Module):
    """Two classes, logits +-w.x + b on images of any size: everything about it is known in closed form."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight.to(images) + self.bias
        return torch.stack([score, -score], dim=1) / 2


def linear_target(*members: Linear) -> AttackTarget:
    """Each member alone with equal probability."""
    count = len(members)
    draws = DrawSet(torch.eye(count), torch.full((count,), 1 / count, dtype=torch.float64), exhaustive=True)
    return AttackTarget(tuple(Member(f"linear {i}", member, 1.0) for i, member in enumerate(members)), draws)


def closed_form_error(norm: Norm, ascent: PgdConfig) -> float:
    """How far an attack's margin stays from m - epsilon times the dual norm of w. No image is broken and no pixel
    meets 0 or 1, so that nothing but the attack decides."""
    generator = torch.Generator().manual_seed(29)
    weight = torch.randn(3 * 4 * 4, generator=generator)
    images = 0.5 + 0.2 * (torch.rand(16, 3, 4, 4, generator=generator) - 0.5)
    model, threat = Linear(weight, 6.0 - float(weight.sum()) / 2), ThreatModel(norm, 0.01)
    labels = torch.zeros(16, dtype=torch.int64)
    result = eot.attack(linear_target(model), images, labels, threat, ascent, generator)
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    before, after = (scores_of(model, x) for x in (images, result.images))
    return float((after - (before - threat.epsilon * dual)).abs().max())


@torch.no_grad()
def scores_of(model: Linear, images: Tensor) -> Tensor:
    """How far class 0 leads class 1, [N]."""
    first, second = model.forward(images).unbind(dim=1)
    return first - second


def two_against_one_direction() -> tuple[AttackTarget, Tensor, Tensor, ThreatModel]:
    """Two linear members 120 degrees apart, each 0.9 epsilon away (l2): the counterexample of Dbouk and Shanbhag, 2022.

    Either can be fooled, but not along the mean of their gradients, which gains only half of epsilon on each.
    """
    threat = ThreatModel("l2", 0.1)
    first, second = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-0.5, math.sqrt(0.75), 0.0])
    members = [Linear(w, 0.9 * threat.epsilon - 0.5 * float(w.sum())) for w in (first, second)]
    return linear_target(*members), torch.full((1, 3, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64), threat


def controls(_: CheckContext) -> CheckResult:
    """The toy on which averaging fails; networks with masked gradients and without defence are in the test suite."""
    target, images, labels, threat = two_against_one_direction()
    generator = torch.Generator().manual_seed(28)
    averaged = float(eot.attack(target, images, labels, threat, PgdConfig("mean-loss", steps=50), generator).risk)
    one_by_one = float(arc.attack(target, images, labels, threat, ArcConfig(), generator)[1])
    text = f"risk {averaged:.1f} by averaged gradients, {one_by_one:.1f} by ARC"
    return CheckResult(averaged == 0 and one_by_one == 0.5, text)


def closed_form(_: CheckContext) -> CheckResult:
    schedules = (PgdConfig("mean-loss", steps=40), PgdConfig("mean-loss", steps=40, schedule="adaptive"))
    norms: tuple[Norm, ...] = ("linf", "l2")
    worst = max(closed_form_error(norm, ascent) for norm in norms for ascent in schedules)
    return CheckResult(worst <= 1e-4, f"largest error {worst:.1e}")


def pointwise_minimum(context: CheckContext) -> CheckResult:
    """The figure reported is the mean of the minima: below every single attack on the same images."""
    run = context.run
    robust = run.robust(context.ours, run.epsilons.headline, len(run.data)).right
    excess = max(
        (
            float((robust[: o.step.images] - run.scores(context.ours, o).right).max())
            for o in run.outcomes
            if within(run, o)
        ),
        default=0.0,
    )
    return CheckResult(excess <= 1e-9, f"mean of minima over {sum(within(run, o) for o in run.outcomes)} attacks")


def within(run: AuditRun, outcome: Outcome) -> bool:
    return outcome.step.epsilon <= run.epsilons.headline


def clean_accuracy(context: CheckContext) -> CheckResult:
    clean, robust = (
        context.run.clean(context.ours),
        context.run.robust(context.ours, context.run.epsilons.headline, len(context.run.data)),
    )
    below = bool((robust.right <= clean.right + 1e-12).all())
    text = (
        f"expected {points(float(clean.right.mean()))}, majority {points(float((clean.right > 0.5).double().mean()))}"
    )
    return CheckResult(
        below, f"{text}, no failing draw {points(1 - float(clean.any_wrong.double().mean()))}; none refused"
    )


def reproducible(context: CheckContext) -> CheckResult:
    """The cheapest gradient attack again, and from `standard` on with two more seeds."""
    mine = [
        o
        for o in context.run.outcomes
        if isinstance(o.step.settings, PgdConfig) and o.step.system == context.ours.name and not o.step.warm
    ]
    if not mine:
        return CheckResult(None, "no gradient attack ran")
    outcome = min(mine, key=lambda o: o.passes)
    again = context.run.run(outcome.step)
    pixels = quantize_to_uint8(
        again.images, context.run.data.pixels[: outcome.step.images], outcome.step.norm, outcome.step.threat.epsilon
    )
    same = torch.equal(pixels, outcome.pixels)
    if context.run.audit.profile == "smoke":
        return CheckResult(same, f"{outcome.step.name} repeated: {'identical' if same else 'DIFFERENT'} images")
    rights = [context.right(context.attack(replace(PROBE, steps=10), f"seed {n}").images) for n in range(3)]
    ordered = sorted(rights, key=lambda right: float(right.mean()))
    spread = Effect.between(ordered[-1], ordered[0])
    return judged(spread, f"identical images: {same}; three seeds spread {points(spread.value)}", holds=same)


def threat_model_stated(context: CheckContext) -> CheckResult:
    needed = {"goal", "norm", "epsilon", "pixels", "knowledge", "order", "queries", "compute"}
    filled = {name for name, text in threat_model(context.run.audit, context.run.epsilons).items() if text}
    return CheckResult(needed <= filled, f"{len(filled)} fields")


def data_hygiene(context: CheckContext) -> CheckResult:
    """Selection used other images: by the split they lie in, and by the digests in the library's claims."""
    entries = (*context.run.library.entries, *context.run.library.baseline_entries)
    chosen = {c.data.digest for entry in entries for c in entry.claims if c.data.split == "selection"}
    reused = context.run.data.digest in chosen
    if context.run.data.held_out:
        return CheckResult(
            not reused, f"images under test/ or made here; {len(chosen)} selection sets, none of them these"
        )
    return CheckResult(False, "the data does not say that no search has seen it", warn=not reused)


Row = tuple[int, str, str, Callable[[CheckContext], CheckResult]]
ROWS: Final[tuple[Row, ...]] = (
    (28, "positive controls", "two linear members: averaged gradients fail, ARC succeeds", controls),
    (29, "closed form", "a linear model's worst margin met to 1e-4, both norms and schedules", closed_form),
    (30, "mean of minima", "no attack is below the reported figure on any image", pointwise_minimum),
    (31, "clean accuracy", "the same definitions and images; robust at most clean", clean_accuracy),
    (
        32,
        "reproducible",
        "the same seed, the same images; three seeds within two standard errors",
        reproducible,
    ),
    (
        33,
        "threat model",
        "goal, norm, epsilon, pixels, knowledge, order, queries, compute are said",
        threat_model_stated,
    ),
    (34, "data hygiene", "audited images were never used to select", data_hygiene),
)
CHECKS: Final = tuple(Check(i, name, text, True, "smoke", run) for i, name, text, run in ROWS)
