"""Labelled images from disk, split so that search, selection and test images never overlap.

model_store.labelled_images reads them. Decoded once, the arrays are kept in a cache, and mapped from there: however
many pictures there are, a search holds a batch of them in memory.
"""

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import TypeAdapter
from rich.progress import track
from torch import Tensor

from model_store.data_files import LOCAL, fingerprint
from model_store.data_layout import LAYOUTS, PartName, ordered
from model_store.errors import DataRejected as ReadRejected
from model_store.errors import DataUnlabelled
from model_store.files import replacing
from model_store.held_out import selection_places
from model_store.images import Pixels
from model_store.input_spec import CIFAR10_INPUT, InputSpec, Three
from model_store.labelled_images import DataSet, Part, decode_part, open_data
from training.errors import DataRejected
from training.files import write_text

CACHE: Final = ".images"  # in a --state folder: decoded arrays
HELD_OUT_SHARE: Final = 10  # one image of so many is a test image, where the data set has no part for it
KEY_VERSION: Final = 4  # of the cache: another decoder or another layout
UNBALANCED: Final = 5  # times as many images in one class as in another, from which a person is warned
LONGEST_CLASS: Final = 200  # characters of a class's name, as a library's manifest holds it
COPIED: Final = 256  # images in memory while arrays are copied
MEASURED_BYTES: Final = 2**28  # of pixels that the statistics are measured on; of more, every second or third image
BATCH_NUMBERS: Final = 2**23  # of one forward pass of images, 32 MiB of floats; 250 images of 64x64 are fewer
CIFAR10_CLASSES: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


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
    """search: what masks and weights see.  selection: held-out training images.  test: for reported figures alone.

    input: the images' size, and their statistics.  stored_digest: what `digest` is, where a cache knows it.
    """

    classes: tuple[str, ...]
    search: Images
    selection: Images
    test: Images
    input: InputSpec = CIFAR10_INPUT
    stored_digest: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over classes, pixels and labels of all three parts: what provenance names as the data."""
        if self.stored_digest is not None:
            return self.stored_digest
        state = hashlib.sha256("\n".join(self.classes).encode())
        for part in (self.search, self.selection, self.test):
            for chunk in torch.split(part.pixels, COPIED):
                state.update(chunk.numpy().tobytes())
            state.update(part.labels.numpy().tobytes())
        return state.hexdigest()


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


def split_of(classes: tuple[str, ...], train: Images, test: Images, per_class: int | None = None) -> Split:
    """Sets aside the first images of each class, by file name, for selection: see `selection_places`."""
    kept, chosen = selection_places(classes, train.labels, train.names, per_class)
    return Split(classes, train.pick(kept), train.pick(chosen), test)


def read_split(
    path: Path, cache: Path | None = None, spec: InputSpec = CIFAR10_INPUT, *, skip_damaged: bool = False
) -> Split:
    """Reads any layout that model_store.labelled_images knows. What is passed over is said on standard error.

    Args:
      path: the data set.
      cache: the folder that decoded arrays are kept in, unless TOMBOLA_CACHE names another; None for nowhere.
      spec: the size of the pictures, and how others become it. Its statistics are not used: they are measured.
      skip_damaged: whether damaged pictures are passed over and listed.

    Raises:
      DataRejected: saying what was found and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise DataRejected(f"{path}: no such file or folder; {LAYOUTS}")
    key = hashlib.sha256(repr((KEY_VERSION, spec.shape, spec.resize, spec.interpolation, skip_damaged)).encode())
    key.update(fingerprint(path).encode())
    folder = os.environ.get("TOMBOLA_CACHE") or cache
    stored = Path(folder) / key.hexdigest() if folder else None
    if stored and (stored / INDEX).exists():
        print((stored / NOTES).read_text(encoding="utf-8"), end="", file=sys.stderr)
        return load_arrays(stored)
    try:
        with open_data(path, LOCAL) as data, ExitStack() as stack:
            decoded = decode_parts(path, data, spec, scratch_file(stored, stack) if stored else None, skip_damaged)
            lines = (*data.notes.lines(spec), *decoded.remarks)
            notes = "".join(f"{data.where}: {line}\n" for line in lines)
            print(notes, end="", file=sys.stderr)
            if stored:
                write_text(stored / NOTES, notes)
                save_arrays(stored, decoded)
                return load_arrays(stored)
            search, selection, test = (images.pick(rows) for images, rows in decoded.parts)
            return Split(decoded.classes, search, selection, test, decoded.input)
    except DataUnlabelled as error:
        raise DataRejected(f"{path}: 0 classes under train/; {error}") from None
    except ReadRejected as error:
        raise DataRejected(f"{path}: {error}") from None


