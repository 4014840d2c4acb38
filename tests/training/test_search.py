import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_store.structures import STRUCTURES, Structure, convs
from model_store.ticket import Ticket, kept_count
from tests.support.digits import few_digits
from tests.support.searches import CPU, TINY, ignore, same, same_masks
from training.errors import SearchFailed
from training.recipes import PRESETS, Allocation, Attack, continued_from, mask_phase
from training.search import OverfitCheck, Search, Step, memory_format, run, scratch_of
from training.seeding import make_generator


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Ticket:
    return run(TINY, few_digits(), tmp_path_factory.mktemp("whole"), ignore, CPU)


@pytest.mark.parametrize("stop", [1, 11, 12, 13, 23])
def test_a_search_that_goes_on_from_its_checkpoint_ends_in_the_same_bits(
    stop: int, uninterrupted: Ticket, tmp_path: Path
) -> None:
    """Stopped in either phase and around the change from masks to weights (step 12 of 24)."""
    begun = Search(TINY, few_digits(), CPU)
    for _ in range(stop):
        begun.train_step()
    begun.save(tmp_path / "checkpoint.safetensors")
    seen: list[int] = []
    ticket = run(TINY, few_digits(), tmp_path, lambda event: seen.append(event.step), CPU)
    assert seen == list(range(stop + 1, 25))
    assert same(ticket, uninterrupted)


@pytest.mark.parametrize("mask_share", [0.0, 0.5])
def test_training_that_began_from_a_ticket_goes_on_from_its_checkpoint(
    mask_share: float, uninterrupted: Ticket, tmp_path: Path
) -> None:
    recipe = replace(continued_from(TINY, parent="0" * 64, steps=8, rate=0.1), mask_share=mask_share)
    begun, whole = Search(recipe, few_digits(), CPU, uninterrupted), tmp_path / "whole"
    whole.mkdir()
    for _ in range(3):
        begun.train_step()
    begun.save(tmp_path / "checkpoint.safetensors")
    first, second = (run(recipe, few_digits(), folder, ignore, CPU, uninterrupted) for folder in (tmp_path, whole))
    assert same(first, second)


