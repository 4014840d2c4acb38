"""Labelled images from disk, split so that search, selection and test images never overlap.

Three layouts are read: torchvision's CIFAR-10 (`cifar-10-batches-py`), an image folder
(`{train,test}/<class>/<file>`), and a zip of such a folder. Decoded once, the arrays are kept in a cache.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from model_store import images
from model_store.errors import ImageRejected
from model_store.files import replacing
from model_store.input_spec import CIFAR10_INPUT
from model_store.quiet_imports import import_cifar10
from training.errors import DataRejected

SIZE: Final = CIFAR10_INPUT.width
SELECTION_PER_CLASS: Final = 100
SUFFIXES: Final = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
CACHE: Final = ".images"  # in a --state folder: decoded arrays
LAYOUTS: Final = (
    "expected cifar-10-batches-py (torchvision), or train/<class>/* and test/<class>/* as a folder or a zip of one; "
    "`tombola fetch` downloads CIFAR-10"
)


@dataclass(frozen=True)
class Images:
    """pixels: uint8 [N, 3, 32, 32].  labels: int64 [N].  names: N file names, unique, in order."""

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
    held: list[int] = []
    kept: list[int] = []
    for i in order:
        label = int(train.labels[i])
        taken[label] = taken.get(label, 0) + 1
        (held if taken[label] <= per_class else kept).append(i)
    for label, name in enumerate(classes):
        if taken.get(label, 0) <= per_class:
            raise DataRejected(f"class {name!r}: {taken.get(label, 0)} training images; expected more than {per_class}")
    return Split(classes, train.pick(torch.tensor(kept)), train.pick(torch.tensor(held)), test)


def read_split(path: Path, cache: Path | None = None) -> Split:
    """Reads any of the three layouts. Raises DataRejected, saying what was found and what was expected.

    cache: the folder that decoded arrays are kept in, unless TRAINING_CACHE names another; None for nowhere.
    """
    path = Path(path)
    if not path.exists():
        raise DataRejected(f"{path}: no such file or folder; {LAYOUTS}")
    if path.is_dir() and (path / "cifar-10-batches-py").is_dir():
        return read_torchvision(path)
    key = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else folder_key(path)
    folder = os.environ.get("TRAINING_CACHE") or cache
    stored = Path(folder) / f"{key}.npz" if folder else None
    if stored and stored.exists():
        return load_arrays(stored)
    split = read_zip(path) if path.is_file() else read_folder(path)
    if stored:
        save_arrays(stored, split)
    return split


def read_torchvision(root: Path) -> Split:
    """The original data set. torchvision checks each file's known MD5 before it reads it, so no unknown pickle runs."""
    parts: list[Images] = []
    for train in (True, False):
        try:
            data = import_cifar10()(str(root), train=train)
        except RuntimeError as error:
            raise DataRejected(f"{root}: {error}; `tombola fetch {root}` downloads it again") from None
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        kind = "train" if train else "test"
        names = tuple(f"{kind}/{data.classes[label]}/{i:05d}" for i, label in enumerate(data.targets))
        parts.append(Images(pixels, torch.tensor(data.targets), names))
    return split_of(tuple(data.classes), parts[0], parts[1])


def read_folder(root: Path) -> Split:
    files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}
    return read_tree(str(root), files, lambda name: files[name].read_bytes())


def read_zip(path: Path) -> Split:
    try:
        with zipfile.ZipFile(path) as archive:
            files = {item.filename: item for item in archive.infolist() if not item.is_dir()}
            return read_tree(str(path), files, lambda name: archive.read(files[name]))
    except zipfile.BadZipFile as error:
        raise DataRejected(f"{path}: not a readable zip ({error}); {LAYOUTS}") from None


def read_tree(where: str, names: Iterable[str], read: Callable[[str], bytes]) -> Split:
    """`names` are paths `[anything/]{train,test}/<class>/<file>`; other files are passed over."""
    found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name in sorted(names):
        parts = Path(name).parts
        if len(parts) >= 3 and parts[-3] in found and Path(name).suffix.lower() in SUFFIXES:
            found[parts[-3]].append((parts[-2], name))
    classes = tuple(sorted({kind for kind, _ in found["train"]}))
    if len(classes) < 2 or not found["test"]:
        raise DataRejected(
            f"{where}: {len(classes)} classes under train/, {len(found['test'])} images under test/; {LAYOUTS}"
        )
    index = {name: label for label, name in enumerate(classes)}
    if strange := sorted({kind for kind, _ in found["test"]} - set(classes)):
        raise DataRejected(
            f"{where}: test/{strange[0]} has no counterpart under train/; expected the same classes in both"
        )
    train, test = (decode_all(where, found[part], index, read) for part in ("train", "test"))
    return split_of(classes, train, test)


def decode_all(
    where: str, items: list[tuple[str, str]], index: Mapping[str, int], read: Callable[[str], bytes]
) -> Images:
    pixels = torch.empty(len(items), 3, SIZE, SIZE, dtype=torch.uint8)
    shown = track(items, description="decoding images", transient=True, disable=len(items) < 5_000)
    for i, (_, name) in enumerate(shown):
        pixels[i] = decode(f"{where}: {name}", read(name))
    labels = torch.tensor([index[kind] for kind, _ in items], dtype=torch.int64)
    return Images(pixels, labels, tuple("/".join(Path(name).parts[-3:]) for _, name in items))


def decode(where: str, data: bytes) -> Tensor:
    """One encoded image -> uint8 [3, 32, 32]; another size is resized (bilinear, antialiased)."""
    try:
        image = images.decode(data, CIFAR10_INPUT, max_pixels=images.MAX_PIXELS, formats=images.DATA_FORMATS)
    except ImageRejected as error:
        raise DataRejected(f"{where}: not a readable image ({error})") from None
    return torch.from_numpy(image.pixels)


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
    """In order: floats [<= size, 3, 32, 32] in [0, 1] and labels."""
    for start in range(0, len(images), size):
        yield as_floats(images.pixels[start : start + size]), images.labels[start : start + size]