@dataclass(frozen=True)
class Decoded:
    """A data set before its parts are copied apart: of each part the images that it lies in, and where."""

    classes: tuple[str, ...]
    parts: tuple[tuple[Images, Tensor], tuple[Images, Tensor], tuple[Images, Tensor]]  # in the order of PARTS
    input: InputSpec
    own_test: bool  # whether the data set has a part for it

    @property
    def remarks(self) -> Iterator[str]:
        """What a person should know before hours are spent on it."""
        if not self.own_test:
            apart = len(self.parts[2][1])
            yield f"no test/ and no val/: a tenth of each class, {apart} images, is kept apart as test images"
        labels = torch.cat([images.labels[rows] for images, rows in self.parts[:2]])
        counts = labels.bincount(minlength=len(self.classes)).tolist()
        fewest, most = min(counts), max(counts)
        if most >= UNBALANCED * fewest:
            rare, common = self.classes[counts.index(fewest)], self.classes[counts.index(most)]
            yield (
                f"unbalanced classes: {fewest} training images of {rare!r}, {most} of {common!r}; accuracy counts "
                "images, so it says little of the rare ones"
            )


Allocate = Callable[[tuple[int, ...]], Pixels]
"""Room for an array of this shape."""


def scratch_file(stored: Path, stack: ExitStack) -> Allocate:
    """Room on the disk that nobody else sees, and that is free again once the stack is closed, or the process ends."""
    stored.mkdir(parents=True, exist_ok=True)

    def allocate(shape: tuple[int, ...]) -> Pixels:
        return np.memmap(stack.enter_context(tempfile.TemporaryFile(dir=stored)), np.uint8, "w+", shape=shape)

    return allocate


@dataclass(frozen=True)
class ListedParts:
    """A data set's parts before anything is decoded. test: None where it has none of its own."""

    classes: tuple[str, ...]
    train: Part
    test: Part | None

    @property
    def pictures(self) -> int:
        return len(self.train) + (len(self.test) if self.test is not None else 0)

    def sizes(self) -> dict[str, int]:
        """How many images each of PARTS will have."""
        index = {name: label for label, name in enumerate(self.classes)}
        labels, names = torch.tensor([index[label] for label in self.train.labels]), self.train.ids
        tests = len(self.test) if self.test is not None else 0
        if self.test is None:
            rest, apart = held_out_places(labels, names)
            labels, names, tests = labels[rest], tuple(names[place] for place in rest.tolist()), len(apart)
        search, selection = selection_places(self.classes, labels, names)
        return {"search": len(search), "selection": len(selection), "test": tests}


def list_parts(path: Path, data: DataSet) -> ListedParts:
    """Raises DataRejected for parts that nothing can be searched on."""
    learnt, held_out = (first_of(data, names) for names in (("train", "all"), ("test", "val")))
    train, test = (data.parts[name] if name else None for name in (learnt, held_out))
    data.notes.leave_out(data.parts, [name for name in (learnt, held_out) if name])
    classes = classes_of(data, train)
    if train is None or len(classes) < 2:
        names = ", ".join(sorted(data.parts))
        raise DataRejected(f"{path}: {len(classes)} classes under train/ (parts: {names}); {LAYOUTS}")
    for name in classes:
        if len(name) > LONGEST_CLASS:
            raise DataRejected(f"{path}: class {name[:40]!r}...: {len(name)} characters; at most {LONGEST_CLASS}")
    if test is not None and (strange := sorted(set(test.labels) - set(train.labels))):
        raise DataRejected(
            f"{path}: test/{strange[0]} has no counterpart under train/; expected the same classes in both"
        )
    return ListedParts(classes, train, test)


def first_of(data: DataSet, names: Sequence[PartName]) -> PartName | None:
    return next((name for name in names if name in data.parts), None)


def decode_parts(path: Path, data: DataSet, spec: InputSpec, allocate: Allocate | None, skip_damaged: bool) -> Decoded:
    """allocate: for the decoded pictures; None for memory."""
    listed = list_parts(path, data)
    train, test, classes = listed.train, listed.test, listed.classes
    everything = decode_images(data, train, classes, spec, allocate, skip_damaged=skip_damaged)
    if test is None:
        rest, apart = held_out_places(everything.labels, everything.names)
        held_out = everything
    else:
        held_out = decode_images(data, test, classes, spec, allocate, skip_damaged=skip_damaged)
        rest, apart = torch.arange(len(everything)), torch.arange(len(held_out))
    ids = [everything.names[place] for place in rest.tolist()]
    kept, chosen = (rest[places] for places in selection_places(classes, everything.labels[rest], ids))
    parts = (everything, kept), (everything, chosen), (held_out, apart)
    return Decoded(classes, parts, measured_input(classes, everything.pixels, rest, spec), test is not None)