def test_one_seed_one_ticket_and_another_seed_another(uninterrupted: Ticket, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert same(run(TINY, few_digits(), tmp_path / "a", ignore, CPU), uninterrupted)
    assert not same(run(replace(TINY, seed=8), few_digits(), tmp_path / "b", ignore, CPU), uninterrupted)


def test_the_global_generator_is_neither_read_nor_moved(uninterrupted: Ticket, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ticket = run(TINY, few_digits(), tmp_path, ignore, CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert same(ticket, uninterrupted)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_ticket_keeps_exactly_its_share_of_every_layer(name: str, tmp_path: Path) -> None:
    structure = Structure(name, 4 if name.startswith("resnet") else 1)  # type: ignore[arg-type]
    recipe = replace(TINY, structure=structure, steps=2, batch=8, density=0.07)
    ticket = run(recipe, few_digits(), tmp_path, ignore, CPU)
    for mask in ticket.masks.values():
        assert int(mask.sum()) == kept_count(mask.numel(), 0.07)


@pytest.mark.parametrize("allocation", ["dense-ends", "erk"])
def test_a_ticket_of_either_allocation_is_whole_and_goes_on(allocation: Allocation, tmp_path: Path) -> None:
    (tmp_path / "on").mkdir()
    recipe = replace(TINY, allocation=allocation, steps=4)
    ticket = run(recipe, few_digits(), tmp_path, ignore, CPU)
    assert ticket.masks["classifier"].all()
    assert not ticket.masks["stages.6.conv2"].all()
    onward = continued_from(recipe, parent="0" * 64, steps=2, rate=0.5)
    assert same_masks(run(onward, few_digits(), tmp_path / "on", ignore, CPU, ticket), ticket)


def test_a_scratch_ticket_s_weights_are_what_they_were_drawn_as(tmp_path: Path) -> None:
    recipe = replace(TINY, mask_share=1.0, steps=6)
    first = Search(recipe, few_digits(), CPU)
    frozen = {name: weight.clone() for name, weight in first.frozen.items()}
    ticket = run(recipe, few_digits(), tmp_path, ignore, CPU)
    assert ticket.kind == "scratch"
    assert any(not torch.equal(ticket.masks[name], first.masks[name]) for name in frozen)
    for name, weight in frozen.items():
        assert torch.equal(ticket.values[name], weight[ticket.masks[name]])


def test_the_weights_phase_leaves_the_mask_and_moves_only_kept_weights(tmp_path: Path) -> None:
    begun = Search(TINY, few_digits(), CPU)
    while begun.phase == "mask":
        begun.train_step()
    masks = {name: mask.clone() for name, mask in begun.masks.items()}
    weights = {name: layer.weight.detach().clone() for name, layer in convs(begun.network).items()}
    while not begun.done:
        begun.train_step()
    for name, layer in convs(begun.network).items():
        assert torch.equal(begun.masks[name], masks[name])
        assert not layer.weight[~masks[name]].any()
        assert not torch.equal(layer.weight[masks[name]], weights[name][masks[name]])


@pytest.mark.parametrize(("attack", "steps"), [("n-fgsm", 1), ("fgsm-rs", 1), ("pgd", 3)])
def test_the_inner_attack_raises_the_loss_and_knows_its_bounds(attack: Attack, steps: int) -> None:
    recipe = replace(TINY, attack=attack, attack_steps=steps, clean_until=0.0, ramp_until=0.0, low_resolution_until=0.0)
    trained = Search(replace(recipe, epsilon=0.0, step_size=0.0, steps=40), few_digits(), CPU)
    for _ in range(40):
        trained.train_step()
    trained.recipe = replace(recipe, steps=40, step_size=recipe.epsilon)
    trained.step = 0
    images, labels = trained.make_batch(0)
    moved = trained.adversarial(images, labels)
    furthest = float((moved - images).abs().max())
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    # N-FGSM does not project: noise of one epsilon and a step of one epsilon may add up to two
    assert furthest <= recipe.epsilon * (2 if attack == "n-fgsm" else 1) + 1e-6
    noise = images + (moved - images).abs().max() * torch.randn(images.shape, generator=make_generator(3)).sign()
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(trained.network(x), labels))
            for x in (images, noise.clamp(0, 1), moved)
        ]
    assert losses[2] > max(losses[:2])


MUON = replace(TINY, muon_rate=0.02)


def test_muon_moves_each_layer_by_its_share_and_keeps_the_kept_weights_norm() -> None:
    begun = Search(replace(MUON, milestones=(1.0,)), few_digits(), CPU)
    scores = {name: value.clone() for name, value in begun.scores.items()}
    begun.train_step()
    for name, before in scores.items():
        if name != "classifier":
            moved = float((begun.scores[name] - before).norm() / before.norm())
            assert moved == pytest.approx(0.02, rel=1e-3)
    while begun.phase == "mask":
        begun.train_step()
    norms = {name: layer.weight.norm() for name, layer in convs(begun.network).items() if name != "classifier"}
    begun.train_step()
    for name, norm in norms.items():
        weight = convs(begun.network)[name].weight
        assert torch.allclose(weight.norm(), norm, rtol=1e-4)
        assert not weight[~begun.masks[name]].any()


@pytest.mark.parametrize(
    ("name", "width", "last"), [("resnet18", 4, False), ("resnet18", 8, True), ("wideresnet32", 1, True)]
)
def test_only_networks_that_are_wide_enough_are_laid_out_channels_last(name: str, width: int, last: bool) -> None:
    layout = memory_format(Structure(name, width))  # type: ignore[arg-type]
    assert layout == (torch.channels_last if last else torch.contiguous_format)


def test_muon_learns_in_both_phases(tmp_path: Path) -> None:
    losses: list[float] = []
    events = replace(MUON, steps=60, low_resolution_until=0.0, clean_until=1.0, ramp_until=1.0)
    run(
        events,
        few_digits(),
        tmp_path,
        lambda event: losses.append(event.loss) if isinstance(event, Step) else None,
        CPU,
    )
    assert sum(losses[25:30]) < 0.95 * sum(losses[:5])
    assert sum(losses[55:]) < 0.95 * sum(losses[25:30])


@pytest.fixture(scope="module")
def uninterrupted_muon(tmp_path_factory: pytest.TempPathFactory) -> Ticket:
    return run(MUON, few_digits(), tmp_path_factory.mktemp("muon"), ignore, CPU)


@pytest.mark.parametrize("stop", [5, 12, 13])
def test_a_search_with_muon_goes_on_from_its_checkpoint_in_the_same_bits(
    stop: int, uninterrupted_muon: Ticket, tmp_path: Path
) -> None:
    begun = Search(MUON, few_digits(), CPU)
    for _ in range(stop):
        begun.train_step()
    begun.save(tmp_path / "checkpoint.safetensors")
    assert same(run(MUON, few_digits(), tmp_path, ignore, CPU), uninterrupted_muon)


def test_epsilon_is_zero_then_ramps_then_stays() -> None:
    recipe = replace(TINY, steps=100, clean_until=0.1, ramp_until=0.4)
    run_ = Search(recipe, few_digits(), CPU)
    seen = []
    for step in (0, 9, 10, 25, 40, 99):
        run_.step = step
        seen.append(run_.epsilon() / recipe.epsilon)
    assert seen == pytest.approx([0, 0, 0, 0.5, 1, 1])


def test_rates_fall_to_zero_in_each_phase_or_by_tenths() -> None:
    run_ = Search(replace(TINY, steps=100, mask_share=0.5), few_digits(), CPU)
    rates = []
    for step in (0, 25, 50, 75, 99):
        run_.step = step
        rates.append(run_.rate())
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.025, 0.05 * 0.5 * (1 - 0.998027)], rel=1e-3)
    paper = Search(replace(TINY, steps=160, mask_share=1.0, milestones=(0.5, 0.75)), few_digits(), CPU)
    steps = []
    for step in (0, 79, 80, 119, 120):
        paper.step = step
        steps.append(paper.rate())
    assert steps == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_early_steps_see_small_images() -> None:
    run_ = Search(TINY, few_digits(), CPU)
    assert run_.make_batch(11)[0].shape[-1] == 16
    assert run_.make_batch(12)[0].shape[-1] == 32


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    permutation = torch.randperm

    def record(count: int, generator: torch.Generator) -> Tensor:
        drawn.append(count)
        return permutation(count, generator=generator)

    monkeypatch.setattr(torch, "randperm", record)
    images, begun = len(few_digits().search), Search(TINY, few_digits(), CPU)
    per_epoch = images // TINY.batch
    for step in range(per_epoch + 1):
        begun.make_batch(step)
    assert drawn == [images, images]


