"""A balanced sample of labelled images: test images before others, and of every class its share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store import labelled_images as reader
from model_store.data_layout import PartName
from model_store.errors import DataRejected
from model_store.held_out import selection_places
from model_store.input_spec import InputSpec

PREFERRED: Final[tuple[PartName, ...]] = ("test", "val", "all")


@dataclass(frozen=True)
class LabelledImages:
    """pixels: uint8 [N, 3, H, W].  labels: int64 [N], indices of the library's classes.  ids: N names.

    origin: what the images are, in words.  held_out: whether they lay under test/, so that no search has seen them.
    notes: what a person should know about the reading, a line each.
    """

    name: str
    origin: str
    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    held_out: bool
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 over pixels and labels, in order."""
        state = hashlib.sha256(self.pixels.numpy().tobytes())
        state.update(self.labels.numpy().tobytes())
        return state.hexdigest()

    def first(self, count: int) -> "LabelledImages":
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count], ids=self.ids[:count])


def read_sample(
    path: Path, classes: Sequence[str], images: int, spec: InputSpec, *, skip_damaged: bool = False
) -> LabelledImages:
    """The first `images` of a data set, dealt class by class in the order of their names, so that every prefix is
    balanced. Raises DataRejected, naming the file, what was found and what was expected."""
    with reader.open_data(path) as data:
        part, held_out = part_to_sample(data)
        labels = reader.class_indices(data.where, part, classes)
        sample = decode_first(data, part, labels, round_robin(labels), images, spec, skip_damaged=skip_damaged)
        notes = (*data.notes.lines(spec), *absent_classes(labels, classes))
    return replace(sample, held_out=held_out, notes=notes)


def read_selection(
    path: Path, classes: Sequence[str], images: int, spec: InputSpec, *, skip_damaged: bool = False
) -> LabelledImages | None:
    """Like read_sample, of the training images that every search of the data set sets aside. None where test images
    have no training images beside them, or those are too few. Raises DataRejected."""
    with reader.open_data(path) as data:
        part = data.parts.get("train")
        if part is None or not any(name in data.parts for name in PREFERRED):
            return None
        labels = reader.class_indices(data.where, part, classes)
        try:
            _, chosen = selection_places(classes, torch.from_numpy(labels), part.ids)
        except DataRejected:
            return None
        order = chosen.numpy()[round_robin(labels[chosen.numpy()])]
        return decode_first(data, part, labels, order, images, spec, skip_damaged=skip_damaged)


def decode_first(
    data: reader.DataSet,
    part: reader.Part,
    labels: NDArray[np.int64],
    order: NDArray[np.int64],
    images: int,
    spec: InputSpec,
    *,
    skip_damaged: bool,
) -> LabelledImages:
    """The first `images` of a part in an order. Raises DataRejected."""
    pixels = np.empty((min(images, len(order)), *spec.shape), np.uint8)
    index: list[int] = []
    while len(index) < len(pixels) and len(order):  # more than once only where damaged ones are passed over
        batch, order = np.split(order, [len(pixels) - len(index)])
        out = pixels[len(index) :]
        index += reader.decode_part(data, part, batch.tolist(), spec, out, skip_damaged=skip_damaged)
    return LabelledImages(
        data.where,
        f"{'arrays' if part.numbered else 'files'} of {data.where}",
        torch.from_numpy(pixels[: len(index)]),
        torch.from_numpy(labels[index]),
        tuple(part.ids[place] for place in index),
        held_out=True,
    )


def absent_classes(labels: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """What to say of classes without a picture: accuracy is over the others alone."""
    absent = sorted(set(range(len(classes))) - set(labels.tolist()))
    if not absent:
        return []
    names = ", ".join(classes[label][:40] for label in absent[:5])
    return [f"no pictures of {len(absent)} of the library's {len(classes)} classes, such as {names}: not measured"]


def part_to_sample(data: reader.DataSet) -> tuple[reader.Part, bool]:
    """The test images, or else validation images, or all where there are no parts; and whether no search saw them."""
    for name in PREFERRED:
        if part := data.parts.get(name):
            data.notes.leave_out({other: data.parts[other] for other in data.parts if other != "train"}, (name,))
            return part, name != "all"
    raise DataRejected(f"{data.where}: images under train/ and none under test/; a search may have seen them")


def round_robin(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order that takes one of each class, round by round; every round in the order of the classes."""
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranks[members] = np.arange(len(members))
    return np.lexsort((labels, ranks))
