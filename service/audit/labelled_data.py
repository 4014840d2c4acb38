"""Labelled images for an audit, from files that are not believed: zip, folder, npz. Or generated, for a smoke test.

A zip or folder is `[.../]test/<class>/<file>`, or `<class>/<file>` if nothing lies under test/. An npz holds `images`,
uint8 [N, 32, 32, 3] or [N, 3, 32, 32], and `labels`, whole numbers [N]; objects are never unpickled.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model_store.input_spec import CIFAR10_INPUT
from service.audit.errors import DataRejected
from service.errors import ServiceError
from service.web.decoder import decode

SIZE: Final = CIFAR10_INPUT.width

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
MAX_FILES: Final = 200_000
MAX_FILE_BYTES: Final = 8 << 20
MAX_ARRAY_BYTES: Final = 1 << 28  # 87,000 images
MAX_PIXELS: Final = 4_000_000
GENERATED: Final = "generated"
Read = Callable[[str], bytes]


@dataclass(frozen=True)
class LabelledImages:
    """pixels: uint8 [N, 3, 32, 32].  labels: int64 [N], indices of the library's classes.  ids: N names.

    origin: what the images are, in words.  held_out: whether they lay under test/, so that no search has seen them.
    """

    name: str
    origin: str
    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    held_out: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 over pixels and labels, in order."""
        state = hashlib.sha256(self.pixels.numpy().tobytes())
        state.update(self.labels.numpy().tobytes())
        return state.hexdigest()

    def first(self, count: int) -> "LabelledImages":
        return LabelledImages(
            self.name, self.origin, self.pixels[:count], self.labels[:count], self.ids[:count], self.held_out
        )


def read_data(path: Path, classes: Sequence[str], images: int) -> LabelledImages:
    """The first `images` of a data set, dealt class by class in the order of their names, so that every prefix is
    balanced. Raises DataRejected, naming the file, what was found and what was expected."""
    try:
        if path.is_dir():
            return read_folder(path, classes, images)
        if not path.is_file():
            raise DataRejected(f"{path.name}: no such file or folder; expected a zip, an npz or a folder of images")
        if path.suffix == ".npz":
            return read_npz(path, classes, images)
        return read_zip(path, classes, images)
    except OSError as error:
        raise DataRejected(f"{path.name}: cannot be read ({error.strerror})") from None


def read_folder(path: Path, classes: Sequence[str], images: int) -> LabelledImages:
    root = path.resolve()
    files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if regular(file, root)}
    if len(files) > MAX_FILES:
        raise DataRejected(f"{path.name}: {len(files)} files; at most {MAX_FILES} are read")
    return read_tree(path.name, list(files), lambda name: bounded(name, files[name]), classes, images)


def regular(file: Path, root: Path) -> bool:
    return file.is_file() and file.resolve().is_relative_to(root)


def bounded(name: str, file: Path) -> bytes:
    if file.stat().st_size > MAX_FILE_BYTES:
        raise DataRejected(f"{name}: {file.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read")
    return file.read_bytes()


def read_zip(path: Path, classes: Sequence[str], images: int) -> LabelledImages:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {item.filename: item for item in archive.infolist() if not item.is_dir()}
            if len(members) > MAX_FILES:
                raise DataRejected(f"{path.name}: {len(members)} files; at most {MAX_FILES} are read")
            return read_tree(path.name, list(members), lambda name: unzipped(archive, members[name]), classes, images)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataRejected(f"{path.name}: not a readable zip ({error!s:.100})") from None


def unzipped(archive: zipfile.ZipFile, item: zipfile.ZipInfo, most: int = MAX_FILE_BYTES) -> bytes:
    """One file of a zip, read no further than its header says and we allow."""
    name, size = item.filename[:100], item.file_size
    if size > most:
        raise DataRejected(f"{name}: {size} bytes once unpacked; at most {most} are read")
    with archive.open(item) as file:
        data = file.read(size + 1)
    if len(data) != size:
        raise DataRejected(f"{name}: {len(data)} bytes; its header says {size}")
    return data


def read_tree(where: str, names: Sequence[str], read: Read, classes: Sequence[str], images: int) -> LabelledImages:
    found = under_classes(names)
    held_out = any(parts[-3:-2] == ("test",) for parts in found.values())
    if held_out:
        found = {name: parts for name, parts in found.items() if parts[-3:-2] == ("test",)}
    elif any(parts[-3:-2] == ("train",) for parts in found.values()):
        raise DataRejected(f"{where}: images under train/ and none under test/; a search may have seen them")
    by_class = grouped(where, found, classes)
    chosen = round_robin(by_class, images)
    pixels = torch.stack([decoded(where, name, read(name)) for name, _ in chosen])
    labels = torch.tensor([label for _, label in chosen])
    ids = tuple("/".join(found[name][-3:]) for name, _ in chosen)
    return LabelledImages(where, f"files of {where}", pixels, labels, ids, held_out)


