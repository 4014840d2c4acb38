"""Labelled pictures from disk, whoever made them: the one reader of data sets, for training and for audits.

- A folder, zip or tar of pictures: `[.../]{train,val,test}/<class>/.../<file>`, or `<class>/.../<file>` without parts.
- An npz of `images` and `labels`, or x and y, or x_train, y_train, x_test, y_test.
- CIFAR-10 and CIFAR-100 as torchvision keeps them: the folder that holds `cifar-10-batches-py`, or that folder itself.

Nothing is unpickled here; torchvision unpickles CIFAR's files once their published MD5 is right. What is not read is
counted by its reason and said. Every error is one line: the file, what was found, what was expected.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from model_store import images
from model_store.data_files import (
    UNTRUSTED,
    Files,
    Limits,
    container_of,
    copy_out,
    open_zip,
    read_folder,
    read_tar,
    read_zip,
    unzip,
    what_raised,
)
from model_store.data_layout import LAYOUTS, Notes, PartName, Place, composed, number_of, ordered, place_pictures
from model_store.errors import DataRejected, ImageDamaged, ImageRejected
from model_store.images import DATA_FORMATS, DecodedImage, Pixels
from model_store.input_spec import InputSpec
from model_store.quiet_imports import import_dataset

ARRAYS: Final[tuple[tuple[PartName, tuple[str, ...], tuple[str, ...]], ...]] = (  # in lower case
    ("train", ("x_train", "train_images", "train_x"), ("y_train", "train_labels", "train_y")),
    ("val", ("x_val", "val_images", "val_x", "x_valid"), ("y_val", "val_labels", "val_y", "y_valid")),
    ("test", ("x_test", "test_images", "test_x"), ("y_test", "test_labels", "test_y")),
    ("all", ("images", "x", "data"), ("labels", "y", "target", "targets")),
)
MOST_LABEL: Final = 1 << 31


@dataclass(frozen=True)
class Part:
    """Some of a data set's pictures, not decoded yet.

    Attributes:
      ids: a name of each picture, unique.
      labels: the name of each picture's class, or its number where `numbered`.
      numbered: whether the data set knows numbers alone.
      load: decodes picture i to an input's size; raises ImageRejected or DataRejected.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    numbered: bool
    load: Callable[[int, InputSpec], DecodedImage]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class DataSet:
    """where: its name in messages.  parts: the pictures by part; "all" where there are no parts.

    classes: in the data set's own order; None where only numbers are known.
    """

    where: str
    parts: Mapping[PartName, Part]
    classes: tuple[str, ...] | None
    notes: Notes


@contextmanager
def open_data(path: Path, limits: Limits = UNTRUSTED) -> Iterator[DataSet]:
    """Opens any of the layouts and lists it; pictures are decoded when they are asked for. Raises DataRejected."""
    with ExitStack() as stack:
        try:
            yield opened(Path(path), limits, stack)
        except OSError as error:
            raise DataRejected(f"{path.name}: cannot be read ({error.strerror or error})") from None


def opened(path: Path, limits: Limits, stack: ExitStack) -> DataSet:
    if not path.exists():
        raise DataRejected(f"{path.name}: no such file or folder; {LAYOUTS}")
    kind, notes = container_of(path), Notes()
    if kind == "arrays":
        return open_npz(path, limits)
    if kind == "folder":
        if cifar := cifar_of(path):
            return open_cifar(path.name, *cifar)
        return of_files(path.name, read_folder(path, limits, notes), limits, notes)
    if kind == "zip":
        files = read_zip(open_zip(path, stack), limits)
    else:
        members = read_tar(path, limits, stack, notes)
        files = Files(tuple(members), lambda name: members[name].read_bytes())
    for name, dataset in CIFAR.items():
        inside = {PurePosixPath(file).name: file for file in files.names if f"{name}/" in f"/{file}"}
        if inside:
            return open_cifar(path.name, copy_out(inside, files.read, stack, name), dataset)
    return of_files(path.name, files, limits, notes)