def test_overfitting_is_rolled_back_with_more_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = iter([(0.5, 0.3), (0.5, 0.1), (0.5, 0.3), (0.5, 0.3)])
    monkeypatch.setattr(Search, "check_overfit", lambda self: next(measured))
    recipe = replace(TINY, guards=4, ramp_until=0.0, clean_until=0.0)
    events: list[Step | OverfitCheck] = []
    run(recipe, few_digits(), tmp_path, events.append, CPU)
    guards = [event for event in events if isinstance(event, OverfitCheck)]
    assert [(guard.step, guard.rolled_back, guard.noise) for guard in guards] == [
        (6, False, 1),
        (12, True, 1),
        (12, False, 1.5),
        (18, False, 1.5),
    ]


def test_training_goes_on_from_an_exported_ticket(uninterrupted: Ticket) -> None:
    further = continued_from(TINY, parent="0" * 64, steps=4, rate=0.1)
    begun = Search(further, few_digits(), CPU, uninterrupted)
    for name, layer in convs(begun.network).items():
        assert torch.equal(begun.masks[name], uninterrupted.masks[name])
        assert torch.equal(layer.weight[begun.masks[name]], uninterrupted.values[name])
    assert begun.epsilon() == TINY.epsilon
    assert begun.phase == "weights"
    assert begun.rate() == pytest.approx(0.1 * TINY.weight_rate)


