"""Labelled images from disk, split so that search, selection and test images never overlap.

model_store.labelled_images reads them. Decoded once, the arrays are kept in a cache.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from model_store.errors import DataRejected as ReadRejected
from model_store.errors import DataUnlabelled
from model_store.files import replacing
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.labelled_images import LAYOUTS, LOCAL, DataSet, Part, decode_part, open_data, ordered
from training.errors import DataRejected
from training.files import write_text

SELECTION_PER_CLASS: Final = 100
CACHE: Final = ".images"  # in a --state folder: decoded arrays
HELD_OUT_SHARE: Final = 10  # one image of so many is a test image, where the data set has no part for it
KEY_VERSION: Final = 2  # of the cache: another decoder gives other pixels


@dataclass(frozen=True)
class Images:
    """pixels: uint8 [N, 3, H, W].  labels: int64 [N].  names: N file names, unique, in order."""

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: Tensor) -> "Images":
        return Images(self.pixels[index], self.labels[index], tuple(self.names[i] for i in index.tolist()))

    def balanced(self, count: int) -> "Images":
        """The first `count` images, dealt class by class so that every class has its share."""
        ranks = torch.zeros(len(self), dtype=torch.int64)
        for label in range(int(self.labels.max()) + 1):
            members = self.labels == label
            ranks[members] = torch.arange(int(members.sum()))
        return self.pick(torch.argsort(ranks, stable=True)[:count].sort().values)


@dataclass(frozen=True)
class Split:
    """search: what masks and weights see.  selection: held-out training images.  test: for reported figures alone."""

    classes: tuple[str, ...]
    search: Images
    selection: Images
    test: Images

    @cached_property
    def digest(self) -> str:
        """SHA-256 over classes, pixels and labels of all three parts: what provenance names as the data."""
        state = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.search, self.selection, self.test):
            state.update(part.pixels.numpy().tobytes())
            state.update(part.labels.numpy().tobytes())
        return state.hexdigest()


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


def split_of(classes: tuple[str, ...], train: Images, test: Images, per_class: int = SELECTION_PER_CLASS) -> Split:
    """Sets aside the first `per_class` training images of each class, by file name, for selection."""
    order = sorted(range(len(train)), key=lambda i: train.names[i])
    taken: dict[int, int] = {}
    chosen: list[int] = []
    kept: list[int] = []
    for i in order:
        label = int(train.labels[i])
        taken[label] = taken.get(label, 0) + 1
        (chosen if taken[label] <= per_class else kept).append(i)
    for label, name in enumerate(classes):
        if taken.get(label, 0) <= per_class:
            raise DataRejected(f"class {name!r}: {taken.get(label, 0)} training images; expected more than {per_class}")
    return Split(classes, train.pick(torch.tensor(kept)), train.pick(torch.tensor(chosen)), test)


def read_split(
    path: Path, cache: Path | None = None, spec: InputSpec = CIFAR10_INPUT, *, skip_damaged: bool = False
) -> Split:
    """Reads any layout that model_store.labelled_images knows. What is passed over is said on standard error.

    Args:
      path: the data set.
      cache: the folder that decoded arrays are kept in, unless TOMBOLA_CACHE names another; None for nowhere.
      spec: the size of the pictures, and how others become it.
      skip_damaged: whether damaged pictures are passed over and listed.

    Raises:
      DataRejected: saying what was found and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise DataRejected(f"{path}: no such file or folder; {LAYOUTS}")
    key = hashlib.sha256(repr((KEY_VERSION, spec.shape, spec.resize, spec.interpolation, skip_damaged)).encode())
    key.update(path.read_bytes() if path.is_file() else folder_key(path).encode())
    folder = os.environ.get("TOMBOLA_CACHE") or cache
    stored = Path(folder) / f"{key.hexdigest()}.npz" if folder else None
    if stored and stored.exists():
        if (said := stored.with_suffix(".txt")).exists():
            print(said.read_text(encoding="utf-8"), end="", file=sys.stderr)
        return load_arrays(stored)
    try:
        with open_data(path, LOCAL) as data:
            split = split_data(path, data, spec, skip_damaged=skip_damaged)
            notes = "".join(f"{data.where}: {line}\n" for line in data.notes.lines(spec))
            print(notes, end="", file=sys.stderr)
    except DataUnlabelled as error:
        raise DataRejected(f"{path}: 0 classes under train/; {error}") from None
    except ReadRejected as error:
        raise DataRejected(f"{path}: {error}") from None
    if stored:
        save_arrays(stored, split)
        write_text(stored.with_suffix(".txt"), notes)
    return split


