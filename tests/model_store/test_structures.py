import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from model_store.errors import StructureUnknown
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.structures import (
    STRUCTURES,
    Network,
    Structure,
    StructureName,
    calibrate,
    convs,
    fold,
    multiply_adds,
    norms,
)
from tests.support.tickets import WIDTHS, make_ticket


def small(name: StructureName, classes: int = 10, stem_stride: int = 1, stem_pool: int = 1) -> Structure:
    return Structure(name, WIDTHS[name], classes, stem_stride, stem_pool)


def random_network(structure: Structure, side: int = 32) -> Network:
    """Trained-looking: PyTorch's default weights, every norm measured on random images."""
    network = structure.build().requires_grad_(False)
    calibrate(network, [torch.rand(8, 3, side, side)])
    return network


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 18), ("resnet34", 34), ("wideresnet32", 32), ("wideresnet38", 38)]
)
def test_the_number_in_a_structure_s_name_counts_its_3x3_convolutions_and_the_classifier(
    name: StructureName, layers: int
) -> None:
    with torch.device("meta"):
        convolutions = convs(small(name).build())
    assert sum(conv.kernel_size == (3, 3) for conv in convolutions.values()) + 1 == layers


def test_resnet18_at_the_paper_s_width_has_11_164_352_weights_and_555_422_720_multiply_adds() -> None:
    # stem 3.64.9; stages 4 and then 3 square convolutions, one that doubles the width, one 1x1 shortcut; classifier
    square = [9 * width**2 for width in (64, 128, 256, 512)]
    stages = [4 * square[0]] + [3 * s + s // 2 + s // 18 for s in square[1:]]
    weights = 3 * 64 * 9 + sum(stages) + 512 * 10
    assert weights == 11_164_352
    paper = Structure("resnet18", 64)
    with torch.device("meta"):
        assert sum(conv.weight.numel() for conv in convs(paper.build()).values()) == weights
    pixels = [32**2, 16**2, 8**2, 4**2]
    by_hand = 3 * 64 * 9 * 32**2 + sum(s * p for s, p in zip(stages, pixels, strict=True)) + 512 * 10
    assert multiply_adds(paper, (32, 32)) == by_hand == 555_422_720


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(
    ("size", "stem"),
    [
        ((32, 32), (1, 1)),
        ((32, 32), (2, 1)),
        ((17, 17), (1, 1)),
        ((17, 17), (2, 1)),
        ((28, 28), (2, 1)),
        ((48, 64), (2, 2)),
        ((97, 61), (4, 2)),
        ((224, 224), (4, 4)),
        ((9, 8), (4, 32)),
    ],
)
def test_multiply_adds_are_those_of_a_forward_pass(
    name: StructureName, size: tuple[int, int], stem: tuple[int, int]
) -> None:
    structure, counted = small(name, stem_stride=stem[0], stem_pool=stem[1]), 0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal counted
        counted += output.shape[2] * output.shape[3] * next(module.parameters()).numel()

    network = structure.blank().eval()
    for conv in convs(network).values():
        conv.register_forward_hook(count)
    assert network(torch.zeros(1, 3, *size)).shape == (1, 10)
    assert multiply_adds(structure, size) == counted


@pytest.mark.parametrize(("name", "weights"), [("wideresnet32", 46_138_032), ("wideresnet38", 55_814_832)])
def test_wide_resnets_at_the_paper_s_width_are_wrn_34_10_and_wrn_40_10(name: StructureName, weights: int) -> None:
    # WRN-34-10 is known to have 46,160,474 parameters; 22,432 of them are affine norms and 10 the bias, not here.
    # 16 -> 160 -> 320 -> 640, n blocks of two 3x3 convolutions a stage, a 1x1 shortcut a stage
    blocks = {"wideresnet32": 5, "wideresnet38": 6}[name]
    inputs, by_hand = 16, 3 * 16 * 9 + 640 * 10
    for width in (160, 320, 640):
        by_hand += 9 * inputs * width + inputs * width + (2 * blocks - 1) * 9 * width**2
        inputs = width
    with torch.device("meta"):
        assert sum(c.weight.numel() for c in convs(Structure(name, 10).build()).values()) == by_hand == weights


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("stem", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_the_folded_network_has_the_same_logits_to_1e_5(name: StructureName, stem: tuple[int, int]) -> None:
    torch.manual_seed(0)
    side = 16 * max(2, math.prod(stem))  # norms of a few pixels would enlarge what rounding does
    network = random_network(small(name, 7, *stem), side)
    images = torch.rand(16, 3, side, side)
    expected, folded = network(images), fold(network)(images)
    assert expected.shape == (16, 7)
    assert expected.std() > 0.01
    assert (folded - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_folded_ticket_has_the_same_logits_as_the_dense_network_behind_its_mask(name: StructureName) -> None:
    ticket = make_ticket(name, 0.3, kind="fine-tuned")
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    masked = ticket.network()
    # Noise outside the mask, so that only the mask keeps it out: the masked form as a search runs it.
    weights = {
        name: (conv.weight + torch.randn_like(conv.weight) * ~ticket.masks[name]) * ticket.masks[name]
        for name, conv in convs(masked).items()
    }
    expected = torch.func.functional_call(
        masked, {f"{name}.weight": weight for name, weight in weights.items()}, images
    )
    assert (fold(ticket.network())(images) - expected).abs().max() <= 1e-5


def test_folding_leaves_no_norm_in_a_resnet_and_does_not_touch_the_network_itself() -> None:
    network = random_network(small("resnet18"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold(network)
    assert not norms(folded)
    assert all(not parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert norms(network)


def test_an_image_of_the_mean_colour_is_zero_behind_the_normalisation() -> None:
    network = small("wideresnet32").build().eval()
    mean = torch.tensor(CIFAR10_INPUT.mean).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    seen: list[Tensor] = []
    network.stem.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network(mean)
    assert seen[0].abs().max() == 0


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_pixel_counts_behind_a_stem_of_any_stride_and_pooling(name: StructureName) -> None:
    for stem in ((4, 1), (2, 2), (4, 4)):
        torch.manual_seed(0)
        network = small(name, 10, *stem).build().train()
        images = torch.rand(8, 3, 30, 45, requires_grad=True)
        convs(network)["stem.0"](images).square().sum().backward()
        assert images.grad is not None
        assert (images.grad.abs().amax(dim=(0, 1)) > 0).all()


def test_a_network_normalises_by_its_input_s_statistics() -> None:
    spec = InputSpec(8, 8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    for network in (small("resnet18").build(spec), small("resnet18").blank(spec)):
        seen: list[Tensor] = []
        network.stem.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
        network.eval()(torch.ones(1, 3, 8, 8))
        torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([0.9 / 0.5, 0.8 / 0.25, 0.7 / 0.125]))


def test_a_stem_without_pooling_is_written_as_it_always_was() -> None:
    assert small("resnet18").as_dict() == {"name": "resnet18", "width": 2, "classes": 10, "stem_stride": 1}
    assert small("resnet18", stem_pool=2).as_dict()["stem_pool"] == 2


def test_running_a_network_in_train_mode_leaves_its_statistics_alone() -> None:
    network = random_network(small("resnet18")).train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


def test_calibration_averages_each_batch_s_mean_and_unbiased_variance() -> None:
    network = small("wideresnet32").build()
    name, norm = next(iter(norms(network).items()))
    batches = [torch.rand(4, 3, 32, 32), torch.rand(6, 3, 32, 32) / 2]
    inputs: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    calibrate(network, batches)
    handle.remove()
    mean = sum(x.mean(dim=(0, 2, 3)) for x in inputs) / 2
    variance = sum(x.var(dim=(0, 2, 3), unbiased=True) for x in inputs) / 2
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-6, rtol=1e-5, msg=name)
    torch.testing.assert_close(norm.running_var, variance, atol=1e-6, rtol=1e-5, msg=name)
    assert not network.training


def test_calibration_on_one_batch_makes_eval_mode_agree_with_train_mode() -> None:
    network, images = small("resnet18").build(), torch.rand(64, 3, 32, 32)
    calibrate(network, [images])
    with torch.no_grad():
        # biased in the batch, unbiased in the statistics: n / (n - 1), n the values behind a channel's variance
        difference = (network.eval()(images) - network.train()(images)).abs().max()
    assert difference < 1e-2


def test_calibration_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch given"):
        calibrate(small("resnet18").build(), [])


def test_a_blank_network_is_the_same_network_and_draws_nothing_from_the_global_generator() -> None:
    structure = small("wideresnet38", classes=3)
    before = torch.get_rng_state()
    blank = structure.blank()
    assert torch.equal(torch.get_rng_state(), before)
    filled = random_network(structure)
    blank.load_state_dict(filled.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(blank.eval()(images), filled(images))


def test_a_stem_stride_of_two_quarters_the_cost() -> None:
    full, halved = (multiply_adds(small("resnet34", stem_stride=stride), (32, 32)) for stride in (1, 2))
    assert math.isclose(full / halved, 4, rel_tol=0.01)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_weight_of_a_network_is_a_convolution_s(name: StructureName) -> None:
    with torch.device("meta"):
        network = small(name).build()
    assert {f"{conv}.weight" for conv in convs(network)} == {parameter for parameter, _ in network.named_parameters()}
    assert not any(isinstance(module, nn.Linear) for module in network.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet50"}, "resnet50"),
        ({"width": 0}, "width 0"),
        ({"width": True}, "width True"),
        ({"width": 1.5}, "width 1.5"),
        ({"width": 5000}, "width 5000"),
        ({"classes": 1}, "classes 1"),
        ({"stem_stride": 3}, "stem_stride 3"),
    ],
)
def test_an_unknown_structure_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(StructureUnknown, match=message):
        dataclasses.replace(small("resnet18"), **change)  # type: ignore[arg-type]
