"""What an audit says of a service in 8 bits: it attacks the rounded tickets and scores the engine's own answers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from model_store.library import Library
from model_store.structures import fold
from service.audit.attack_runner import AuditRun, RunOptions
from service.audit.checks import model
from service.audit.checks.base import CheckContext
from service.audit.config import Audit
from service.audit.evaluation.members import as_floats, logits_of
from service.audit.evaluation.rounding import RoundedConvolution, round_network, to_levels
from tests.support.audit_models import faint_digits, tiny
from tests.support.tickets import make_ticket

pytest.importorskip("openvino")
AUDIT = Audit("standard", images=12, attacks=("eot-mean-loss",), epsilons=(8.0,))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, path = faint_digits(40), tmp_path_factory.mktemp("calibration") / "calibration.npz"
    np.savez(path, images=images.pixels.permute(0, 2, 3, 1).numpy(), labels=images.labels.numpy())
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny(tmp_path_factory.mktemp("library") / "library", ("resnet18", "wideresnet32"), (0.5,))


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, library: Library, calibration: Path) -> AuditRun:
    folder = tmp_path_factory.mktemp("rounded")
    run = AuditRun(folder, AUDIT, library, faint_digits(12), RunOptions(int8_images=calibration))
    run.steps = [step for step in run.steps if step.system == "tombola" and step.epsilon == 8]
    run.costs = [1.0] * len(run.steps)
    run.attack()
    return run


def test_levels_are_the_nearest_and_hold_zero() -> None:
    """A range of -1 to 1 in 255 levels has steps of 1/127."""
    values = torch.tensor([-1.0, -0.4 / 127, 0.0, 0.6 / 127, 1.6 / 127, 1.0])
    assert torch.allclose(to_levels(values, -1.0, 1.0, 255) * 127, torch.tensor([-127.0, 0, 0, 1, 2, 127]), atol=1e-4)


def test_gradients_pass_through_the_rounding_and_stop_where_values_are_cut_off() -> None:
    convolution = torch.nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        convolution.weight.fill_(0.5)
    layer = RoundedConvolution(convolution, 0.0, 1.0)
    values = torch.tensor([0.3001, 0.7002, 1.5]).view(3, 1, 1, 1).requires_grad_(True)
    answers = layer(values)
    answers.sum().backward()
    assert torch.allclose(answers.flatten() * 510, (torch.tensor([0.3001, 0.7002, 1.0]) * 255).round(), atol=1e-3)
    assert values.grad is not None
    assert torch.allclose(values.grad.flatten(), torch.tensor([0.5, 0.5, 0.0]))


def test_every_convolution_is_rounded_and_nothing_else_changes() -> None:
    network = fold(make_ticket("wideresnet32", 0.5, seed=1).network()).eval()
    images = as_floats(faint_digits(8).pixels)
    before = network(images)
    count = sum(isinstance(each, torch.nn.Conv2d) for each in network.modules())
    after = round_network(network, images)(images)
    assert sum(isinstance(each, RoundedConvolution) for each in network.modules()) == count > 10
    assert 0 < float((after - before).abs().max()) < 0.5 * float(before.abs().max())


def test_what_is_scored_are_the_engine_s_answers_and_what_is_attacked_follows_them(rounded: AuditRun) -> None:
    candidates, pixels = rounded.candidates, rounded.data.pixels
    assert candidates.answer is not None
    served = candidates.answer(pixels)
    assert torch.equal(rounded.clean_logits, served)
    (outcome,) = rounded.outcomes
    moved = (outcome.pixels != pixels).flatten(1).any(dim=1)
    assert bool(moved.any())
    assert torch.allclose(outcome.logits, candidates.answer(outcome.pixels), atol=1e-6)
    followed = logits_of(candidates.members, pixels, candidates.device)
    exact = logits_of(
        AuditRun(rounded.folder, AUDIT, rounded.library, rounded.data).candidates.members, pixels, candidates.device
    )
    assert float((served - followed).abs().mean()) < 0.5 * float((served - exact).abs().mean())
    assert rounded.crafted_in == "float32"


def test_the_check_says_how_8_bits_are_audited(rounded: AuditRun) -> None:
    result = model.same_model(CheckContext(rounded))
    assert result.ok is True, result.value
    assert re.search(
        r"served in 8 bits: attacked as rounded tickets with straight-through gradients, scored by the engine's own "
        r"answers\. .* moves accuracy by [+-]\d+\.\d\d points on 12 clean images",
        result.value,
    )
    assert model.right_gradients(CheckContext(rounded)).ok is None
    assert model.factored_is_sampled(CheckContext(rounded)).ok


def test_attacks_in_8_bits_have_keys_of_their_own(rounded: AuditRun, library: Library, tmp_path: Path) -> None:
    exact = AuditRun(tmp_path, AUDIT, library, rounded.data)
    assert {exact.key_of(step) for step in exact.steps}.isdisjoint(rounded.key_of(step) for step in rounded.steps)
