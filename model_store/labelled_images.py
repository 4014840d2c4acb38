"""Labelled pictures from disk, whoever made them: the one reader of data sets, for training and for audits.

- A folder, zip or tar of pictures: `[.../]{train,val,test}/<class>/.../<file>`, or `<class>/.../<file>` without parts.
- An npz of `images` and `labels`, or x and y, or x_train, y_train, x_test, y_test.
- CIFAR-10 and CIFAR-100 as torchvision keeps them: the folder that holds `cifar-10-batches-py`, or that folder itself.

Nothing is unpickled here; torchvision unpickles CIFAR's files once their published MD5 is right. What is not read is
counted by its reason and said. Every error is one line: the file, what was found, what was expected.
"""

import io
import os
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from model_store import images
from model_store.errors import DataRejected, DataUnlabelled, ImageDamaged, ImageRejected
from model_store.images import DATA_FORMATS, DecodedImage, Pixels
from model_store.input_spec import MAX_PIXELS, InputSpec
from model_store.quiet_imports import import_dataset

SUFFIXES: Final = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif")
)
PartName = Literal["train", "val", "test", "all"]
PARTS: Final[dict[str, PartName]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
CIFAR: Final = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
SYSTEM_FOLDERS: Final = frozenset(("__macosx", ".ipynb_checkpoints", "$recycle.bin", "system volume information"))
SYSTEM_FILES: Final = frozenset(("thumbs.db", "desktop.ini", ".ds_store"))
ARRAYS: Final[tuple[tuple[PartName, tuple[str, ...], tuple[str, ...]], ...]] = (
    ("train", ("x_train", "train_images"), ("y_train", "train_labels")),
    ("val", ("x_val", "val_images"), ("y_val", "val_labels")),
    ("test", ("x_test", "test_images"), ("y_test", "test_labels")),
    ("all", ("images", "x"), ("labels", "y")),
)
LAYOUTS: Final = (
    "expected <class>/<file>, or train/<class>/<file> and test/<class>/<file>, as a folder, a zip or a tar; "
    "an npz of images and labels; or torchvision's CIFAR"
)
UNREADABLE: Final = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError)
Read = Callable[[str], bytes]


@dataclass(frozen=True)
class Limits:
    """Bounds on what is read. follow_links: also links that lead out of the folder, as ImageFolder does."""

    files: int = 200_000
    file_bytes: int = 8 << 20
    array_bytes: int = 1 << 28
    pixels: int = images.DEFAULT_MAX_PIXELS
    follow_links: bool = False


UNTRUSTED: Final = Limits()
LOCAL: Final = Limits(20_000_000, 1 << 28, 1 << 36, MAX_PIXELS, follow_links=True)


@dataclass
class Notes:
    """What a person should know about the reading.

    Attributes:
      passed_over: how many files were not read, by reason.
      examples: one of them, by reason.
      refused_links: links that lead out of the folder.
      damaged: what was wrong with each picture that was passed over, a line each.
      enlarged: pictures that were smaller than the input.
      converted: pictures that were not RGB, by mode.
    """

    passed_over: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    refused_links: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    enlarged: int = 0
    converted: Counter[str] = field(default_factory=Counter)

    def pass_over(self, reason: str, name: str) -> None:
        self.passed_over[reason] += 1
        self.examples.setdefault(reason, name)

    def lines(self, spec: InputSpec) -> list[str]:
        """One sentence for each kind of thing that happened."""
        lines = [
            f"{count} files passed over: {reason}, such as {self.examples[reason][-80:]}"
            for reason, count in sorted(self.passed_over.items())
        ]
        if self.damaged:
            lines += [f"{len(self.damaged)} damaged pictures passed over:", *self.damaged]
        if self.enlarged:
            lines.append(f"{self.enlarged} pictures are smaller than {spec.width}x{spec.height} and were enlarged")
        if self.converted:
            kinds = ", ".join(f"{count} of mode {mode}" for mode, count in sorted(self.converted.items()))
            lines.append(f"pictures converted to RGB: {kinds}")
        return lines


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
    if path.is_dir():
        return open_folder(path, path.name, limits)
    if path.suffix == ".npz":
        return open_npz(path, limits)
    if path.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
        return open_tar(path, limits, stack)
    return open_zip(path, limits, stack)


