"""Scores -> masks: the top-k of each layer by magnitude, and the gradient that lets the scores be trained.

The mask is a step function of the scores, so its gradient is taken straight through |score| (Ramanujan et al.,
"What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020; Robust Scratch Tickets, NeurIPS 2021): each score,
kept or not, moves by d loss / d mask, times sign(score). Without that sign half of all scores move the wrong way.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_store.ticket import kept_count


def top_k(scores: Tensor, density: float) -> Tensor:
    """Booleans in the shape of `scores`, true for the kept_count() largest by magnitude, however many are tied."""
    kept = torch.topk(scores.abs().flatten(), kept_count(scores.numel(), density), sorted=False).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[kept] = True
    return mask.view_as(scores)


def pack_mask(mask: Tensor) -> Tensor:
    """Booleans of any shape -> uint8, eight a byte in the order of memory; the last byte is filled with zeros."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().ravel()))


def unpack_mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """Undoes pack_mask, on the device of `bits`."""
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape)).astype(np.bool_)
    return torch.from_numpy(flat).view(shape).to(bits.device)


def spread(kept: Tensor, mask: Tensor) -> Tensor:
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
