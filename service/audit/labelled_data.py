"""Labelled images for an audit, from files that are not believed, or generated, for a smoke test."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from model_store.errors import DataRejected as ReadRejected
from model_store.image_sample import LabelledImages, read_sample, read_selection
from model_store.input_spec import InputSpec
from service.audit.errors import DataRejected
from service.audit.report.model import GENERATED


def read_data(
    path: Path, classes: Sequence[str], images: int, spec: InputSpec, *, skip_damaged: bool = False
) -> LabelledImages:
    """A balanced sample of a data set. Raises DataRejected, which an audit's callers know."""
    try:
        return read_sample(path, classes, images, spec, skip_damaged=skip_damaged)
    except ReadRejected as error:
        raise DataRejected(str(error)) from None


def read_held_out(
    path: Path, classes: Sequence[str], images: int, spec: InputSpec, *, skip_damaged: bool = False
) -> LabelledImages | None:
    """A balanced sample of training images that searches set aside; None where the data set has none.

    Raises DataRejected, which an audit's callers know.
    """
    try:
        return read_selection(path, classes, images, spec, skip_damaged=skip_damaged)
    except ReadRejected as error:
        raise DataRejected(str(error)) from None


def generated(images: int, seed: int, spec: InputSpec, label: Callable[[Tensor], Tensor]) -> LabelledImages:
    """Smooth random colours, labelled with what the ensemble itself says of them: clean accuracy means nothing here,
    and a robust accuracy only says that the attacks run and bite.

    label: uint8 [N, 3, H, W] -> int64 [N].
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, 3, 6, 6, generator=generator)
    smooth = functional.interpolate(coarse, size=spec.shape[1:], mode="bicubic", align_corners=False)
    pixels = (smooth.clamp(0, 1) * 255).round().to(torch.uint8)
    ids = tuple(f"{GENERATED}/{seed}/{index}" for index in range(images))
    origin = "generated smooth colours, labelled by the ensemble's own most frequent answer: no measure of accuracy"
    return LabelledImages(GENERATED, origin, pixels, label(pixels), ids, held_out=True)
