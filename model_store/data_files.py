"""The files of a folder, a zip or a tar by their names, from whoever made it: nothing of them is believed.

A container is told by its first bytes, not by its name. Whatever a reader of archives raises becomes one line: the
file, what was found, what was expected.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal, cast

from model_store.data_layout import LAYOUTS, Notes
from model_store.errors import DataRejected
from model_store.images import DEFAULT_MAX_PIXELS
from model_store.input_spec import MAX_PIXELS

Read = Callable[[str], bytes]
Container = Literal["folder", "zip", "arrays", "tar"]
BLOCK: Final = 512  # of a tar, which ends with blocks of zeros
COPIED: Final = 1 << 20  # bytes at once
UNPACKERS: Final[Mapping[bytes, Callable[[Path, str], object]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
TAR_SUFFIXES: Final = (".tar", ".tgz", ".tbz2", ".txz")


@dataclass(frozen=True)
class Limits:
    """Bounds on what is read. follow_links: also links that lead out of the folder, as ImageFolder does."""

    files: int = 200_000
    file_bytes: int = 8 << 20
    array_bytes: int = 1 << 28
    pixels: int = DEFAULT_MAX_PIXELS
    follow_links: bool = False


UNTRUSTED: Final = Limits()
LOCAL: Final = Limits(20_000_000, 1 << 28, 1 << 36, MAX_PIXELS, follow_links=True)


@dataclass(frozen=True)
class Files:
    """names: of all files that may be read.  read: the bytes of one of them; raises DataRejected, OSError."""

    names: tuple[str, ...]
    read: Read


def what_raised(error: Exception) -> str:
    """An error of somebody else's code in a few words of one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.100}"


def container_of(path: Path) -> Container:
    """Raises DataRejected for a file that is none."""
    if path.is_dir():
        return "folder"
    with path.open("rb") as file:
        head = file.read(BLOCK)
    if head.startswith(b"PK") or zipfile.is_zipfile(path):
        return "arrays" if path.suffix.lower() == ".npz" or holds_arrays(path) else "zip"
    if head.startswith(tuple(UNPACKERS)) or head[257:262] == b"ustar" or path.name.lower().endswith(TAR_SUFFIXES):
        return "tar"
    if path.suffix.lower() in (".zip", ".npz"):
        raise DataRejected(f"{path.name}: not a readable {path.suffix[1:].lower()} ({begin(head)}); {LAYOUTS}")
    raise DataRejected(f"{path.name}: a file of a kind that is not read ({begin(head)}); {LAYOUTS}")


def begin(head: bytes) -> str:
    return f"it begins with {head[:12]!r}" if head else "it is empty"