# Files in folders


def open_folder(path: Path, where: str, limits: Limits) -> DataSet:
    if cifar := next((name for name in CIFAR if (path / name).is_dir() or path.name == name), None):
        return open_cifar(path if (path / cifar).is_dir() else path.parent, cifar)
    notes = Notes()
    files = dict(walk(path, limits, notes))
    return of_files(where, list(files), lambda name: read_bounded(name, files[name], limits), limits, notes)


def walk(root: Path, limits: Limits, notes: Notes) -> Iterator[tuple[str, Path]]:
    """Every file by its path inside the folder. Links are followed, each folder once on a way down."""
    real = root.resolve()

    def visit(folder: Path, above: frozenset[Path]) -> Iterator[tuple[str, Path]]:
        for entry in sorted(folder.iterdir()):
            name = entry.relative_to(root).as_posix()
            target = entry.resolve()
            if entry.is_symlink() and not limits.follow_links and not target.is_relative_to(real):
                notes.refused_links.append(name)
            elif entry.is_dir():
                yield from descend(entry, name, target, above)
            elif entry.is_file():
                yield name, entry
            else:
                notes.pass_over("broken links, and files that are not regular", name)

    def descend(entry: Path, name: str, target: Path, above: frozenset[Path]) -> Iterator[tuple[str, Path]]:
        if target in above:
            notes.pass_over("links to a folder above", name)
        elif not os.access(entry, os.R_OK | os.X_OK):
            notes.pass_over("folders that this user cannot read", name)
        else:
            yield from visit(entry, above | {target})

    yield from visit(root, frozenset((real,)))


def read_bounded(name: str, file: Path, limits: Limits) -> bytes:
    size = file.stat().st_size
    if size > limits.file_bytes:
        raise DataRejected(f"{name}: {size} bytes; at most {limits.file_bytes} are read")
    return file.read_bytes()


def open_zip(path: Path, limits: Limits, stack: ExitStack) -> DataSet:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except UNREADABLE as error:
        raise DataRejected(f"{path.name}: not a readable zip ({error!s:.100}); {LAYOUTS}") from None
    members = {item.filename: item for item in archive.infolist() if not item.is_dir()}
    return of_files(path.name, list(members), lambda name: unzip(archive, members[name], limits.file_bytes), limits)


def unzip(archive: zipfile.ZipFile, item: zipfile.ZipInfo, most: int) -> bytes:
    """One file of a zip, read no further than its header says and we allow."""
    name, size = item.filename[:100], item.file_size
    if item.flag_bits & 1:
        raise DataRejected(f"{name}: encrypted; expected a zip without a password")
    if size > most:
        raise DataRejected(f"{name}: {size} bytes once unpacked; at most {most} are read")
    try:
        with archive.open(item) as file:
            data = file.read(size + 1)
    except UNREADABLE as error:
        raise DataRejected(f"{name}: cannot be unpacked ({error!s:.100}); expected a sound zip") from None
    if len(data) != size:
        raise DataRejected(f"{name}: {len(data)} bytes; its header says {size}")
    return data


