"""The attacks against closed forms, laws, and foolbox as a second opinion. Images may have any shape: here 8x8."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from model_store.attacks import (
    Norm,
    ThreatModel,
    cross_entropy,
    fgsm,
    margin,
    misclassified,
    pgd,
    project,
    random_start,
    steepest_direction,
)
from tests.support.tickets import make_ticket

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 1.0)


class Undefended(NamedTuple):
    network: nn.Module
    images: Tensor
    labels: Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def undefended() -> Undefended:
    """A small network trained on scikit-learn's digits, and 400 of them that it has not seen."""
    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(np.asarray(bunch.target)).to(torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        loss = functional.cross_entropy(network(images[:-400]), labels[:-400])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return Undefended(network.eval(), images[-400:], labels[-400:])


def accuracy(target: Undefended, images: Tensor) -> float:
    with torch.no_grad():
        return float((target.network(images).argmax(dim=1) == target.labels).double().mean())


def attack(target: Undefended, epsilon: float, norm: Norm = "linf", *, seed: int = 0, **options: Any) -> Tensor:
    defaults: dict[str, Any] = {"steps": 20, "step_size": epsilon / 4, "generator": seeded(seed)}
    return pgd(target.network, target.images, target.labels, ThreatModel(norm, epsilon), **(defaults | options))


# Closed forms


def linear(classes: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    weight, bias = torch.randn(classes, 48, generator=seeded(seed)), torch.randn(classes, generator=seeded(seed + 1))
    return lambda images: images.flatten(1) @ weight.T + bias, weight, bias


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_pgd_finds_a_linear_classifier_s_worst_case_margin(norm: Norm, dual: int, momentum: float) -> None:
    # Two classes, images far from the box's walls: margin - epsilon * |w|_dual, w the difference of the two rows.
    classifier, weight, _ = linear(2, seed=0)
    images = 0.4 + 0.2 * torch.rand(64, 3, 4, 4, generator=seeded(3))
    labels = classifier(images).argmax(dim=1)
    epsilon = 0.3 if norm == "linf" else 0.39
    adversarial = pgd(
        classifier,
        images,
        labels,
        ThreatModel(norm, epsilon),
        steps=60,
        step_size=epsilon / 4,
        momentum=momentum,
        generator=seeded(),
    )
    worst = margin(classifier(images), labels) + epsilon * (weight[0] - weight[1]).norm(p=dual)
    assert (margin(classifier(adversarial), labels) - worst).abs().max() <= 1e-4


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_fgsm_finds_it_in_one_step(norm: Norm, dual: int) -> None:
    classifier, weight, _ = linear(2, seed=4)
    images = 0.4 + 0.2 * torch.rand(64, 3, 4, 4, generator=seeded(3))
    labels = classifier(images).argmax(dim=1)
    adversarial = fgsm(classifier, images, labels, ThreatModel(norm, 0.3))
    worst = margin(classifier(images), labels) + 0.3 * (weight[0] - weight[1]).norm(p=dual)
    assert (margin(classifier(adversarial), labels) - worst).abs().max() <= 1e-4


def test_against_one_wrong_class_of_many_the_best_of_pgd_reaches_the_nearest_boundary() -> None:
    # The margin loss of a linear classifier is a maximum of linear functions: the worst case is the largest of theirs.
    classifier, weight, _ = linear(10, seed=6)
    images = 0.4 + 0.2 * torch.rand(64, 3, 4, 4, generator=seeded(3))
    labels = classifier(images).argmax(dim=1)
    threat = ThreatModel("linf", 0.3)
    adversarial = pgd(
        classifier, images, labels, threat, steps=60, step_size=0.05, restarts=10, loss=margin, generator=seeded()
    )
    logits = classifier(images)
    away = (weight[None] - weight[labels][:, None]).abs().sum(dim=2)
    margins = logits - logits.gather(1, labels[:, None]) + 0.3 * away
    worst = margins.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    reached = margin(classifier(adversarial), labels)
    assert (reached <= worst + 1e-4).all()
    assert ((reached - worst).abs() <= 1e-4).double().mean() >= 0.9


def test_the_box_of_pixels_binds_where_epsilon_does_not() -> None:
    classifier, weight, _ = linear(2, seed=0)
    images = torch.rand(16, 3, 4, 4, generator=seeded(1))
    labels = classifier(images).argmax(dim=1)
    adversarial = pgd(classifier, images, labels, ThreatModel("linf", 1.0), steps=10, step_size=0.5, generator=seeded())
    away = torch.where(labels[:, None] == 0, weight[1] - weight[0], weight[0] - weight[1])
    assert torch.equal(adversarial.flatten(1), (away > 0).float())


def test_losses_worked_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    labels = torch.tensor([0, 2])
    assert margin(logits, labels).tolist() == [-1.0, 2.0]
    expected = [math.log(math.e**2 + 1 + math.e) - 2, math.log(1 + math.e**3 + math.e) - 1]
    assert cross_entropy(logits, labels).tolist() == pytest.approx(expected)
    assert misclassified(logits, labels).tolist() == [0, 1]
    assert misclassified(torch.tensor([[math.nan, 0.0, 0.0]]), torch.tensor([0])).tolist() == [1]


# What an attacker may do


def test_projection_worked_by_hand() -> None:
    clean = torch.tensor([[0.5, 0.05]])
    assert project(torch.tensor([[0.9, -0.3]]), clean, LINF)[0].tolist() == pytest.approx([0.6, 0.0])
    assert project(torch.tensor([[0.8, 0.45]]), clean, ThreatModel("l2", 0.25))[0].tolist() == pytest.approx(
        [0.65, 0.25]
    )


def within(images: Tensor, clean: Tensor, threat: ThreatModel) -> bool:
    away = (images - clean).flatten(1).double()
    length = away.abs().amax(dim=1) if threat.norm == "linf" else away.norm(dim=1)
    return bool((length <= threat.epsilon + 1e-6).all() and (images >= 0).all() and (images <= 1).all())


@given(st.sampled_from(["linf", "l2"]), st.floats(0, 2), st.integers(0, 1000))
def test_every_projection_and_every_start_is_allowed_and_projecting_twice_changes_nothing(
    norm: Norm, epsilon: float, seed: int
) -> None:
    threat, clean = ThreatModel(norm, epsilon), torch.rand(5, 3, 4, 4, generator=seeded(seed))
    near = project(clean + 3 * torch.randn(clean.shape, generator=seeded(seed + 1)), clean, threat)
    assert within(near, clean, threat)
    assert (project(near, clean, threat) - near).abs().max() <= 1e-6
    assert torch.equal(project(clean, clean, threat), clean)
    assert within(random_start(clean, threat, seeded(seed)), clean, threat)


def test_random_starts_fill_the_ball_evenly() -> None:
    clean = torch.full((20_000, 2), 0.5)
    linf = random_start(clean, LINF, seeded()) - clean
    assert linf.abs().max() > 0.0999
    assert ((linf.abs() < 0.05).all(dim=1).double().mean() - 0.25).abs() < 0.02
    length = (random_start(clean, ThreatModel("l2", 0.4), seeded()) - clean).norm(dim=1)
    assert length.max() > 0.399
    assert ((length < 0.2).double().mean() - 0.25).abs() < 0.02  # half the radius holds a quarter of the disc


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_attacks_stay_within_epsilon_and_the_box(undefended: Undefended, threat: ThreatModel, momentum: float) -> None:
    network, images, labels = undefended
    adversarial = pgd(
        network, images, labels, threat, steps=7, step_size=0.5, restarts=2, momentum=momentum, generator=seeded()
    )
    assert within(adversarial, images, threat)
    assert within(fgsm(network, images, labels, threat), images, threat)


def test_epsilon_zero_changes_nothing(undefended: Undefended) -> None:
    assert torch.equal(attack(undefended, 0.0, step_size=0.1), undefended.images)


@pytest.mark.parametrize(("norm", "epsilon"), [("l1", 0.1), ("linf", -0.1), ("l2", math.nan), ("linf", math.inf)])
def test_what_is_no_threat_model_is_refused(norm: Any, epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"norm|epsilon"):
        ThreatModel(norm, epsilon)


def test_images_that_are_not_in_pixel_units_are_refused(undefended: Undefended) -> None:
    network, images, labels = undefended
    for wrong in (images * 255, images - 1, (images * 255).to(torch.uint8), images * math.nan):
        with pytest.raises(ValueError, match=r"not all in \[0, 1\]"):
            fgsm(network, wrong, labels, LINF)


@given(st.floats(-35, 3))
def test_unit_steps_have_length_one_however_small_the_gradient(exponent: float) -> None:
    gradient = torch.randn(3, 2, 4, generator=seeded()).double() * 10**exponent
    assert torch.allclose(
        steepest_direction(gradient, "l2").flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-4
    )
    assert set(steepest_direction(gradient, "linf").abs().flatten().tolist()) == {1.0}


def test_a_zero_gradient_gives_no_step_and_no_nan() -> None:
    assert not steepest_direction(torch.zeros(2, 3), "l2").any()
    flat = pgd(
        lambda images: images.flatten(1)[:, :2] * 0,
        torch.rand(2, 3, 2, 2),
        torch.tensor([0, 1]),
        L2,
        steps=3,
        step_size=0.1,
        momentum=0.5,
        generator=seeded(),
    )
    assert torch.isfinite(flat).all()


# Attack the attacks


def test_pgd_breaks_an_undefended_network(undefended: Undefended) -> None:
    assert accuracy(undefended, undefended.images) >= 0.9
    assert accuracy(undefended, attack(undefended, 0.3, steps=40)) <= 0.01
    assert accuracy(undefended, attack(undefended, 3.0, "l2", steps=40)) <= 0.01


def test_pgd_is_no_weaker_than_fgsm_and_fgsm_no_weaker_than_noise(undefended: Undefended) -> None:
    network, images, labels = undefended
    threat = ThreatModel("linf", 0.06)
    noisy = accuracy(undefended, random_start(images, threat, seeded()))
    one_step = accuracy(undefended, fgsm(network, images, labels, threat))
    assert accuracy(undefended, attack(undefended, 0.06)) <= one_step < noisy


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_restarts_or_epsilon_never_leave_a_higher_accuracy(undefended: Undefended, norm: Norm) -> None:
    epsilon = 0.06 if norm == "linf" else 0.6
    steps = [accuracy(undefended, attack(undefended, epsilon, norm, steps=n)) for n in (0, 1, 2, 5, 20, 50)]
    restarts = [accuracy(undefended, attack(undefended, epsilon, norm, steps=5, restarts=n)) for n in (0, 1, 2, 5)]
    radii = [accuracy(undefended, attack(undefended, epsilon * n, norm)) for n in (0, 0.5, 1, 2, 4)]
    for accuracies in (steps, restarts, radii):
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[0] > accuracies[-1]
    assert restarts[0] == radii[0] == accuracy(undefended, undefended.images)


def test_the_riskiest_iterate_is_kept_not_the_last(undefended: Undefended) -> None:
    # Steps far too long jump over what they find; what was found must still be returned.
    network, images, labels = undefended
    seen: list[Tensor] = []

    def watched(inputs: Tensor) -> Tensor:
        seen.append(inputs.detach())
        logits: Tensor = network(inputs)
        return logits

    adversarial = pgd(watched, images, labels, LINF, steps=10, step_size=0.2, restarts=2, generator=seeded())
    with torch.no_grad():
        losses = torch.stack([cross_entropy(network(inputs), labels) for inputs in seen])
        wrong = torch.stack([misclassified(network(inputs), labels) for inputs in seen])
        kept, kept_wrong = cross_entropy(network(adversarial), labels), misclassified(network(adversarial), labels)
    assert torch.equal(kept_wrong, wrong.amax(dim=0))
    best_loss = losses.masked_fill(wrong < wrong.amax(dim=0), -math.inf).amax(dim=0)
    torch.testing.assert_close(kept, best_loss)


def test_foolbox_s_pgd_agrees_within_a_point(undefended: Undefended) -> None:
    foolbox = pytest.importorskip("foolbox")
    network, images, labels = undefended
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    for epsilon in (0.03, 0.06, 0.1):
        theirs = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 10, steps=40, random_start=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, _, broken = theirs(model, images, labels, epsilons=epsilon)
        ours = accuracy(undefended, attack(undefended, epsilon, steps=40, step_size=epsilon / 10))
        assert abs(ours - float((~broken).double().mean())) <= 0.01


@pytest.mark.parametrize(("momentum", "second"), [(0.0, -0.01), (0.5, -0.01), (1.0, 0.0), (2.0, 0.01)])
def test_momentum_is_the_decay_of_the_gradients_running_sum(momentum: float, second: float) -> None:
    # One pixel, gradients 7 and then -3: the sum of unit gradients is 1, then momentum - 1, and its sign is the step.
    slopes = iter([0.0, 7.0, -3.0, 0.0])  # the first and the last are for judging alone
    seen: list[float] = []

    def classifier(pixel: Tensor) -> Tensor:
        seen.append(pixel.item())
        return pixel * next(slopes)

    pgd(
        classifier,
        torch.full((1, 1), 0.5),
        torch.tensor([0]),
        ThreatModel("linf", 0.4),
        steps=2,
        step_size=0.01,
        momentum=momentum,
        loss=lambda outputs, _labels: outputs[:, 0],
        generator=seeded(),
    )
    assert [after - before for before, after in pairwise(seen[1:])] == pytest.approx([0.01, second], abs=1e-6)


# What an attack leaves alone


def test_an_attack_changes_nothing_of_the_network_and_no_global_generator() -> None:
    network = make_ticket("resnet18").network().requires_grad_(True)
    network.stem.train()
    flags = {name: module.training for name, module in network.named_modules()}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.rand(4, 3, 32, 32, generator=seeded()), torch.tensor([0, 1, 2, 3])
    clean, before = images.clone(), torch.get_rng_state()
    pgd(network, images, labels, LINF, steps=2, step_size=0.05, restarts=2, generator=seeded())
    fgsm(network, images, labels, LINF)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, clean)
    assert not images.requires_grad
    assert {name: module.training for name, module in network.named_modules()} == flags
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_attack_runs_inside_no_grad_and_gives_the_same(undefended: Undefended) -> None:
    with torch.no_grad():
        inside = attack(undefended, 0.06)
    assert torch.equal(inside, attack(undefended, 0.06))


def test_a_generator_s_state_decides_every_start(undefended: Undefended) -> None:
    assert torch.equal(attack(undefended, 0.06, seed=1), attack(undefended, 0.06, seed=1))
    assert not torch.equal(attack(undefended, 0.06, seed=1), attack(undefended, 0.06, seed=2))


def test_any_loss_and_any_classifier_will_do(undefended: Undefended) -> None:
    """A classifier of two answers, attacked by the share of them that are wrong, then by their mean loss."""
    network, images, labels = undefended

    def two(inputs: Tensor) -> Tensor:
        return torch.stack([network(inputs), network(inputs.flip(3))])

    def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([cross_entropy(logits, labels) for logits in outputs]).mean(dim=0)

    def share_wrong(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(dim=2) != labels).double().mean(dim=0)

    adversarial = pgd(
        two, images, labels, LINF, steps=10, step_size=0.03, loss=mean_loss, risk=share_wrong, generator=seeded()
    )
    before, after = (share_wrong(two(inputs), labels) for inputs in (images, adversarial))
    assert (after >= before).all()
    assert after.mean() > before.mean() + 0.3
