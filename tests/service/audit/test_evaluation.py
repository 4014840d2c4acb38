"""The quantity and its intervals: by hand, by brute force, and against scipy."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference
from scipy.stats import binomtest
from torch import nn

from model_store.policy import Policy, inclusion_probabilities, size_probabilities, states
from service.audit.evaluation import members
from service.audit.evaluation.draws import DrawSet, draws_of, enumerate_states, scoring_draws
from service.audit.evaluation.members import GRAPH_IMAGES, AttackTarget, Member
from service.audit.evaluation.pixel_grid import distance, quantize_to_uint8
from service.audit.evaluation.scoring import Scores, failure, pointwise_worst, riskiest, score_exactly, scores
from service.audit.evaluation.threads import WorkerThreads
from service.audit.stats import bootstrap, clopper_pearson, holm, paired_difference, resampled_means, sign_flip_p
from tests.support.audit_models import alone, system

GROUPS = ["a", "a", "a", "b", "b", "c"]
LAWS = [
    Policy.over(GROUPS),
    Policy.switching([0, 2, 4], 6),
    Policy.fixed([1, 5], 6),
    Policy.all(6),
    Policy.over(GROUPS, every=True),
]


@pytest.mark.parametrize("law", LAWS)
def test_enumeration_is_the_law(law: Policy) -> None:
    draws = enumerate_states(law)
    assert len(draws.rows) == states(law) == len({tuple(row) for row in draws.rows.tolist()})
    assert (draws.weights @ draws.rows.double()).tolist() == pytest.approx(inclusion_probabilities(law))
    for n, p in size_probabilities(law).items():
        assert float(draws.weights[draws.sizes == n].sum()) == pytest.approx(p)


def test_large_laws_are_sampled_and_small_ones_counted() -> None:
    large = Policy.over([name for name in "abcd" for _ in range(10)])
    assert not draws_of(large, 50, random.Random(0)).exhaustive
    assert draws_of(LAWS[0], 50, random.Random(0)).exhaustive


@pytest.mark.parametrize("law", LAWS)
def test_counting_through_in_halves_is_counting_through(law: Policy) -> None:
    """Against every state scored on its own, ties included: logits are small whole numbers."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2, 3, (6, 20, 4), generator=generator).float()
    labels = torch.randint(0, 4, (20,), generator=generator)
    sampled = scores(logits, labels, enumerate_states(law))
    halved = score_exactly(sampled, logits, labels, law)
    assert halved.right.tolist() == pytest.approx(sampled.right.tolist(), abs=1e-6)
    assert torch.equal(halved.any_wrong, sampled.any_wrong)


def test_failure_by_hand() -> None:
    """Member 0 is right by 1 on both images; member 1 is wrong by 3 on the second. The draws: 0, 1, both."""
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    draws = DrawSet(rows, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), exhaustive=True)
    labels = torch.tensor([0, 0])
    assert failure(logits, labels, draws).tolist() == [0.0, 0.5]
    scored = scores(logits, labels, draws)
    assert scored.right.tolist() == [1.0, 0.5]
    assert scored.any_wrong.tolist() == [False, True]
    assert {n: p.tolist() for n, p in scored.by_size.items()} == {1: [1.0, pytest.approx(2 / 3)], 2: [1.0, 0.0]}


def test_what_is_never_right_is_exactly_zero() -> None:
    """Weights that are no round numbers add up to almost 1; checks ask whether nothing is left."""
    law = Policy.over(["a", "a", "b", "b", "c", "c", "d", "d"])
    logits = torch.tensor([0.0, 1.0]).expand(8, 3, 2).contiguous()
    labels = torch.zeros(3, dtype=torch.int64)
    scored = scores(logits, labels, enumerate_states(law))
    assert scored.right.tolist() == [0.0, 0.0, 0.0]
    assert score_exactly(scored, logits, labels, law).right.tolist() == [0.0, 0.0, 0.0]


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = torch.tensor([[[math.nan, 0.0]]])
    with pytest.raises(ValueError, match="not finite"):
        failure(logits, torch.tensor([0]), enumerate_states(Policy.all(1)))


def scores_of(*right: float) -> Scores:
    values = torch.tensor(right, dtype=torch.float64)
    return Scores(values, values < 1, {1: values})


def test_the_mean_of_minima_is_below_the_minimum_of_means() -> None:
    lowest = pointwise_worst([scores_of(0.2, 0.9), scores_of(0.8, 0.1)])
    assert lowest.right.tolist() == [0.2, 0.1]
    assert lowest.by_size[1].tolist() == [0.2, 0.1]


def test_the_defenders_draws_depend_on_nothing_of_the_attackers() -> None:
    large = system(Policy.over([name for name in "abcd" for _ in range(10)]))
    first, again, other = scoring_draws(large, 0), scoring_draws(large, 0), scoring_draws(large, 1)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)
    assert len(first.rows) >= 10_000


@pytest.mark.parametrize("norm", ["linf", "l2"])
@given(seed=st.integers(0, 2**16), epsilon=st.sampled_from([0.0, 1 / 255, 2.5 / 255, 8 / 255, 0.5]))
def test_the_grid_stays_inside_the_threat_model(norm: str, seed: int, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 256, (3, 3, 4, 4), generator=generator, dtype=torch.uint8)
    offset = torch.randn(3, 3, 4, 4, generator=generator)
    length = offset.flatten(1).abs().amax(1) if norm == "linf" else offset.flatten(1).norm(dim=1)
    moved = (clean / 255 + epsilon * offset / length.view(-1, 1, 1, 1)).clamp(0, 1)
    assert float(distance(quantize_to_uint8(moved, clean, norm, epsilon), clean, norm).max()) <= epsilon + 1e-9


