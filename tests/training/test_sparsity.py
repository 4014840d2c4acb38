import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model_store.structures import Structure, convs
from model_store.ticket import kept_count
from training.sparsity import erk_densities, init_scores, init_weights, mask_of, overlap, score_gradient, top_k


@pytest.mark.parametrize("density", [0.07, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("distinct", [1, 3, 10_000], ids=["all tied", "many tied", "none tied"])
def test_top_k_keeps_so_many_and_none_larger_is_left(density: float, distinct: int) -> None:
    scores = torch.from_numpy(np.random.default_rng(7).integers(-distinct, distinct + 1, (40, 7, 3, 3))).float()
    mask = top_k(scores.requires_grad_(), density)
    assert mask.shape == scores.shape
    assert int(mask.sum()) == kept_count(scores.numel(), density)
    if density < 1:
        assert scores[mask].abs().min() >= scores[~mask].abs().max()


def test_top_k_keeps_the_largest_scores_by_magnitude() -> None:
    scores = torch.tensor([0.1, -0.9, 0.3, 0.0, 0.5])
    assert top_k(scores, density=0.4).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("density", [0.07, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0])
def test_ties_never_change_the_kept_count(density: float) -> None:
    for numel in (27, 144, 1000):
        assert int(top_k(torch.zeros(numel), density).sum()) == kept_count(numel, density)


def test_the_gradient_reaches_scores_through_their_magnitude() -> None:
    """Worked by hand for one layer y = (w * mask(s)) . x with d loss / d y = 1: d loss / d s = x * w * sign(s)."""
    weight = torch.tensor([2.0, -1.0, 3.0, 0.5])
    scores = torch.tensor([0.9, -0.8, -0.1, 0.2], requires_grad=True)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ((weight * mask_of(scores, 0.5)) * x).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.tolist() == [2.0, 2.0, -9.0, 2.0]  # the two that were not kept get theirs too


def test_the_search_s_shortcut_is_the_autograd_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((4, 3, 3, 3))
    weight = init_weights(shape, generator)
    scores = init_scores(shape, generator).requires_grad_()
    images = torch.rand(2, 3, 5, 5, generator=generator)

    def loss(effective: Tensor) -> Tensor:
        return functional.conv2d(images, effective).square().sum()

    (expected,) = torch.autograd.grad(loss(weight * mask_of(scores, 0.3)), scores)
    effective = (weight * top_k(scores, 0.3)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(effective), effective)
    torch.testing.assert_close(score_gradient(gradient, weight, scores.detach()), expected)


def test_a_search_step_with_the_sign_lowers_the_loss_and_without_it_does_not() -> None:
    """The trap of re-implementations: half of all scores move the wrong way without sign(score)."""
    generator = torch.Generator().manual_seed(1)
    shape = torch.Size((8, 16, 1, 1))
    weight, start = init_weights(shape, generator), init_scores(shape, generator)
    images = torch.rand(64, 16, 1, 1, generator=generator)
    labels = images.flatten(1)[:, :8].argmax(1)

    def loss_after(steps: int, *, sign: bool) -> float:
        scores = start.clone()
        for _ in range(steps):
            effective = (weight * top_k(scores, 0.3)).requires_grad_()
            loss = functional.cross_entropy(functional.conv2d(images, effective).flatten(1), labels)
            (gradient,) = torch.autograd.grad(loss, effective)
            scores -= 0.1 * (gradient * weight * (scores.sign() if sign else 1))
        final = functional.conv2d(images, weight * top_k(scores, 0.3)).flatten(1)
        return float(functional.cross_entropy(final, labels))

    assert loss_after(200, sign=True) < 0.9 * loss_after(0, sign=True)
    assert loss_after(200, sign=True) < loss_after(200, sign=False)


@given(st.integers(1, 400), st.sampled_from([0.07, 0.12, 0.3, 0.5, 0.7]), st.integers(0, 2**31))
def test_no_dropped_score_outranks_a_kept_one(numel: int, density: float, seed: int) -> None:
    scores = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    mask = top_k(scores, density)
    dropped = scores[~mask].abs()
    assert dropped.numel() == 0 or scores[mask].abs().min() >= dropped.max()


def test_frozen_weights_are_one_constant_with_fair_signs() -> None:
    weights = init_weights(torch.Size((64, 32, 3, 3)), torch.Generator().manual_seed(2))
    assert set(weights.abs().flatten().tolist()) == {float(torch.tensor((2 / (32 * 9)) ** 0.5))}
    # 18,432 fair signs: the mean is beyond 5 standard errors in one of 1.7 million runs; the seed is fixed anyway
    assert abs(float(weights.sign().mean())) < 5 / weights.numel() ** 0.5


def test_overlap_is_one_for_equal_masks_and_the_share_for_others() -> None:
    first = {"a": torch.tensor([True, True, False, False])}
    second = {"a": torch.tensor([True, False, True, False])}
    assert overlap(first, first, ["a"]) == 1
    assert overlap(first, second, ["a"]) == pytest.approx(1 / 3)
    for one, other in itertools.permutations([first, second]):
        assert overlap(one, other, ["a"]) == overlap(other, one, ["a"])


@pytest.mark.parametrize("density", [0.01, 0.07, 0.15, 0.7, 1.0])
def test_erk_gives_small_layers_more_and_the_whole_its_density(density: float) -> None:
    shapes = {name: layer.weight.shape for name, layer in convs(Structure("resnet18", 16).blank()).items()}
    densities = erk_densities(shapes, density)
    kept = sum(shapes[name].numel() * share for name, share in densities.items())
    assert kept == pytest.approx(density * sum(shape.numel() for shape in shapes.values()))
    assert max(densities.values()) <= 1
    assert min(densities.values()) > 0
    by_size = sorted(densities, key=lambda name: sum(shapes[name]) / shapes[name].numel())
    assert [densities[name] for name in by_size] == sorted(densities.values())
