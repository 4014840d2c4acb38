"""Random crops and mirror images of a training batch."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

PADDING: Final = 8  # the share of a side that crops are shifted by: an eighth, 4 pixels of 32


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by an eighth, and mirror images by a fair coin. images: floats [N, 3, H, W]."""
    count, _, height, width = images.shape
    pads = height // PADDING, width // PADDING
    padded = functional.pad(images, (pads[1], pads[1], pads[0], pads[0]))
    top, left = (torch.randint(0, 2 * pad + 1, (count, 1), generator=generator) for pad in pads)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count).view(-1, 1, 1)
    return padded[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
