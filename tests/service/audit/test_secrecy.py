"""What a secret is worth: a gap that is known by hand, and the same attacks on either side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model_store.policy import Policy
from service.audit.attack_runner import AuditRun
from service.audit.checks import attacks
from service.audit.checks.base import CheckContext
from service.audit.config import Audit
from service.audit.evaluation.members import CandidateSet, Member
from service.audit.profiles import PROFILES, SHARED
from service.audit.report.formats import figures_by_name, to_markdown
from service.audit.report.markdown_report import document_section
from service.audit.report.summary import FIXED_DRAW, comparisons, secrecy_part, summarize
from service.audit.report.verdicts import has_figures
from service.audit.secrecy import SecrecyReading, read_secrecy
from service.audit.stats import crossed_difference, paired_difference
from tests.support.audit_models import faint_digits, run_on, tiny, undefended

GREY = 128 / 255


class HalfPlane(nn.Module):
    """Class 0 as long as `side` times the mean of the image lies above the boundary, else class 1."""

    def __init__(self, side: float, boundary: float) -> None:
        super().__init__()
        self.side, self.boundary = side, boundary

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        lead = self.side * (images.flatten(1).mean(dim=1) - GREY) - self.boundary
        return torch.stack([lead, -lead, *[torch.full_like(lead, -9)] * 8], dim=1) * 50


def matching_pennies(folder: Path) -> AuditRun:
    """Grey images; each member alone is fooled by going one way, and by going the other way it is not."""
    reach = -4 / 255
    library = tiny(folder / "library", ("resnet18",), (0.5, 0.4))
    members = tuple(Member(str(side), HalfPlane(side, reach), 1.0) for side in (1.0, -1.0))
    candidates = CandidateSet(members, 2, ("resnet18",) * 2, Policy.switching([0, 1], 2), torch.device("cpu"))
    data = faint_digits(6)
    data = replace(data, pixels=torch.full_like(data.pixels, 128), labels=torch.zeros_like(data.labels))
    audit = Audit("smoke", images=6, epsilons=(8.0,), attacks=("eot-mean-loss", "eot-risk"))
    return AuditRun(folder / "run", audit, library, data, candidates=candidates)


def test_matching_pennies_are_worth_one_half(tmp_path: Path) -> None:
    """With theta secret the attacker loses one of two draws; with theta known he wins always."""
    run = matching_pennies(tmp_path)
    run.attack()
    reading = read_secrecy(run)
    assert reading is not None
    assert reading.secret.tolist() == [0.5] * 6
    assert reading.known.shape == (PROFILES["smoke"].thetas, 6)
    assert bool((reading.known == 0).all())
    part = secrecy_part(run)
    assert part is not None
    assert (part.difference.value, part.thetas, part.images) == (0.5, PROFILES["smoke"].thetas, 6)
    assert attacks.known_theta(CheckContext(run)).ok


def test_known_and_secret_theta_face_the_same_attacks(tmp_path: Path) -> None:
    """The old check attacked known thetas by 20 steps on the loss alone, and the secret one by everything."""
    library = tiny(tmp_path / "library")
    run = AuditRun(tmp_path / "run", Audit("standard"), library, faint_digits(4))
    headline = [step for step in run.steps if step.epsilon == 8]

    def faced(system: str) -> set[Any]:
        steps = [step for step in headline if step.system == system and step.stage <= SHARED]
        return {(step.name, step.settings, step.stage, step.warm) for step in steps}

    assert len(run.known) >= 16
    assert all(faced(theta.name) == faced("tombola") for theta in run.known)
    assert {len(theta.used) for theta in run.known} >= {1, 2}
    thetas = {theta.name for theta in run.known}
    assert {step.images for step in headline if step.system in thetas} == {PROFILES["standard"].theta_images}


def test_both_sides_of_the_reading_are_on_the_images_where_thetas_were_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROFILES, "smoke", replace(PROFILES["smoke"], theta_images=4))
    run = matching_pennies(tmp_path)
    run.attack()
    reading = read_secrecy(run)
    assert reading is not None
    assert (reading.secret.shape, reading.known.shape) == ((4,), (PROFILES["smoke"].thetas, 4))
    assert reading.difference.value == 0.5
    fixed = next(row for row in comparisons(run) if row.against == FIXED_DRAW)
    assert fixed.robust.value == 0.5


def test_a_secret_that_leaves_less_than_a_known_theta_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong way round, as the published report had it: 34.9 against 32.6."""
    context = CheckContext(run_on(undefended(), tmp_path, Audit("standard", images=12), 12))
    rng = np.random.default_rng(0)
    secret = torch.from_numpy((rng.random(12) < 0.3).astype(float))
    reading = SecrecyReading(secret, torch.ones(16, 12, dtype=torch.float64))
    monkeypatch.setattr(attacks, "read_secrecy", lambda _: reading)
    assert attacks.known_theta(context).ok is False


def test_a_law_of_one_state_has_no_secret(tmp_path: Path) -> None:
    run = run_on(undefended(), tmp_path, Audit("standard", images=4), 4)
    assert run.known == []
    assert read_secrecy(run) is None
    assert secrecy_part(run) is None


def test_the_interval_has_the_scatter_of_images_and_of_thetas() -> None:
    """Without scatter among thetas it is the paired bootstrap's; with it, wider than either alone."""
    rng = np.random.default_rng(1)
    first, second = rng.random(150), rng.random(150)
    paired = paired_difference(first, second)
    crossed = crossed_difference(first, np.tile(second, (16, 1)))
    assert crossed.value == pytest.approx(paired.value)
    assert crossed.high - crossed.low == pytest.approx(paired.high - paired.low, rel=0.1)
    shifted = second + rng.normal(0, 0.2, (16, 1))
    wide = crossed_difference(first, shifted)
    by_theta = 2 * 1.96 * shifted.mean(axis=1).std() / 4
    expected = np.hypot(paired.high - paired.low, by_theta)
    assert wide.high - wide.low == pytest.approx(expected, rel=0.15)


def test_the_reading_stands_in_every_form_of_the_report(tmp_path: Path) -> None:
    run = matching_pennies(tmp_path)
    run.attack()
    report = summarize(run, [], 1.0)
    assert has_figures(report)
    assert float(figures_by_name(report)["secrecy"]) == 0.5
    assert "| secrecy (points) | +50.0 |" in to_markdown(report)
    assert "A secret θ is worth **+50.0" in document_section(report, "figures")