def holds_arrays(path: Path) -> bool:
    """Whether a zip is what numpy.savez makes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # noqa: BLE001 -- hostile bytes make a reader raise anything; open_zip says what is wrong
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_folder(path: Path, limits: Limits, notes: Notes) -> Files:
    files = dict(walk(path, limits, notes))
    return Files(tuple(files), lambda name: read_bounded(name, files[name], limits))


def walk(root: Path, limits: Limits, notes: Notes) -> Iterator[tuple[str, Path]]:
    """Every file by its path inside the folder. Links are followed, each folder once on a way down."""
    real = real_path(root)

    def visit(folder: Path, above: frozenset[Path]) -> Iterator[tuple[str, Path]]:
        for entry in sorted(folder.iterdir()):
            name = entry.relative_to(root).as_posix()
            target = real_path(entry)
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


def fingerprint(path: Path) -> str:
    """Changes when a file of a data set is added, removed, resized or rewritten, also behind a link."""
    if path.is_file():
        with path.open("rb") as whole:
            return hashlib.file_digest(whole, "sha256").hexdigest()
    state = hashlib.sha256(os.path.realpath(path).encode())
    for name, file in walk(path, LOCAL, Notes()):
        about = file.stat()
        state.update(f"{name}\n{about.st_size}\n{about.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def real_path(path: Path) -> Path:
    """Where a link leads; itself for one that leads nowhere, where Path.resolve() raises."""
    return Path(os.path.realpath(path))


def read_bounded(name: str, file: Path, limits: Limits) -> bytes:
    size = file.stat().st_size
    if size > limits.file_bytes:
        raise DataRejected(f"{name}: {size} bytes; at most {limits.file_bytes} are read")
    return file.read_bytes()


def open_zip(path: Path, stack: ExitStack) -> zipfile.ZipFile:
    """Raises DataRejected."""
    try:
        return stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:  # noqa: BLE001 -- hostile bytes make a reader raise anything
        raise DataRejected(f"{path.name}: not a readable zip ({what_raised(error)}); {LAYOUTS}") from None


def read_zip(archive: zipfile.ZipFile, limits: Limits) -> Files:
    members = {item.filename: item for item in archive.infolist() if not item.is_dir()}
    return Files(tuple(members), lambda name: unzip(archive, members[name], limits.file_bytes))


def unzip(archive: zipfile.ZipFile, item: zipfile.ZipInfo, most: int) -> bytes:
    """One file of a zip, read no further than its header says and we allow. Raises DataRejected."""
    name, size = item.filename[:100], item.file_size
    if item.flag_bits & 1:
        raise DataRejected(f"{name}: encrypted; expected a zip without a password")
    if size > most:
        raise DataRejected(f"{name}: {size} bytes once unpacked; at most {most} are read")
    try:
        with archive.open(item) as file:
            data = file.read(size + 1)
    except Exception as error:  # noqa: BLE001 -- hostile bytes make a reader raise anything
        raise DataRejected(f"{name}: cannot be unpacked ({what_raised(error)}); expected a sound zip") from None
    if len(data) != size:
        raise DataRejected(f"{name}: {len(data)} bytes; its header says {size}")
    return data


def read_tar(path: Path, limits: Limits, stack: ExitStack, notes: Notes) -> Mapping[str, Path]:
    """Unpacked to a temporary folder, regular files alone, since a compressed tar can only be read in its order."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tombola-")))
    try:
        with open_stream(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            files = dict(unpack(archive, folder, limits, notes))
            check_end(archive, stream, limits)
    except DataRejected as error:
        raise DataRejected(f"{path.name}: {error}") from None
    except Exception as error:  # noqa: BLE001 -- hostile bytes make a reader raise anything
        raise DataRejected(f"{path.name}: not a readable tar ({what_raised(error)}); {LAYOUTS}") from None
    return files


def open_stream(path: Path) -> IO[bytes]:
    """What a compressed file holds, or the file itself."""
    with path.open("rb") as file:
        head = file.read(8)
    unpacker = next((unpacker for mark, unpacker in UNPACKERS.items() if head.startswith(mark)), Path.open)
    return io.BufferedReader(cast("io.RawIOBase", unpacker(path, "rb")), COPIED)  # so that a step back costs nothing


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


def check_end(archive: tarfile.TarFile, stream: IO[bytes], limits: Limits) -> None:
    """tarfile takes a damaged header for the end, and never reads a compressed file's checksum. Raises DataRejected."""
    stream.seek(archive.offset)
    block = stream.read(BLOCK)
    if block.count(0) != BLOCK:
        content = "no header" if block else "nothing"
        raise DataRejected(
            f"cut short or damaged: {content} at byte {archive.offset}; expected a file or the tar's end"
        )
    read = 0
    while part := stream.read(COPIED):
        read += len(part)
        if read > limits.array_bytes:
            raise DataRejected(f"more than {limits.array_bytes} bytes after the tar's end")


def copy_out(names: Mapping[str, str], read: Read, stack: ExitStack, folder: str) -> Path:
    """Writes some files into a temporary folder of that name. names: of the files, by the names that they get."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tombola-")), folder)
    root.mkdir()
    for name, source in names.items():
        (root / PurePosixPath(name).name).write_bytes(read(source))
    return root
