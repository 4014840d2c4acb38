"""Densities of layers, scores, and their masks: the top-k of each layer by magnitude.

The mask is a step function of the scores, so its gradient is taken straight through |score|. Each score, kept or not,
moves by d loss / d mask, times sign(score). Without that sign half of all scores move the wrong way.
Sources: Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020; Robust Scratch Tickets,
NeurIPS 2021.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_store.structures import Network, convs
from model_store.ticket import Ticket, kept_count
from training.recipes import TrainConfig


def top_k(scores: Tensor, density: float) -> Tensor:
    """Booleans in the shape of `scores`, true for the kept_count() largest by magnitude, however many are tied.

    On a CPU NumPy finds the smallest of them ten times as fast as torch.topk. Where others tie with it, torch chooses.
    """
    magnitudes, count = scores.abs(), kept_count(scores.numel(), density)
    if scores.device.type == "cpu":
        place = scores.numel() - count
        mask = magnitudes >= float(np.partition(magnitudes.detach().flatten().numpy(), place)[place])
        if int(mask.sum()) == count:
            return mask
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(magnitudes.flatten(), count, sorted=False).indices] = True
    return mask.view_as(scores)


def scatter_values(kept: Tensor, mask: Tensor) -> Tensor:
    """Undoes `values[mask]`: the kept values in their places, zeros elsewhere."""
    values = torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device)
    values[mask] = kept
    return values


class StraightThrough(torch.autograd.Function):
    """Magnitudes -> the top-k mask as 0/1; backward is the identity."""

    @staticmethod
    def forward(_ctx: Any, magnitudes: Tensor, density: float) -> Tensor:
        return top_k(magnitudes, density).to(magnitudes.dtype)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def mask_of(scores: Tensor, density: float) -> Tensor:
    """0/1 in the shape of `scores`, differentiable: |score| is outside the step, so autograd supplies sign(score)."""
    mask: Tensor = StraightThrough.apply(scores.abs(), density)
    return mask


def score_gradient(weight_gradient: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """What autograd gives through `weight * mask_of(scores)`, from the gradient of the masked weight alone."""
    return weight_gradient * weight * scores.sign()


def init_weights(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Frozen weights +-sqrt(2 / fan_in) with fair random signs, for a convolution's weight [out, in, h, w]."""
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * math.sqrt(2 / math.prod(shape[1:]))


def init_scores(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform within +-1/sqrt(fan_in): kaiming_uniform(a=sqrt(5)), as Robust Scratch Tickets starts them."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(math.prod(shape[1:]))


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Intersection over union of two tickets' masks, all layers together: 1 for equal masks."""
    both = sum(int((first[name] & second[name]).sum()) for name in names)
    either = sum(int((first[name] | second[name]).sum()) for name in names)
    return both / either


def layer_densities(network: Network, recipe: TrainConfig) -> dict[str, float]:
    """Each convolution's density, by the recipe's allocation.

    - uniform: the same for all.
    - dense-ends: the stem and the classifier stay dense (they hold 1 % of the weights), the others have the density.
    - erk: see erk_densities.
    """
    layers = convs(network)
    if recipe.allocation == "erk":
        return erk_densities({name: layer.weight.shape for name, layer in layers.items()}, recipe.density)
    ends = {"stem.0", "classifier"} if recipe.allocation == "dense-ends" else set()
    return {name: 1.0 if name in ends else recipe.density for name in layers}


def erk_densities(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel (Evci et al., "Rigging the Lottery", ICML 2020): small layers are denser than large ones.

    Densities are in proportion to (outputs + inputs + kernel height + width) / weights, at most 1, and all layers
    together have `density`.

    shapes: of the weights [out, in, h, w].
    """
    dense: set[str] = set()
    while True:  # a layer that would be over 1 is dense, and the others share what it leaves
        rest = {name: sum(shape) for name, shape in shapes.items() if name not in dense}
        budget = density * sum(map(math.prod, shapes.values())) - sum(math.prod(shapes[name]) for name in dense)
        scale = budget / sum(rest.values()) if rest else 0.0
        full = {name for name, size in rest.items() if scale * size >= math.prod(shapes[name])}
        if not full:
            return {name: scale * rest[name] / math.prod(shapes[name]) if name in rest else 1.0 for name in shapes}
        dense |= full


def reproduce_ticket(weights: Tensor, scores: Tensor, start: Ticket, name: str) -> tuple[Tensor, Tensor]:
    """Frozen weights and scores that reproduce the ticket: its values where kept, its mask as the scores' top-k.

    A ticket does not keep its scores, only their order at the threshold; fresh magnitudes are ordered so that
    every kept weight outranks every other.
    """
    mask = start.masks[name]
    weights = weights.clone()
    weights[mask] = start.values[name]
    magnitudes = scores.abs().flatten().sort(descending=True).values
    kept = int(mask.sum())
    magnitude = torch.empty_like(scores)
    magnitude[mask], magnitude[~mask] = magnitudes[:kept], magnitudes[kept:]
    return weights, magnitude * scores.sign()


def begin_dense(dense: Ticket, name: str) -> tuple[Tensor, Tensor]:
    """Frozen weights and scores of a dense network's layer: its own weights, and their magnitudes as first scores.

    So a search begins at the mask that magnitude pruning would choose, and moves on from there (Sehwag et al., "HYDRA",
    NeurIPS 2020). Scores are scaled to the range that init_scores draws from.
    """
    weights = dense.values[name].view(dense.masks[name].shape)
    largest = weights.abs().max().clamp_min(torch.finfo(weights.dtype).tiny)
    return weights.clone(), weights / largest / math.sqrt(math.prod(weights.shape[1:]))
