import random

import pytest
import torch
from torch import Tensor

from model_store import ensemble
from model_store.ensemble import (
    calibrated,
    combine,
    ensemble_logits,
    failure_probability,
    member_logits,
    predictions,
    probabilities,
)
from model_store.library import Library
from model_store.policy import Policy, draw_matrix, draw_theta
from tests.support.tickets import make_ticket

METHOD = Policy.over([f"structure {index // 10}" for index in range(40)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_ensemble_s_logits_are_the_drawn_members_sum_worked_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]], [[100.0, 200.0]]])  # three members, one image, two classes
    draws = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    assert combine(logits, draws).tolist() == [[[1.0, 2.0]], [[101.0, 202.0]], [[120.0, 240.0]]]


def test_each_member_runs_once_whatever_the_number_of_draws() -> None:
    runs = [0, 0]

    def member(index: int) -> ensemble.Classifier:
        def classify(images: Tensor) -> Tensor:
            runs[index] += 1
            return images.flatten(1)[:, :4] * (index + 1)

        return classify

    draws = draw_matrix(Policy.over(["a", "b"]), 1000, random.Random(0))
    assert ensemble_logits([member(0), member(1)], torch.rand(3, 3, 4, 4), draws).shape == (1000, 3, 4)
    assert runs == [1, 1]


def test_many_draws_at_once_give_what_each_draw_gives_alone(small_library: Library) -> None:
    members = [calibrated(ticket) for ticket in small_library.tickets]
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    rng, again = random.Random(5), random.Random(5)
    many = ensemble_logits(members, images, draw_matrix(small_library.policy, 20, rng))
    for row in many:
        theta = draw_theta(small_library.policy, again)
        alone = torch.stack([members[member](images) for member in theta.members]).sum(dim=0)
        assert (row - alone).abs().max() <= 1e-5


def test_a_calibrated_ticket_is_its_network_over_its_temperature() -> None:
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    ticket = make_ticket("wideresnet32", kind="fine-tuned", temperature=2.5)
    assert (calibrated(ticket)(images) - ticket.network()(images) / 2.5).abs().max() <= 1e-5


def test_gradients_reach_the_images_through_every_draw_and_no_parameter() -> None:
    tickets = [make_ticket("resnet18", seed=seed) for seed in (1, 2)]
    images = torch.rand(2, 3, 32, 32, generator=seeded()).requires_grad_(True)
    summed = ensemble_logits([calibrated(ticket) for ticket in tickets], images, torch.eye(2))
    (gradient,) = torch.autograd.grad(summed[0].sum(), images, retain_graph=True)
    (other,) = torch.autograd.grad(summed[1].sum(), images)
    assert gradient.abs().sum() > 0
    assert not torch.equal(gradient, other)
    assert images.grad is None


def test_shown_probabilities_have_the_sum_s_label_and_no_more_confidence_for_a_larger_n() -> None:
    one = torch.randn(1, 50, 10, generator=seeded())
    shown = [probabilities(one * n, torch.tensor([n])) for n in (1, 4, 8)]  # n members that all say the same
    for some in shown:
        torch.testing.assert_close(some, torch.softmax(one, dim=-1))
    summed = torch.randn(6, 50, 10, generator=seeded(1)) * 5
    sizes = torch.tensor([1, 2, 3, 4, 5, 6])
    assert torch.equal(predictions(probabilities(summed, sizes)), predictions(summed))
    torch.testing.assert_close(probabilities(summed, sizes)[5], torch.softmax(summed[5] / 6, dim=-1))
    assert probabilities(summed[:, 0], sizes).shape == (6, 10)


def test_among_equal_logits_the_lowest_index_is_the_label() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [3.0, -1.0, 3.0]])
    assert predictions(logits).tolist() == [0, 1, 0]
    assert predictions(logits.repeat(1000, 1)).tolist() == [0, 1, 0] * 1000


def test_failure_probability_worked_by_hand() -> None:
    # Member 0 says class 0, member 1 says class 1 and louder; the image is of class 0.
    logits = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    draws = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert failure_probability(logits, torch.tensor([0]), draws).tolist() == [0.4]


def test_failure_probability_is_the_mean_over_single_draws_and_needs_no_more_memory_for_more() -> None:
    logits = torch.randn(40, 30, 10, generator=seeded())
    labels = torch.randint(0, 10, (30,), generator=seeded(1))
    draws = draw_matrix(METHOD, 2000, random.Random(0))
    one_by_one = sum((combine(logits, row[None])[0].argmax(dim=1) != labels).double() for row in draws) / 2000
    assert torch.equal(failure_probability(logits, labels, draws), torch.as_tensor(one_by_one))


def test_failure_probability_holds_no_more_than_a_chunk_of_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(logits: Tensor, draws: Tensor) -> Tensor:
        summed = combine(logits, draws)
        sizes.append(summed.numel())
        return summed

    logits, labels = torch.randn(5, 20, 10, generator=seeded()), torch.zeros(20, dtype=torch.int64)
    draws = draw_matrix(Policy.over(["a"] * 5), 1001, random.Random(0))
    whole = failure_probability(logits, labels, draws)
    monkeypatch.setattr(ensemble, "combine", counting)
    monkeypatch.setattr(ensemble, "MAX_CHUNK", 2500)
    assert torch.equal(failure_probability(logits, labels, draws), whole)
    assert max(sizes) <= 2500
    assert sum(sizes) == 1001 * 20 * 10


def test_failure_over_sampled_draws_agrees_with_the_exact_law() -> None:
    # One ticket of the first group is always wrong and loud: an image fails exactly when it is drawn.
    logits = torch.tensor([1.0, 0.0]).repeat(40, 1, 1)
    logits[0] = torch.tensor([0.0, 100.0])
    draws = draw_matrix(METHOD, 20_000, random.Random(0))
    assert failure_probability(logits, torch.tensor([0]), draws).item() == pytest.approx(0.072, abs=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.zeros(2, 1, 3)
    logits[1, 0, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        failure_probability(logits, torch.tensor([0]), torch.ones(1, 2))


def test_member_logits_stack_in_the_members_order() -> None:
    members = [lambda images, k=k: images.mean(dim=(1, 2, 3))[:, None] + k for k in range(3)]
    stacked = member_logits(members, torch.zeros(2, 3, 4, 4))
    assert stacked[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