# Files


def of_files(where: str, files: Files, limits: Limits, notes: Notes) -> DataSet:
    """The data set of these files, sorted into parts and classes by their paths."""
    if len(files.names) > limits.files:
        raise DataRejected(f"{where}: {len(files.names)} files; at most {limits.files} are read")
    if binary := next((name for name in files.names if "cifar-10" in name and name.endswith(".bin")), None):
        raise DataRejected(f"{where}: {binary[-60:]}: CIFAR's binary version; expected the one for Python")
    placed = place_pictures(where, files.names, notes)
    classes = ordered(where, {place.kind for place in placed.values()})
    return DataSet(where, parts_of(where, placed, files, limits), classes, notes)


def parts_of(where: str, placed: Mapping[str, Place], files: Files, limits: Limits) -> dict[PartName, Part]:
    names: dict[PartName, list[str]] = {}
    for name, place in placed.items():
        names.setdefault(place.part, []).append(name)
    return {part: file_part(where, names[part], placed, files, limits) for part in names}


def file_part(where: str, names: Sequence[str], placed: Mapping[str, Place], files: Files, limits: Limits) -> Part:
    def load(index: int, spec: InputSpec) -> DecodedImage:
        name = names[index]
        try:
            data = files.read(name)
        except OSError as error:
            raise DataRejected(f"{where}: {name[-100:]}: cannot be read ({error.strerror or error})") from None
        except DataRejected as error:
            raise DataRejected(f"{where}: {error}") from None
        try:
            return images.decode(data, spec, max_pixels=limits.pixels, formats=DATA_FORMATS)
        except ImageRejected as error:
            damaged = "damaged: " if isinstance(error, ImageDamaged) else ""
            raise DataRejected(f"{where}: {name[-100:]}: not a readable image ({damaged}{error})") from None

    ids, labels = tuple(placed[name].id for name in names), tuple(placed[name].kind for name in names)
    return Part(ids, labels, numbered=False, load=load)


# Arrays