def measured_input(classes: tuple[str, ...], pixels: Tensor, rows: Tensor, spec: InputSpec) -> InputSpec:
    """The input with the mean and the deviation of training images, to four decimals.

    pixels: uint8 [N, 3, H, W].  rows: which of them are training images.

    CIFAR-10 at its own size keeps its published statistics, however its files were made.
    """
    if classes == CIFAR10_CLASSES and replace(spec, mean=CIFAR10_INPUT.mean, std=CIFAR10_INPUT.std) == CIFAR10_INPUT:
        return CIFAR10_INPUT
    step = -(-len(rows) * spec.numel // MEASURED_BYTES)
    counts = np.zeros((3, 256), np.int64)
    for chunk in torch.split(rows[::step], COPIED):
        for channel, values in enumerate(pixels[chunk].unbind(1)):
            counts[channel] += np.bincount(values.numpy().ravel(), minlength=256)
    levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0))
    return replace(spec, mean=three(mean), std=three(np.maximum(std, 1e-3)))


def three(values: np.ndarray) -> Three:
    red, green, blue = (round(float(value), 4) for value in values)
    return red, green, blue


def classes_of(data: DataSet, train: Part | None) -> tuple[str, ...]:
    if data.classes is not None and train is not None:
        return tuple(name for name in data.classes if name in set(train.labels))
    return ordered(data.where, train.labels) if train is not None else ()


def decode_images(
    data: DataSet,
    part: Part,
    classes: Sequence[str],
    spec: InputSpec,
    allocate: Allocate | None,
    *,
    skip_damaged: bool,
) -> Images:
    index = {name: label for label, name in enumerate(classes)}
    shape = (len(part), *spec.shape)
    pixels = np.empty(shape, np.uint8) if allocate is None else allocate(shape)
    shown = track(range(len(part)), description="decoding images", transient=True, disable=len(part) < 5_000)
    read = decode_part(data, part, shown, spec, pixels, skip_damaged=skip_damaged)
    labels = torch.tensor([index[part.labels[place]] for place in read], dtype=torch.int64)
    return Images(torch.from_numpy(pixels[: len(read)]), labels, tuple(part.ids[place] for place in read))


def held_out_places(labels: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Where the rest lies, and a tenth of each class, the last by name."""
    members: dict[int, list[int]] = {}
    for place in sorted(range(len(names)), key=lambda place: names[place]):
        members.setdefault(int(labels[place]), []).append(place)
    apart = {place for places in members.values() for place in places[-max(1, len(places) // HELD_OUT_SHARE) :]}
    rest = [place for place in range(len(names)) if place not in apart]
    return torch.tensor(rest, dtype=torch.int64), torch.tensor(sorted(apart))


PARTS: Final = ("search", "selection", "test")
NOTES: Final = "notes.txt"  # what was said of the data set when it was decoded
INDEX: Final = "index.npz"  # written last: once it is there, the others are


def save_arrays(folder: Path, decoded: Decoded) -> None:
    """A file of pixels for each part, that can be mapped, and one of all the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {"classes": np.array(decoded.classes)}
    state = hashlib.sha256("\n".join(decoded.classes).encode())  # as Split.digest has it
    for part, (images, rows) in zip(PARTS, decoded.parts, strict=True):
        with replacing(folder / f"{part}.npy") as file:
            shape = (len(rows), *decoded.input.shape)
            pixels = npy.open_memmap(file.name, "w+", np.uint8, shape)
            for start in range(0, len(rows), COPIED):
                chunk = images.pixels[rows[start : start + COPIED]].numpy()
                pixels[start : start + len(chunk)] = chunk
                state.update(chunk.tobytes())
            pixels.flush()
        labels = images.labels[rows].numpy()
        state.update(labels.tobytes())
        names = np.array([images.names[place] for place in rows.tolist()])
        arrays |= {f"{part}_labels": labels, f"{part}_names": names}
    arrays |= {"digest": np.array(state.hexdigest()), "input": np.array(json.dumps(asdict(decoded.input)))}
    with replacing(folder / INDEX) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(folder: Path) -> Split:
    with np.load(folder / INDEX, allow_pickle=False) as arrays:
        search, selection, test = (
            Images(
                mapped(folder / f"{part}.npy"),
                torch.from_numpy(arrays[f"{part}_labels"]),
                tuple(arrays[f"{part}_names"].tolist()),
            )
            for part in PARTS
        )
        spec = TypeAdapter(InputSpec).validate_json(str(arrays["input"]))
        return Split(tuple(arrays["classes"].tolist()), search, selection, test, spec, str(arrays["digest"]))


def mapped(path: Path) -> Tensor:
    """A file's array, read from the disk where it is used."""
    with warnings.catch_warnings():  # torch has no tensors that cannot be written, and warns; nobody writes into these
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False))


def batch_of(images: Images, most: int = 250) -> int:
    """How many images to run at once: fewer of large ones, so that memory does not grow with the size."""
    return max(2, min(most, BATCH_NUMBERS // images.pixels[0].numel()))


def batches(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """In order: floats [<= size, 3, H, W] in [0, 1] and labels."""
    for start in range(0, len(images), size):
        yield as_floats(images.pixels[start : start + size]), images.labels[start : start + size]