def test_rounding_leaves_nearly_all_of_an_l2_perturbation() -> None:
    """Cutting every number towards the clean image would cost a fifth of it."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(20, 236, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    offset = torch.randn(8, 3, 32, 32, generator=generator)
    epsilon = 128 / 255
    moved = clean / 255 + epsilon * offset / offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    distances = distance(quantize_to_uint8(moved, clean, "l2", epsilon), clean, "l2")
    assert float(distances.max()) <= epsilon + 1e-9
    assert float(distances.min()) >= 0.99 * epsilon


def test_a_corner_of_the_ball_is_on_the_grid() -> None:
    clean = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert quantize_to_uint8(clean / 255 + 8 / 255, clean, "linf", 8 / 255).flatten().tolist() == [108] * 12


@pytest.mark.parametrize(("count", "images"), [(0, 10), (3, 10), (8, 10), (10, 10), (37, 500)])
def test_clopper_pearson_is_scipys(count: int, images: int) -> None:
    theirs = binomtest(count, images).proportion_ci(method="exact")
    ours = clopper_pearson(count, images)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_a_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    """Of 400 images at p = 1/2: 1.96 * 0.5 / 20 = 4.9 points each way."""
    values = np.arange(400) % 2
    interval = bootstrap(values)
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 0.049, rel=0.1)
    assert resampled_means(values.astype(float), 3).std() == pytest.approx(0.025, rel=0.1)


def test_paired_differences_are_tighter_than_two_intervals() -> None:
    """Two systems that disagree on five of a hundred images differ significantly; their own intervals overlap."""
    first = np.r_[np.ones(55), np.zeros(45)]
    second = np.r_[np.ones(47), np.zeros(53)]
    assert paired_difference(first, second).low > 0
    assert bootstrap(first).low < bootstrap(second).high


def test_where_all_images_agree_the_interval_is_not_empty() -> None:
    assert bootstrap(np.zeros(10)).high == pytest.approx(0.3085, abs=1e-3)


def test_members_side_by_side_give_what_one_after_another_gives() -> None:
    """Logits to the bit and gradients to rounding, whatever the number of threads."""
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)) for _ in range(3)]
    target, images = alone(*networks), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        one_by_one = torch.stack([network(images) for network in networks])
    weights, gradients, torch_threads = torch.rand(3, 4, 5), [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count in (1, 2, 2):
            parallel = replace(target, threads=WorkerThreads(count))
            ours = images.clone().requires_grad_(True)
            logits = parallel(ours)
            assert torch.equal(logits, one_by_one)
            assert torch.equal(parallel(images), one_by_one)
            gradients.append(torch.autograd.grad((logits * weights).sum(), ours)[0])
    finally:
        torch.set_num_threads(torch_threads)
    ours = images.clone().requires_grad_(True)
    outputs = torch.stack([network(ours) for network in networks])
    (expected,) = torch.autograd.grad((outputs * weights).sum(), ours)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[1], gradients[2])
    assert torch.allclose(gradients[0], expected, atol=1e-6)


def test_a_pass_takes_as_many_images_as_their_activations_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held: the convolution's input and the rectifier's output, of one image, in float32."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten()).requires_grad_(requires_grad=False)
    member = Member("network", network, 2.0)
    image = torch.zeros(1, 3, 32, 32)
    assert member.graph_bytes(image) == 4 * 32 * 32 * (3 + 8)
    draws = DrawSet(torch.ones(1, 1), torch.ones(1, dtype=torch.float64), exhaustive=True)
    for free, size in ((1e15, GRAPH_IMAGES), (4 * 100 * member.graph_bytes(image), 64), (0.0, 4)):
        monkeypatch.setattr(members, "free_memory_bytes", lambda free=free: free)
        assert AttackTarget((member,), draws).batch(image) == size


def test_a_tie_never_goes_to_the_clean_image() -> None:
    """Two attempts leave the same chance on the scoring draws: the one whose mean is nearer to an error is chosen."""
    rights = torch.tensor([[1.0, 0.5, 1.0], [1.0, 0.5, 0.2]], dtype=torch.float64)  # clean, attacked
    leads = torch.tensor([[3.0, -0.1, 3.0], [1.0, 2.0, 2.0]], dtype=torch.float64)
    assert riskiest(rights, leads).tolist() == [1, 0, 1]
    everywhere = torch.full((2, 1), torch.inf, dtype=torch.float64)
    assert riskiest(torch.ones(2, 1, dtype=torch.float64), everywhere).tolist() == [0]


@pytest.mark.parametrize("seed", range(3))
def test_intervals_of_few_images_are_scipys_bca(seed: int) -> None:
    """Ten skewed values in a hundred: percentiles lean towards 0."""
    values = np.zeros(100)
    values[:8] = np.random.default_rng(seed).random(8)
    interval = bootstrap(values, seed)
    theirs = reference.bootstrap((values,), np.mean, n_resamples=4000, method="BCa", rng=seed).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high))
    percentile = np.quantile(resampled_means(values, seed), [0.025, 0.975])
    assert interval.high > percentile[1]
    assert paired_difference(values, np.zeros(100), seed).high == pytest.approx(interval.high)
    many = np.tile(values, 3)
    assert bootstrap(many, seed).high == pytest.approx(np.quantile(resampled_means(many, seed), 0.975))


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])


def test_a_sign_flip_test_of_six_equal_differences() -> None:
    """2 of the 64 choices of signs reach the sum."""
    assert sign_flip_p(np.ones(6), np.zeros(6)) == pytest.approx(2 / 64, abs=0.006)
    assert sign_flip_p(np.ones(6), np.ones(6)) == 1