def test_training_goes_on_from_a_scratch_ticket_by_its_mask(tmp_path: Path) -> None:
    recipe = replace(TINY, mask_share=1.0, steps=6)
    ticket = run(recipe, few_digits(), tmp_path, ignore, CPU)
    begun = Search(continued_from(recipe, parent="0" * 64, steps=4, rate=0.1), few_digits(), CPU, ticket)
    assert all(torch.equal(begun.masks[name], ticket.masks[name]) for name in ticket.masks)
    assert all(torch.equal(begun.frozen[name][ticket.masks[name]], ticket.values[name]) for name in ticket.masks)


def test_a_search_inside_a_dense_network_begins_at_its_largest_weights(tmp_path: Path) -> None:
    """And moves on from there: kept weights are the network's own until the weights phase."""
    dense = run(replace(TINY, density=1.0, mask_share=0.0, steps=6), few_digits(), tmp_path, ignore, CPU)
    recipe = replace(TINY, parent="0" * 64, clean_until=0.0, ramp_until=0.0)
    begun = Search(recipe, few_digits(), CPU, dense)
    for name, layer in convs(begun.network).items():
        weights = dense.values[name].view(layer.weight.shape)
        kept = begun.masks[name]
        assert int(kept.sum()) == kept_count(weights.numel(), recipe.density)
        assert torch.equal(layer.weight[kept], weights[kept])
        assert float(weights[kept].abs().min()) >= float(weights[~kept].abs().max())
        assert float(begun.scores[name].abs().max()) <= 1 / math.sqrt(math.prod(weights.shape[1:])) + 1e-6
    first = {name: mask.clone() for name, mask in begun.masks.items()}
    while begun.phase == "mask":
        begun.train_step()
    assert any(not torch.equal(first[name], begun.masks[name]) for name in first)
    for name, layer in convs(begun.network).items():
        weights = dense.values[name].view(layer.weight.shape)
        assert torch.equal(layer.weight[begun.masks[name]], weights[begun.masks[name]])


def test_a_search_inside_a_dense_network_goes_on_from_its_checkpoint_in_the_same_bits(tmp_path: Path) -> None:
    dense = run(replace(TINY, density=1.0, mask_share=0.0, steps=4), few_digits(), tmp_path, ignore, CPU)
    recipe = replace(TINY, parent="0" * 64)
    (tmp_path / "whole").mkdir()
    whole = run(recipe, few_digits(), tmp_path / "whole", ignore, CPU, dense)
    for stop in (recipe.mask_steps // 2, recipe.mask_steps + 1):
        folder = tmp_path / str(stop)
        folder.mkdir()
        search = Search(recipe, few_digits(), CPU, dense)
        while search.step < stop:
            search.train_step()
        search.save(folder / "checkpoint.safetensors")
        assert same(run(recipe, few_digits(), folder, ignore, CPU, dense), whole)


def test_the_scratch_ticket_behind_a_trained_one_is_the_one_that_a_search_by_its_recipe_finds(
    uninterrupted: Ticket, tmp_path: Path
) -> None:
    scratch = scratch_of(mask_phase(TINY), uninterrupted, few_digits(), CPU)
    assert scratch.kind == "scratch"
    assert same_masks(scratch, uninterrupted)
    assert same(scratch, run(mask_phase(TINY), few_digits(), tmp_path, ignore, CPU))


def test_masks_over_other_weights_are_not_taken_for_a_scratch_ticket(uninterrupted: Ticket) -> None:
    with pytest.raises(SearchFailed, match="have the sign of those"):
        scratch_of(mask_phase(replace(TINY, seed=8)), uninterrupted, few_digits(), CPU)


def test_a_loss_that_is_not_finite_ends_the_search_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Search(TINY, few_digits(), CPU)
    with torch.no_grad():
        next(iter(convs(begun.network).values())).weight.fill_(float("nan"))
    with pytest.raises(SearchFailed, match="Lower the rate"):
        begun.train_step()


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_paper_s_preset_takes_steps_at_full_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = PRESETS["paper"].recipe(name, 0.07, 49_000, batch=2, attack_steps=1, precision="float32")  # type: ignore[arg-type]
    begun = Search(recipe, few_digits(), CPU)
    loss, _ = begun.train_step()
    assert begun.step == 1
    assert 0 < loss < 100
