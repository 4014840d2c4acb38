"""Random crops and mirror images of a training batch."""

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by 4, and mirror images by a fair coin. images: floats [N, 3, H, W]."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (PADDING,) * 4)
    top, left = (torch.randint(0, 2 * PADDING + 1, (count, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count).view(-1, 1, 1)
    return padded[index, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
