"""The training images that every search of a data set sets aside: to choose by, and never to learn from."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from model_store.errors import DataRejected

SELECTION_PER_CLASS: Final = 100
SELECTION_SHARE: Final = 5  # one training image of so many is for selection, where a class has fewer than 500


def selection_places(
    classes: Sequence[str], labels: Tensor, names: Sequence[str], per_class: int | None = None
) -> tuple[Tensor, Tensor]:
    """Where the search images and the selection images lie among training images, each class's by file name.

    Args:
      classes: their names.
      labels: int64 [N], of the training images.
      names: N file names.
      per_class: how many of each are for selection; None for SELECTION_PER_CLASS, or a fifth where there are few.

    Raises:
      DataRejected: a class has too few images for both.
    """
    counts = labels.bincount(minlength=len(classes)).tolist()
    share = [per_class or max(1, min(SELECTION_PER_CLASS, count // SELECTION_SHARE)) for count in counts]
    for name, count, most in zip(classes, counts, share, strict=True):
        if count <= most:
            raise DataRejected(f"class {name!r}: {count} training images; expected more than {most}")
    taken: dict[int, int] = {}
    chosen: list[int] = []
    kept: list[int] = []
    for i in sorted(range(len(names)), key=lambda i: names[i]):
        label = int(labels[i])
        taken[label] = taken.get(label, 0) + 1
        (chosen if taken[label] <= share[label] else kept).append(i)
    return torch.tensor(kept), torch.tensor(chosen)