def open_tar(path: Path, limits: Limits, stack: ExitStack) -> DataSet:
    """Unpacked to a temporary folder, regular files alone, since a compressed tar can only be read in its order."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tombola-")))
    notes = Notes()
    try:
        with tarfile.open(path, "r:*") as archive:
            files = dict(unpack(archive, folder, limits, notes))
    except (tarfile.TarError, *UNREADABLE) as error:
        raise DataRejected(f"{path.name}: not a readable tar ({error!s:.100}); {LAYOUTS}") from None
    for name in CIFAR:
        inside = [member for member in files if f"{name}/" in f"/{member}"]
        if inside:
            (folder / name).mkdir()
            for member in inside:
                files[member].rename(folder / name / PurePosixPath(member).name)
            return open_cifar(folder, name)
    return of_files(path.name, list(files), lambda name: files[name].read_bytes(), limits, notes)


def unpack(archive: tarfile.TarFile, folder: Path, limits: Limits, notes: Notes) -> Iterator[tuple[str, Path]]:
    """The members by name, written under numbers so that no name can lead out of the folder."""
    total = 0
    for number, member in enumerate(archive):
        if number >= limits.files:
            raise DataRejected(f"more than {limits.files} files; at most as many are read")
        if not member.isfile():
            if not member.isdir():
                notes.pass_over("links, and members that are not files", member.name)
            continue
        total += member.size
        if member.size > limits.file_bytes or total > limits.array_bytes * 64:
            raise DataRejected(f"{member.name[:100]}: {member.size} bytes; at most {limits.file_bytes} are read")
        source = archive.extractfile(member)
        file = folder / str(number)
        file.write_bytes(b"" if source is None else source.read())
        yield member.name, file


def of_files(where: str, names: Sequence[str], read: Read, limits: Limits, notes: Notes | None = None) -> DataSet:
    """The data set of these files, sorted into parts and classes by their paths."""
    notes = notes or Notes()
    if len(names) > limits.files:
        raise DataRejected(f"{where}: {len(names)} files; at most {limits.files} are read")
    tables = [name for name in names if name.lower().endswith((".csv", ".tsv"))]
    placed = dict(place(pictures_among(names, notes)))
    for name in [name for name, (_, kind, _) in placed.items() if not kind]:
        notes.pass_over("pictures in no class's folder", name)
        del placed[name]
    if not placed:
        raise DataUnlabelled(f"{where}: {nothing(notes, tables)}")
    if notes.refused_links:
        raise DataRejected(f"{where}: {links(notes)}; copy what they lead to")
    return DataSet(where, parts_of(where, placed, read, limits), class_order(where, placed), notes)


def nothing(notes: Notes, tables: Sequence[str]) -> str:
    loose = notes.passed_over["pictures in no class's folder"]
    if loose and tables:
        return (
            f"{loose} pictures in no class's folder, and a table {tables[0][-60:]}; tables are not read: move each "
            "picture into a folder named after its class, train/<class>/<file>"
        )
    also = f" ({links(notes)})" if notes.refused_links else ""
    reasons = "".join(f"; {count} {reason}" for reason, count in sorted(notes.passed_over.items()))
    return f"no images in folders named after their class{also}{reasons}; without labels nothing is measured; {LAYOUTS}"


def links(notes: Notes) -> str:
    count = len(notes.refused_links)
    return f"{count} links out of the folder are not followed, such as {notes.refused_links[0][-80:]}"


def pictures_among(names: Iterable[str], notes: Notes) -> list[str]:
    """The files that look like pictures; the others are noted with the reason."""
    lines = []
    for name in sorted(names):
        path = PurePosixPath(name.replace("\\", "/"))
        folders = {part.lower() for part in path.parts[:-1]}
        if folders & SYSTEM_FOLDERS or path.name.lower() in SYSTEM_FILES or path.name.startswith("._"):
            notes.pass_over("files of an operating system or a notebook", name)
        elif any(part.startswith(".") for part in path.parts if part not in (".", "..")):
            notes.pass_over("hidden files", name)
        elif path.suffix.lower() not in SUFFIXES:
            notes.pass_over("files of a kind not read", name)
        else:
            lines.append(name)
    return lines


def place(names: Sequence[str]) -> Iterator[tuple[str, tuple[PartName, str, str]]]:
    """Each picture's part, class ("" for none) and id, by its path."""
    paths = {name: tuple(p for p in name.replace("\\", "/").split("/") if p not in ("", ".")) for name in names}
    parted = {name: at for name, path in paths.items() if (at := part_place(path)) is not None}
    rest = [path for name, path in paths.items() if name not in parted]
    shared = shared_folders([path[:-2] for path in rest])
    for name, path in paths.items():
        if name in parted:
            part = PARTS[path[parted[name]].lower()]
            inner = path[parted[name] + 1 :]
            yield name, (part, composed(inner[0]), "/".join((part, *inner)))
        else:
            inner = path[shared:]
            kind = composed(inner[0]) if len(inner) >= 2 else ""
            yield name, ("all", kind, "/".join(inner))


