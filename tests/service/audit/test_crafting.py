"""Attacks crafted in bfloat16: every image is scored in float32, and what rounding costs the attack is measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_store.library import EMBEDDED, open_library
from service.admin.audit_estimate import CostEstimator
from service.audit import attack_runner
from service.audit.attack_runner import AuditRun
from service.audit.checks import attacks
from service.audit.checks.base import CheckContext
from service.audit.config import Audit
from service.audit.evaluation.members import CandidateSet
from service.audit.profiles import PROFILES
from service.settings import Settings
from tests.support.audit_models import faint_digits, run_on, tiny, undefended


def only_ours(run: AuditRun) -> AuditRun:
    """The same audit, of the attacks on the served law at the headline epsilon alone."""
    run.steps = [step for step in run.steps if step.system == "tombola" and step.epsilon == 8]
    run.costs = [run.cost(step) for step in run.steps]
    return run


STANDARD = Audit("standard", images=6, epsilons=(8.0,), attacks=("eot-mean-loss", "eot-hinge"))


class BluntInBfloat16(nn.Module):
    """Without a gradient where it is run in bfloat16."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.detach() + 0 * images if torch.is_autocast_enabled("cpu") else images)
        return logits


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_runner, "has_bfloat16", lambda: True)


@pytest.mark.usefixtures("bfloat16")
def test_attacks_see_rounded_logits_and_scores_do_not(tmp_path: Path) -> None:
    run = AuditRun(tmp_path / "run", STANDARD, tiny(tmp_path / "library"), faint_digits(6))
    assert run.crafted_in == "bfloat16"
    images = run.data.pixels.float() / 255
    rounded, exact = run.target("tombola").logits(images), run.target("tombola", exact=True).logits(images)
    assert rounded.dtype == exact.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.05 * float(exact.abs().max()))
    assert torch.equal(run.candidates.logits(run.data.pixels), exact)
    only_ours(run).attack()
    for outcome in run.outcomes:
        assert torch.allclose(outcome.logits, run.candidates.logits(outcome.pixels), atol=1e-5)


def test_a_stored_attack_of_another_precision_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, keys = tiny(tmp_path / "library"), []
    for has in (True, False):
        monkeypatch.setattr(attack_runner, "has_bfloat16", lambda has=has: has)
        run = AuditRun(tmp_path / "run", STANDARD, library, faint_digits(6))
        keys.append(run.key_of(run.steps[0]))
    assert run.crafted_in == "float32"
    assert keys[0] != keys[1]


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(("network", "ok"), [(undefended(), True), (BluntInBfloat16(undefended()), False)])
def test_a_network_that_rounding_blunts_fails_the_check(tmp_path: Path, network: nn.Module, ok: bool) -> None:
    context = CheckContext(run_on(network.eval(), tmp_path, replace(STANDARD, images=40), 40))
    assert attacks.rounding_in_attacks(context).ok is ok


def test_nothing_is_said_of_rounding_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_runner, "has_bfloat16", lambda: False)
    context = CheckContext(run_on(undefended(), tmp_path, STANDARD, 6))
    assert attacks.rounding_in_attacks(context).ok is None


def test_images_that_an_attack_leaves_as_they_were_are_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undefended network loses nearly all images to the first attack: the second has few left."""
    run = run_on(undefended(), tmp_path, replace(STANDARD, images=20), 20)
    scored: list[int] = []
    whole = CandidateSet.logits

    def counted(candidates: CandidateSet, pixels: Tensor) -> Tensor:
        scored.append(len(pixels))
        return whole(candidates, pixels)

    monkeypatch.setattr(CandidateSet, "logits", counted)
    only_ours(run).attack()
    first, second = run.outcomes
    left = int((run.scores(run.systems[0], first).right > 0).sum())
    assert left < 20
    assert len(scored) == (2 if left else 1)
    assert sum(scored[1:]) <= left
    assert torch.allclose(second.logits, whole(run.candidates, second.pixels), atol=1e-5)


@pytest.mark.usefixtures("bfloat16")
def test_standard_takes_at_most_an_hour_on_two_cores_and_full_a_night(tmp_path: Path) -> None:
    """Of the forty tickets, by the estimate that the command prints."""
    estimate = CostEstimator(Settings(state_dir=tmp_path, audits_threads=2, audits_max_hours=24))
    assert (PROFILES["standard"].images, PROFILES["full"].images) == (500, 2_000)
    library = open_library(EMBEDDED)
    assert estimate.cost(Audit("standard", data="cifar10.zip"), library).seconds <= 3_600
    assert estimate.cost(Audit("full", data="cifar10.zip"), library).seconds <= 12 * 3_600
