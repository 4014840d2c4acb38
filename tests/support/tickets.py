"""Small tickets and what belongs to them in a library: random masks, norm statistics of random images."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Final

import torch
from torch import Tensor

from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.manifest import Attack, Claim, Images, Provenance, wilson
from model_store.structures import STRUCTURES, Structure, StructureName, calibrate, norms
from model_store.ticket import Kind, Ticket, ValueDtype, kept_count, layers, uniform

CLASSES: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WIDTHS: Final = {"resnet18": 2, "resnet34": 2, "wideresnet32": 1, "wideresnet38": 1}
ATTACK: Final = Attack(norm="linf", epsilon=8 / 255, steps=20, step_size=2 / 255, restarts=1, momentum=0.0, loss="ce")


def make_ticket(
    name: StructureName = "resnet18",
    density: float = 0.3,
    *,
    kind: Kind = "scratch",
    value_dtype: ValueDtype = "float16",
    seed: int = 0,
    classes: int = 10,
    temperature: float = 1.0,
    spec: InputSpec = CIFAR10_INPUT,
    stem: tuple[int, int] = (1, 1),
) -> Ticket:
    """A ticket of a structure at its smallest useful width, its norms calibrated on 16 random images.

    stem: its stride and its pooling.
    """
    structure, generator = Structure(name, WIDTHS[name], classes, *stem), torch.Generator().manual_seed(seed)
    shapes, channels = layers(structure)
    masks = {layer: random_mask(shape, density, generator) for layer, shape in shapes.items()}
    values = {layer: random_values(masks[layer], kind, value_dtype, generator) for layer in shapes}
    rough = Ticket(
        structure=structure,
        density=density,
        densities=uniform(structure, density),
        masks=masks,
        values=values,
        statistics={name: torch.ones(length) for name, length in channels.items()},
        kind=kind,
        temperature=temperature,
        value_dtype=value_dtype,
        input=spec,
    )
    return replace(rough, statistics=measured(rough, torch.rand(16, *spec.shape, generator=generator)))


def random_mask(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[torch.randperm(shape.numel(), generator=generator)[: kept_count(shape.numel(), density)]] = True
    return mask.view(shape)


def random_values(mask: Tensor, kind: Kind, value_dtype: ValueDtype, generator: torch.Generator) -> Tensor:
    """+-sqrt(2 / fan_in), or normal deviates of that size rounded to the dtype they are stored in."""
    normal = torch.randn(int(mask.sum()), generator=generator)
    scale = math.sqrt(2 / math.prod(mask.shape[1:]))
    if kind == "scratch":
        return torch.where(normal < 0, -scale, scale)
    return (normal * scale).to(getattr(torch, value_dtype)).float()


def measured(ticket: Ticket, images: Tensor) -> dict[str, Tensor]:
    network = ticket.network()
    calibrate(network, [images])
    return {
        f"{name}.{part}": norm.get_buffer(part).clone()
        for name, norm in norms(network).items()
        for part in ("running_mean", "running_var")
    }


def eight_tickets() -> list[Ticket]:
    """Two densities of each structure, as the first library has them; one of each is fine-tuned."""
    kinds: tuple[tuple[float, Kind], ...] = ((0.07, "scratch"), (0.3, "fine-tuned"))
    return [
        make_ticket(name, density, kind=kind, seed=10 * index + place, temperature=1 + place / 2)
        for index, name in enumerate(STRUCTURES)
        for place, (density, kind) in enumerate(kinds)
    ]


def make_provenance(seed: int = 0) -> Provenance:
    return Provenance(
        recipe={"name": "test", "epochs": 2, "inner": {"attack": "n-fgsm", "epsilon": 0.031}},
        data_digest="ab" * 32,
        seed=seed,
        commit="0" * 40,
        seconds=1.5,
        packages={"torch": torch.__version__},
        parent=None,
    )


def make_claim(correct: int = 40, images: int = 100, attack: Attack | None = ATTACK) -> Claim:
    low, high = wilson(correct, images)
    return Claim(
        metric="pgd" if attack else "clean",
        value=correct / images,
        low=low,
        high=high,
        images=images,
        data=Images(name="random", digest="cd" * 32, split="test"),
        attack=attack,
        seed=0,
        commit="0" * 40,
        measured=date(2025, 1, 31),
    )


def items(tickets: Sequence[Ticket]) -> list[tuple[Ticket, Provenance, list[Claim]]]:
    """What write_library takes."""
    return [
        (ticket, make_provenance(seed), [make_claim(attack=None), make_claim()]) for seed, ticket in enumerate(tickets)
    ]


def identical(first: Ticket, second: Ticket) -> bool:
    """Equal in every field, tensors bit for bit."""
    fields = ("structure", "density", "kind", "temperature", "value_dtype", "input")
    same = all(getattr(first, field) == getattr(second, field) for field in fields)
    same = same and dict(first.densities) == dict(second.densities)
    for field in ("masks", "values", "statistics"):
        ours, theirs = getattr(first, field), getattr(second, field)
        same = same and ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)
    return same


def same_bits(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.numpy().tobytes() == second.numpy().tobytes()
    )