def shared_folders(paths: Sequence[tuple[str, ...]]) -> int:
    """How many folders all paths begin with."""
    columns = zip(*paths, strict=False)
    return next((at for at, names in enumerate(columns) if len(set(names)) > 1), min(map(len, paths), default=0))


def part_place(path: tuple[str, ...]) -> int | None:
    """Where a path names its part, with a class and a file behind it."""
    return next((at for at in range(len(path) - 3, -1, -1) if path[at].lower() in PARTS), None)


def composed(name: str) -> str:
    """One spelling of a name: macOS writes accents apart (NFD), other systems in one (NFC)."""
    return unicodedata.normalize("NFC", name)


def class_order(where: str, placed: Mapping[str, tuple[PartName, str, str]]) -> tuple[str, ...]:
    return ordered(where, {kind for _, kind, _ in placed.values()})


def ordered(where: str, classes: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of the alphabet; numbers by their value. Raises DataRejected for 1 beside 01."""
    names = sorted(set(classes))
    if not all(name.isascii() and name.isdigit() for name in names):
        return tuple(names)
    if len({int(name) for name in names}) != len(names):
        twice = next(name for name in names if sum(int(other) == int(name) for other in names) > 1)
        raise DataRejected(f"{where}: class {twice!r} is there in two spellings; expected one number for each class")
    return tuple(sorted(names, key=int))


def parts_of(
    where: str, placed: Mapping[str, tuple[PartName, str, str]], read: Read, limits: Limits
) -> dict[PartName, Part]:
    lines: dict[PartName, list[str]] = {}
    for name, (part, _, _) in placed.items():
        lines.setdefault(part, []).append(name)
    return {part: file_part(where, names, placed, read, limits) for part, names in lines.items()}


def file_part(
    where: str, names: Sequence[str], placed: Mapping[str, tuple[PartName, str, str]], read: Read, limits: Limits
) -> Part:
    def load(index: int, spec: InputSpec) -> DecodedImage:
        name = names[index]
        try:
            data = read(name)
        except OSError as error:
            raise DataRejected(f"{where}: {name[-100:]}: cannot be read ({error.strerror or error})") from None
        except DataRejected as error:
            raise DataRejected(f"{where}: {error}") from None
        try:
            return images.decode(data, spec, max_pixels=limits.pixels, formats=DATA_FORMATS)
        except ImageRejected as error:
            damaged = "damaged: " if isinstance(error, ImageDamaged) else ""
            raise DataRejected(f"{where}: {name[-100:]}: not a readable image ({damaged}{error})") from None

    ids, labels = (tuple(placed[name][field] for name in names) for field in (2, 1))
    return Part(ids, labels, numbered=False, load=load)


# Arrays


def open_npz(path: Path, limits: Limits) -> DataSet:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {item.filename.removesuffix(".npy") for item in archive.infolist()}
            parts = {
                part: array_part(path, archive, first(names, pixels), first(names, labels), limits)
                for part, pixels, labels in ARRAYS
                if names & {*pixels, *labels}
            }
    except UNREADABLE as error:
        raise DataRejected(f"{path.name}: not a readable npz ({error!s:.100})") from None
    if not parts:
        raise DataRejected(
            f"{path.name}: no array 'images' or 'labels' but {', '.join(sorted(names))[:100]}; expected images and "
            "labels, x and y, or x_train, y_train, x_test and y_test"
        )
    return DataSet(path.name, parts, None, Notes())


def first(names: set[str], wanted: Sequence[str]) -> str:
    """The one of these names that is there, or the one to miss."""
    return next((name for name in wanted if name in names), wanted[0])


def array_part(path: Path, archive: zipfile.ZipFile, pixels: str, labels: str, limits: Limits) -> Part:
    where = path.name
    array = as_pictures(where, read_array(archive, pixels, where, limits))
    numbers = as_numbers(where, read_array(archive, labels, where, limits))
    if len(array) != len(numbers) or not len(numbers):
        raise DataRejected(f"{where}: {len(array)} images, {len(numbers)} labels; expected as many, at least one")
    prefix = path.stem if pixels in ("images", "x") else f"{path.stem}/{pixels}"
    ids = tuple(f"{prefix}/{index}" for index in range(len(numbers)))
    return pixel_part(where, array, ids, tuple(map(str, numbers.tolist())), numbered=True)


def pixel_part(where: str, array: Pixels, ids: tuple[str, ...], labels: tuple[str, ...], *, numbered: bool) -> Part:
    """array: uint8 [N, H, W, 3]. Arrays are not resized: what they were made from can be, and looks better."""

    def load(index: int, spec: InputSpec) -> DecodedImage:
        height, width = array.shape[1:3]
        if (height, width) != (spec.height, spec.width):
            raise DataRejected(
                f"{where}: images are uint8 {list(array.shape)}; expected uint8 [N, {spec.height}, {spec.width}, 3] or "
                f"[N, 3, {spec.height}, {spec.width}]: arrays are not resized, give the files they were made from"
            )
        return DecodedImage(np.ascontiguousarray(array[index].transpose(2, 0, 1)), width, height, "RGB")

    return Part(ids, labels, numbered, load)


def read_array(archive: zipfile.ZipFile, name: str, where: str, limits: Limits) -> NDArray[Any]:
    """An array whose header is checked before anything is allocated for it."""
    try:
        item = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise DataRejected(f"{where}: no array {name!r}; expected `images` and `labels`") from None
    data = unzip(archive, item, limits.array_bytes)
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except (ValueError, KeyError) as error:
        raise DataRejected(f"{where}: {name}: not a readable array ({error!s:.100})") from None
    if dtype.hasobject or dtype.kind not in "uif":
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
    """Labels [N] or [N, 1], as integers or as floats that are whole."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataRejected(f"{where}: labels are of shape {list(array.shape)}; expected [N]")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise DataRejected(f"{where}: labels of {array.dtype} with fractions; expected whole numbers")
    return array.astype(np.int64)


# CIFAR


def open_cifar(root: Path, folder: str) -> DataSet:
    """The original data set. torchvision checks each file's known MD5 before it reads it, so no unknown pickle runs."""
    parts: dict[PartName, Part] = {}
    classes: tuple[str, ...] = ()
    both: tuple[tuple[PartName, bool], ...] = (("train", True), ("test", False))
    for part, train in both:
        try:
            data = import_dataset(CIFAR[folder])(str(root), train=train)
        except RuntimeError as error:
            raise DataRejected(f"{root / folder}: {error}; `tombola fetch {root}` downloads it again") from None
        classes = tuple(data.classes)
        labels = tuple(classes[label] for label in data.targets)
        ids = tuple(f"{part}/{label}/{index:05d}" for index, label in enumerate(labels))
        parts[part] = pixel_part(folder, data.data, ids, labels, numbered=False)
    return DataSet(folder, parts, classes, Notes())


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
    doubtful = [name for place, name in enumerate(classes) if name.isdigit() and int(name) != place]
    if doubtful and all(name.isdigit() for name in classes):
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
