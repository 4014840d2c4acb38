"""The grid of pixels that an image file can carry, and distances on it."""

import math
from typing import Final

import torch
from torch import Tensor

BISECTIONS: Final = 12


def quantize_to_uint8(images: Tensor, clean: Tensor, norm: str, epsilon: float) -> Tensor:
    """uint8 [N, 3, H, W]: the nearest images an 8-bit file can hold that are still inside the threat model.

    images: floats in [0, 1].  clean: uint8.
    """
    offset = images.detach().cpu() * 255 - clean
    rounded = offset.round()
    if norm == "linf":
        most = math.floor(epsilon * 255 + 1e-6)
        rounded = rounded.clamp(-most, most)
    else:
        rounded = longest_rounding(offset, epsilon * 255)
    return (clean + rounded).clamp(0, 255).to(torch.uint8)


def longest_rounding(offset: Tensor, most: float) -> Tensor:
    """offset: [N, 3, H, W] in 255ths. Rounded, once it is scaled down by no more than its l2 length needs."""
    low, high = torch.zeros(len(offset)), torch.ones(len(offset))
    for scale in (high, *[None] * BISECTIONS):
        tried = (low + high) / 2 if scale is None else scale.clone()
        inside = (offset * tried[:, None, None, None]).round().flatten(1).double().square().sum(dim=1) <= most**2 + 1e-9
        low, high = torch.where(inside, tried, low), torch.where(inside, high, tried)
    return (offset * low[:, None, None, None]).round()


def distance(pixels: Tensor, clean: Tensor, norm: str) -> Tensor:
    """float64 [N], in pixel units of [0, 1]."""
    offset = (pixels.to(torch.float64) - clean.to(torch.float64)).flatten(1) / 255
    return offset.abs().amax(dim=1) if norm == "linf" else offset.norm(dim=1)