def under_classes(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The image files that lie in a folder, by name, with the parts of their path."""
    parts = {name: PurePosixPath(name.replace("\\", "/")).parts for name in sorted(names)}
    return {name: path for name, path in parts.items() if len(path) >= 2 and name.lower().endswith(SUFFIXES)}


def grouped(where: str, found: Mapping[str, tuple[str, ...]], classes: Sequence[str]) -> dict[int, list[str]]:
    if not found:
        raise DataRejected(f"{where}: no images in folders named after their class; without labels nothing is measured")
    index = {name: label for label, name in enumerate(classes)}
    strange = sorted({parts[-2] for parts in found.values()} - set(index))
    if strange:
        raise DataRejected(
            f"{where}: class {strange[0][:60]!r} is none of the library's {len(classes)}: {', '.join(classes)[:200]}"
        )
    by_class: dict[int, list[str]] = {}
    for name, parts in found.items():
        by_class.setdefault(index[parts[-2]], []).append(name)
    return by_class


def round_robin(by_class: Mapping[int, Sequence[str]], images: int) -> list[tuple[str, int]]:
    """Round by round, one of each class; every round in the order of the classes."""
    ranked = [(rank, label, name) for label, names in by_class.items() for rank, name in enumerate(names)]
    return [(name, label) for _, label, name in sorted(ranked)[:images]]


def decoded(where: str, name: str, data: bytes) -> Tensor:
    try:
        return torch.from_numpy(decode(data, CIFAR10_INPUT, MAX_PIXELS))
    except ServiceError as error:
        raise DataRejected(f"{where}: {name[-100:]}: {error.message}") from None


# npz


def read_npz(path: Path, classes: Sequence[str], images: int) -> LabelledImages:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: read_array(archive, name, path.name) for name in ("images", "labels")}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataRejected(f"{path.name}: not a readable npz ({error!s:.100})") from None
    pixels, labels = as_pixels(path.name, arrays["images"]), as_labels(path.name, arrays["labels"], len(classes))
    if len(pixels) != len(labels) or not len(labels):
        raise DataRejected(f"{path.name}: {len(pixels)} images, {len(labels)} labels; expected as many, at least one")
    by_class: dict[int, list[str]] = {}
    for place, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(f"{place:07d}")
    index = [int(name) for name, _ in round_robin(by_class, images)]
    ids = tuple(f"{path.stem}/{place}" for place in index)
    return LabelledImages(
        path.name, f"arrays of {path.name}", pixels[index].contiguous(), labels[index], ids, held_out=False
    )


def read_array(archive: zipfile.ZipFile, name: str, where: str) -> NDArray[Any]:
    """An array whose header is checked before anything is allocated for it."""
    try:
        item = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise DataRejected(f"{where}: no array {name!r}; expected `images` and `labels`") from None
    data = unzipped(archive, item, MAX_ARRAY_BYTES)
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except (ValueError, KeyError) as error:
        raise DataRejected(f"{where}: {name}: not a readable array ({error!s:.100})") from None
    if dtype.hasobject or dtype.kind not in "ui":
        raise DataRejected(f"{where}: {name} of {dtype}; expected whole numbers (images: uint8)")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    body = data[stream.tell() :]
    if count * dtype.itemsize != len(body):
        raise DataRejected(f"{where}: {name}: {len(body)} bytes for the shape {list(shape)} of {dtype}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def as_pixels(where: str, array: NDArray[Any]) -> Tensor:
    layouts = ((SIZE, SIZE, 3), (3, SIZE, SIZE))
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] not in layouts:
        raise DataRejected(
            f"{where}: images are {array.dtype} {list(array.shape)}; expected uint8 [N, 32, 32, 3] or [N, 3, 32, 32]"
        )
    ordered = array if array.shape[1] == 3 else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(ordered).copy())


def as_labels(where: str, array: NDArray[Any], classes: int) -> Tensor:
    if array.ndim != 1:
        raise DataRejected(f"{where}: labels are of shape {list(array.shape)}; expected [N]")
    if len(array) and not 0 <= int(array.min()) <= int(array.max()) < classes:
        raise DataRejected(
            f"{where}: labels from {int(array.min())} to {int(array.max())}; the library has {classes} classes, from 0"
        )
    return torch.from_numpy(array.astype(np.int64))


# Where nothing is configured


def generated(images: int, seed: int, label: Callable[[Tensor], Tensor]) -> LabelledImages:
    """Smooth random colours, labelled with what the ensemble itself says of them: clean accuracy means nothing here,
    and a robust accuracy only says that the attacks run and bite.

    label: uint8 [N, 3, 32, 32] -> int64 [N].
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, 3, 6, 6, generator=generator)
    smooth = functional.interpolate(coarse, size=SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    pixels = (smooth * 255).round().to(torch.uint8)
    ids = tuple(f"{GENERATED}/{seed}/{index}" for index in range(images))
    origin = "generated smooth colours, labelled by the ensemble's own most frequent answer: no measure of accuracy"
    return LabelledImages(GENERATED, origin, pixels, label(pixels), ids, held_out=True)
