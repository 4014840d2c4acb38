"""What a check could have seen: limits by hand, power by simulation, and that too few images pass nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as reference
from torch import Tensor

from service.audit.attack_runner import Outcome
from service.audit.checks import attacks, base
from service.audit.checks.base import CheckContext, TicketAlone, judged, right_at_first
from service.audit.checks.power import Effect, Share, worst
from service.audit.config import Audit
from tests.support.audit_models import Scaled, run_on, undefended


def half_right(count: int, more: int) -> tuple[Tensor, Tensor]:
    """Accuracies of two attacks, image by image: half are left, and the second attack breaks `more` of those."""
    first = torch.arange(count).remainder(2).double()
    second = first.clone()
    second[first.nonzero().flatten()[:more]] = 0
    return first, second


def test_an_effect_beyond_two_standard_errors_shows_on_few_images() -> None:
    """Six of 24: the standard error is 9 points. The old tolerance of two images let two of 24 pass as well."""
    effect = Effect.between(*half_right(24, 6))
    assert effect.value == pytest.approx(0.25)
    assert effect.error == pytest.approx(math.sqrt(0.25 * 0.75 / 23))
    assert effect.shows
    assert not Effect.between(*half_right(24, 2)).shows


def test_the_tolerance_is_two_standard_errors_alone() -> None:
    """Every image a twentieth lower, without scatter: two images of 24 would have hidden it (8.3 points)."""
    first = torch.full((24,), 0.5, dtype=torch.float64)
    assert Effect.between(first, first - 0.05).shows
    assert not Effect.between(first, first - 0.004).shows  # below what matters


@pytest.mark.parametrize("images", [24, 200, 500])
def test_an_effect_of_the_detectable_size_shows_in_four_of_five(images: int) -> None:
    """1,000 audits in which so many images are lost. A quarter of it shows seldom: the size is not merely large."""
    none = torch.zeros(images, dtype=torch.float64)
    size = Effect.between(none, none).detectable

    def power(lost: float) -> float:
        rows = torch.from_numpy((np.random.default_rng(images).random((1000, images)) < lost).astype(float))
        return sum(Effect.between(row, none).shows for row in rows) / 1000

    assert power(size) >= 0.75
    assert power(size / 4) <= 0.3


@pytest.mark.parametrize(("images", "limit"), [(24, 0.005), (200, 0.01), (500, 0.02)])
def test_a_count_shows_where_the_binomial_test_rejects(images: int, limit: float) -> None:
    for count in range(12):
        rejected = count > 0 and reference.binomtest(count, images, limit, alternative="greater").pvalue <= 0.025
        assert Share(count, images, limit).shows == rejected
    share = Share(0, images, limit)
    needed = next(k for k in range(images) if Share(k, images, limit).shows)
    assert reference.binom.sf(needed - 1, images, share.detectable) == pytest.approx(0.8, abs=1e-6)


def test_without_images_nothing_could_be_seen() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    assert Effect.between(none, none).detectable == 1
    assert Share.of(none > 0, 0.01).detectable == 1
    assert worst([Effect(0.1, 0.1, 50), Effect(0.05, 0.01, 50)]).value == 0.05


def outcome_of(result: base.CheckResult, context: CheckContext) -> dict[str, Any]:
    return base.evaluate_check(base.Check(1, "name", "criterion", True, "smoke", lambda _: result), context)


def test_a_check_that_sees_nothing_on_too_few_images_has_no_power(tmp_path: Path) -> None:
    """The old checks passed 24 images within a tolerance of 8.3 points."""
    context = CheckContext(run_on(undefended(), tmp_path, Audit("smoke", images=12), 12))
    few, many = Effect.between(*half_right(24, 1)), Effect.between(*half_right(200, 1))
    row = outcome_of(judged(few, "1 lower"), context)
    assert row["outcome"] == "no power"
    assert row["detectable"] == pytest.approx(few.detectable, abs=1e-6)
    assert f"could have seen {100 * few.detectable:.2f} % on 24 images right at first" in row["value"]
    assert outcome_of(judged(many, "1 lower"), context)["outcome"] == "pass"
    assert outcome_of(judged(Effect.between(*half_right(24, 9)), "9 lower"), context)["outcome"] == "fail"


def test_checks_attack_images_that_are_right_at_first(tmp_path: Path) -> None:
    run = run_on(undefended(), tmp_path, Audit("standard", images=120), 120)
    labels = run.data.labels.clone()
    labels[:5] = (labels[:5] + 1) % 10  # the first five become wrong
    run.data = replace(run.data, labels=labels)
    context = CheckContext(run)
    assert int(context.index.min()) >= 5
    assert context.count == int(right_at_first(run).sum()) < 120
    assert bool((context.right(context.images) >= 0.5).all())


def test_every_check_that_compares_attacks_says_what_it_could_have_seen(tmp_path: Path) -> None:
    """On a dozen images none of them passes."""
    audit = Audit("standard", attacks=("eot-mean-loss", "fgsm", "pgd-20", "noise"), epsilons=(4.0, 8.0), images=12)
    run = run_on(undefended(), tmp_path, audit, 12)
    run.attack()
    context = CheckContext(run)
    by_id = {check.id: check for check in attacks.CHECKS}
    for number in (10, 11, 13, 14, 15, 16, 17, 20, 23, 24, 27):
        row = base.evaluate_check(by_id[number], context)
        assert row["outcome"] == "no power", row
        assert 0.01 < row["detectable"] <= 1, row


def test_hop_skip_jump_without_its_queries_has_no_power(tmp_path: Path) -> None:
    """On 60 images with 20 queries each: "nearer on 0 %" would be no surprise."""
    audit = Audit("standard", attacks=("eot-mean-loss", "hopskipjump-queries"), images=6, epsilons=(8.0,))
    run = run_on(undefended(), tmp_path, audit, 6)
    ours = [step for step in run.steps if step.system == "tombola" and step.epsilon == 8]
    kept = {step.name: step for step in reversed(ours)}
    run.steps, run.costs = list(kept.values()), [1.0] * len(kept)
    run.attack()
    finding = attacks.below_hard_label(CheckContext(run))
    assert finding.ok
    assert finding.powerless


@pytest.mark.parametrize(("taken", "ok"), [(10, True), (17, False)])
def test_a_masked_ticket_shows_at_eight_points_of_two_hundred_images(
    taken: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PGD-20 leaves all of 200 images, and APGD-T takes some: 5 points pass, 8.5 do not. The old limit was 10 of 24."""
    context = CheckContext(run_on(undefended(), tmp_path, Audit("standard", images=4), 4))
    every = torch.ones(200, dtype=torch.float64)
    context.alone[0] = TicketAlone(torch.arange(200), every, every)
    monkeypatch.setattr(attacks, "attacked_alone", lambda _: [0])
    monkeypatch.setattr(attacks, "under_library", lambda *_: (torch.arange(200) >= taken).double())
    fgsm = next(step for step in context.run.steps if step.name == "fgsm")
    context.run.outcomes = [Outcome(fgsm, context.run.data.pixels, context.run.clean_logits, {}, {}, 0, 0.0)]
    finding = attacks.no_masked_ticket(context)
    assert finding.ok is ok
    assert finding.seen is not None
    assert 0.06 < finding.seen.detectable < 0.12


def test_a_ticket_whose_cross_entropy_is_saturated_is_masked(tmp_path: Path) -> None:
    """Logits of a thousand times the size: PGD-20 on cross-entropy has no gradient, APGD-T on DLR has."""
    run = run_on(Scaled(undefended(), 1e4), tmp_path, Audit("standard", images=40), 40)
    run.steps = [step for step in run.steps if step.system.startswith("ticket")]
    run.costs = [1.0] * len(run.steps)
    run.attack()
    finding = attacks.no_masked_ticket(CheckContext(run))
    assert finding.ok is False
    assert finding.warn