def open_npz(path: Path, limits: Limits) -> DataSet:
    notes = Notes()
    try:
        with zipfile.ZipFile(path) as archive:
            names = {item.filename.removesuffix(".npy").lower(): item for item in archive.infolist()}
            chosen = [
                (part, first(names, pixels), first(names, labels))
                for part, pixels, labels in ARRAYS
                if names.keys() & {*pixels, *labels}
            ]
            parts = {part: array_part(path, archive, names, pixels, labels, limits) for part, pixels, labels in chosen}
    except (DataRejected, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 -- hostile bytes make a reader raise anything
        raise DataRejected(f"{path.name}: not a readable npz ({what_raised(error)})") from None
    if not parts:
        raise DataRejected(
            f"{path.name}: no array 'images' or 'labels' but {', '.join(sorted(names))[:100]}; expected images and "
            "labels, x and y, or x_train, y_train, x_test and y_test"
        )
    for name in sorted(names.keys() - {name for _, *both in chosen for name in both}):
        notes.pass_over("arrays of other names", name)
    return DataSet(path.name, parts, None, notes)


def first(names: Mapping[str, zipfile.ZipInfo], wanted: Sequence[str]) -> str:
    """The one of these names that is there, or the one to miss."""
    return next((name for name in wanted if name in names), wanted[0])


def array_part(
    path: Path,
    archive: zipfile.ZipFile,
    names: Mapping[str, zipfile.ZipInfo],
    pixels: str,
    labels: str,
    limits: Limits,
) -> Part:
    where = path.name
    for name, other in ((pixels, labels), (labels, pixels)):
        if name not in names:
            raise DataRejected(f"{where}: no array {name!r} beside {other!r}; expected `images` and `labels`")
    raw = read_array(archive, names[pixels], where, limits)
    array = as_pictures(where, raw)
    numbers = as_numbers(where, read_array(archive, names[labels], where, limits))
    if len(array) != len(numbers) or not len(numbers):
        raise DataRejected(f"{where}: {len(array)} images, {len(numbers)} labels; expected as many, at least one")
    prefix = path.stem if pixels in ("images", "x") else f"{path.stem}/{pixels}"
    ids = tuple(f"{prefix}/{index}" for index in range(len(numbers)))
    return pixel_part(where, array, ids, tuple(map(str, numbers.tolist())), numbered=True, shape=raw.shape)


def pixel_part(
    where: str,
    array: Pixels,
    ids: tuple[str, ...],
    labels: tuple[str, ...],
    *,
    numbered: bool,
    shape: Sequence[int] | None = None,
) -> Part:
    """array: uint8 [N, H, W, 3]. Arrays are not resized: what they were made from can be, and looks better.

    shape: of the array in the file, for the message.
    """

    def load(index: int, spec: InputSpec) -> DecodedImage:
        height, width = array.shape[1:3]
        if (height, width) != spec.size:
            raise DataRejected(
                f"{where}: images are uint8 {list(shape or array.shape)}; expected uint8 [N, {spec.height}, "
                f"{spec.width}, 3] or [N, 3, {spec.height}, {spec.width}]: arrays are not resized, give the files they "
                f"were made from, or search and audit at {height}x{width}"
            )
        return DecodedImage(np.ascontiguousarray(array[index].transpose(2, 0, 1)), width, height, "RGB")

    return Part(ids, labels, numbered, load)


def read_array(archive: zipfile.ZipFile, item: zipfile.ZipInfo, where: str, limits: Limits) -> NDArray[Any]:
    """An array whose header is checked before anything is allocated for it."""
    name = item.filename.removesuffix(".npy")
    try:
        data = unzip(archive, item, limits.array_bytes)
    except DataRejected as error:
        raise DataRejected(f"{where}: {error}") from None
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except Exception as error:  # noqa: BLE001 -- numpy evaluates the header as Python's literals
        raise DataRejected(f"{where}: {name}: not a readable array ({what_raised(error)})") from None
    if dtype.hasobject or dtype.kind not in "uifb":
        raise DataRejected(f"{where}: {name} of {dtype}; expected whole numbers (images: uint8)")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    body = data[stream.tell() :]
    if count * dtype.itemsize != len(body):
        raise DataRejected(f"{where}: {name}: {len(body)} bytes for the shape {list(shape)} of {dtype}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def as_pictures(where: str, array: NDArray[Any]) -> Pixels:
    """uint8 [N, H, W, 3]. Grey pictures, [N, H, W] or with a channel of one, are repeated in three channels."""
    if array.dtype.kind == "f":
        raise DataRejected(f"{where}: images of {array.dtype}; expected whole numbers (images: uint8, 0 to 255)")
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or not {array.shape[1], array.shape[3]} & {1, 3}:
        raise DataRejected(
            f"{where}: images are {array.dtype} {list(array.shape)}; expected uint8 [N, height, width, 3] or "
            "[N, 3, height, width]"
        )
    last = array if array.shape[3] in (1, 3) else array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(last.repeat(3, axis=3) if last.shape[3] == 1 else last)


def as_numbers(where: str, array: NDArray[Any]) -> NDArray[np.int64]:
    """Labels [N] or [N, 1], from 0, as integers, as yes and no, or as floats that are whole."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataRejected(f"{where}: labels are of shape {list(array.shape)}; expected [N]")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise DataRejected(f"{where}: labels of {array.dtype} with fractions; expected whole numbers")
    if len(array) and not 0 <= array.min() <= array.max() < MOST_LABEL:
        raise DataRejected(f"{where}: labels from {array.min()} to {array.max()}; expected numbers of classes, from 0")
    return array.astype(np.int64)


# CIFAR

CIFAR: Final = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
MARKS: Final = {"CIFAR10": ("batches.meta", "data_batch_1"), "CIFAR100": ("meta", "train", "test")}


def cifar_of(path: Path) -> tuple[Path, str] | None:
    """The folder of CIFAR's files, this one or one in it, and which of the two it is."""
    for name, dataset in CIFAR.items():
        if (path / name).is_dir():
            return path / name, dataset
        if path.name == name or all((path / mark).is_file() for mark in MARKS[dataset]):
            return path, dataset
    return None


def open_cifar(where: str, folder: Path, dataset: str) -> DataSet:
    """The original data set. torchvision checks each file's known MD5 before it reads it, so no unknown pickle runs."""
    parts: dict[PartName, Part] = {}
    classes: tuple[str, ...] = ()
    reader: Any = type(dataset, (import_dataset(dataset),), {"base_folder": folder.name})
    both: tuple[tuple[PartName, bool], ...] = (("train", True), ("test", False))
    for part, train in both:
        try:
            data = reader(str(folder.parent), train=train)
        except RuntimeError:
            raise DataRejected(
                f"{where}: a file of {dataset} is missing, or its MD5 is not that of the published one; "
                "`tombola fetch FOLDER` downloads them again"
            ) from None
        classes = tuple(data.classes)
        labels = tuple(classes[label] for label in data.targets)
        ids = tuple(f"{part}/{label}/{index:05d}" for index, label in enumerate(labels))
        parts[part] = pixel_part(where, data.data, ids, labels, numbered=False)
    return DataSet(where, parts, classes, Notes())


# Decoding


def class_indices(where: str, part: Part, classes: Sequence[str]) -> NDArray[np.int64]:
    """Each picture's index among a library's classes, which are the authority. Raises DataRejected."""
    if part.numbered:
        return numbered_indices(where, part, classes)
    index = {composed(name): label for label, name in enumerate(classes)}
    strange = ordered(where, set(part.labels) - set(index))
    if strange:
        known = ", ".join(classes)[:200]
        raise DataRejected(f"{where}: class {strange[0][:60]!r} is none of the library's {len(classes)}: {known}")
    return np.array([index[label] for label in part.labels], np.int64)


def numbered_indices(where: str, part: Part, classes: Sequence[str]) -> NDArray[np.int64]:
    numbers = np.array([int(label) for label in part.labels], np.int64)
    if not 0 <= int(numbers.min()) <= int(numbers.max()) < len(classes):
        raise DataRejected(
            f"{where}: labels from {numbers.min()} to {numbers.max()}; the library has {len(classes)} classes, from 0"
        )
    doubtful = [name for place, name in enumerate(classes) if number_of(name) != place]
    if doubtful and all(number_of(name) is not None for name in classes):
        raise DataRejected(
            f"{where}: labels are numbers, and the library's classes are numbers in another order: {doubtful[0]!r} is "
            f"class {list(classes).index(doubtful[0])}. Give folders named after the classes"
        )
    return numbers


def decode_part(
    data: DataSet, part: Part, chosen: Iterable[int], spec: InputSpec, out: Pixels, *, skip_damaged: bool = False
) -> list[int]:
    """Decodes the chosen pictures of a part into `out`, uint8 [>= chosen, 3, H, W], from its beginning.

    Returns:
      Which of the chosen were read: all of them, or with `skip_damaged` those that could be. Notes say the rest.
    """
    read: list[int] = []
    for index in chosen:
        try:
            picture = part.load(index, spec)
        except DataRejected as error:
            if not skip_damaged:
                raise
            data.notes.damaged.append(str(error))
            continue
        out[len(read)] = picture.pixels
        read.append(index)
        data.notes.enlarged += picture.width < spec.width or picture.height < spec.height
        if picture.mode != "RGB":
            data.notes.converted[picture.mode] += 1
    return read