def split_data(path: Path, data: DataSet, spec: InputSpec, *, skip_damaged: bool) -> Split:
    train = data.parts.get("train") or data.parts.get("all")
    test = data.parts.get("test") or data.parts.get("val")
    classes = classes_of(data, train)
    if train is None or len(classes) < 2:
        names = ", ".join(sorted(data.parts))
        raise DataRejected(f"{path}: {len(classes)} classes under train/ (parts: {names}); {LAYOUTS}")
    everything = decode_images(data, train, classes, spec, skip_damaged=skip_damaged)
    if test is None:
        everything, held_out = hold_out(everything)
        text = f"no test/ and no val/: a tenth of each class, {len(held_out)} images, is kept apart as test images"
        print(f"{data.where}: {text}", file=sys.stderr)
        return split_of(classes, everything, held_out)
    if strange := sorted(set(test.labels) - set(train.labels)):
        raise DataRejected(
            f"{path}: test/{strange[0]} has no counterpart under train/; expected the same classes in both"
        )
    return split_of(classes, everything, decode_images(data, test, classes, spec, skip_damaged=skip_damaged))


def classes_of(data: DataSet, train: Part | None) -> tuple[str, ...]:
    if data.classes is not None and train is not None:
        return tuple(name for name in data.classes if name in set(train.labels))
    return ordered(data.where, train.labels) if train is not None else ()


def decode_images(data: DataSet, part: Part, classes: Sequence[str], spec: InputSpec, *, skip_damaged: bool) -> Images:
    index = {name: label for label, name in enumerate(classes)}
    pixels = np.empty((len(part), *spec.shape), np.uint8)
    shown = track(range(len(part)), description="decoding images", transient=True, disable=len(part) < 5_000)
    read = decode_part(data, part, shown, spec, pixels, skip_damaged=skip_damaged)
    labels = torch.tensor([index[part.labels[place]] for place in read], dtype=torch.int64)
    return Images(torch.from_numpy(pixels[: len(read)]), labels, tuple(part.ids[place] for place in read))


def hold_out(everything: Images) -> tuple[Images, Images]:
    """A tenth of each class, the last by name, apart from the rest."""
    order = sorted(range(len(everything)), key=lambda place: everything.names[place])
    members: dict[int, list[int]] = {}
    for place in order:
        members.setdefault(int(everything.labels[place]), []).append(place)
    apart = {place for places in members.values() for place in places[-max(1, len(places) // HELD_OUT_SHARE) :]}
    rest = [place for place in range(len(everything)) if place not in apart]
    return everything.pick(torch.tensor(rest, dtype=torch.int64)), everything.pick(torch.tensor(sorted(apart)))


def folder_key(root: Path) -> str:
    """Changes when a file is added, removed, resized or rewritten."""
    state = hashlib.sha256(str(root.resolve()).encode())
    for file in sorted(root.rglob("*")):
        if file.is_file():
            about = file.stat()
            state.update(f"{file.relative_to(root)}\n{about.st_size}\n{about.st_mtime_ns}\n".encode())
    return state.hexdigest()


PARTS: Final = ("search", "selection", "test")


def save_arrays(path: Path, split: Split) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {"classes": np.array(split.classes)}
    for part in PARTS:
        images: Images = getattr(split, part)
        arrays |= {
            f"{part}_pixels": images.pixels.numpy(),
            f"{part}_labels": images.labels.numpy(),
            f"{part}_names": np.array(images.names),
        }
    with replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> Split:
    with np.load(path, allow_pickle=False) as arrays:
        parts = (
            Images(
                torch.from_numpy(arrays[f"{part}_pixels"]),
                torch.from_numpy(arrays[f"{part}_labels"]),
                tuple(arrays[f"{part}_names"].tolist()),
            )
            for part in PARTS
        )
        return Split(tuple(arrays["classes"].tolist()), *parts)


def batches(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """In order: floats [<= size, 3, H, W] in [0, 1] and labels."""
    for start in range(0, len(images), size):
        yield as_floats(images.pixels[start : start + size]), images.labels[start : start + size]
