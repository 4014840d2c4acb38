"""Pictures to classify: from files, folders, zips and lists of paths."""

import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from model_store.data_files import unzip, what_raised
from model_store.data_layout import SYSTEM_FILES, SYSTEM_FOLDERS
from model_store.errors import DataRejected, TombolaError, os_error_text

SUFFIXES: Final = frozenset((".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"))
MAX_BYTES: Final = 256 << 20  # of one file; a larger one is an error of its own
STANDARD_INPUT: Final = "-"


class SourceRejected(TombolaError):
    """A path without pictures, or one that cannot be read as what it is."""


@dataclass(frozen=True)
class Source:
    """Where one picture is. member: its place in the zip `file`."""

    name: str
    file: str
    member: str | None = None


@dataclass(frozen=True)
class Picture:
    """One picture to classify. error: why its bytes could not be read; they are empty then."""

    name: str
    data: bytes
    error: str = ""


def list_pictures(paths: Sequence[str], stdin: TextIO | None = None) -> list[Source]:
    """Every picture of these paths once, in order; none of them is read.

    Args:
      paths: files, folders, zips, lists (.txt), or - for a list on standard input.
      stdin: what `-` reads; None for the standard input.

    Raises:
      SourceRejected: a path that is not there, a folder or a zip without pictures.
    """
    sources = {source.name: source for path in paths for source in list_path(path, stdin or sys.stdin)}
    if not sources:
        raise SourceRejected(f"{' '.join(paths)}: the list is empty; expected paths of pictures, one a line")
    return list(sources.values())


def list_path(path: str, stdin: TextIO) -> Iterator[Source]:
    if path == STANDARD_INPUT:
        yield from list_lines(stdin)
    elif Path(path).is_dir():
        yield from list_folder(path)
    elif not Path(path).exists():
        raise SourceRejected(f"{path}: no such file or folder")
    elif Path(path).suffix.lower() == ".zip":
        yield from list_zip(path)
    elif Path(path).suffix.lower() == ".txt":
        with Path(path).open(encoding="utf-8", errors="surrogateescape") as lines:
            yield from list_lines(lines)
    else:
        yield Source(path, path)


def list_lines(lines: Iterable[str]) -> Iterator[Source]:
    """Paths, one a line. One that cannot be read is an error of its own: the rest of a long list is not at fault."""
    for line in lines:
        name = line.rstrip("\r\n")
        if name:
            yield Source(name, name)


def list_folder(root: str) -> Iterator[Source]:
    """Files whose name ends as that of a picture, in the order of their paths. Links to folders are not followed."""
    empty = True
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name.lower() not in SYSTEM_FOLDERS)
        for name in sorted(filter(is_picture, files)):
            empty = False
            yield Source(str(Path(folder, name)), str(Path(folder, name)))
    if empty:
        raise SourceRejected(f"{root}: no pictures in it; expected files such as .png, .jpg and .webp")


def list_zip(path: str) -> Iterator[Source]:
    """A zip's pictures, by the names `archive.zip/folder/picture.png`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [item.filename for item in archive.infolist() if not item.is_dir() and is_picture(item.filename)]
    except OSError as error:
        raise SourceRejected(os_error_text(error)) from None
    except Exception as error:  # noqa: BLE001 -- hostile bytes make a reader raise anything
        raise SourceRejected(f"{path}: not a readable zip ({what_raised(error)})") from None
    if not members:
        raise SourceRejected(f"{path}: no pictures in it; expected files such as .png, .jpg and .webp")
    for member in members:
        yield Source(f"{path}/{member}", path, member)


def is_picture(name: str) -> bool:
    file = Path(name)
    ours = file.suffix.lower() in SUFFIXES and file.name.lower() not in SYSTEM_FILES and not file.name.startswith("._")
    return ours and not SYSTEM_FOLDERS & {part.lower() for part in file.parts}


def read_pictures(sources: Iterable[Source]) -> Iterator[Picture]:
    """Reads each picture when it is asked for; one zip is open at a time."""
    archive: zipfile.ZipFile | None = None
    try:
        for source in sources:
            if source.member is not None and (archive is None or archive.filename != source.file):
                if archive is not None:
                    archive.close()
                archive = zipfile.ZipFile(source.file)
            yield read_picture(source, archive)
    finally:
        if archive is not None:
            archive.close()


def read_picture(source: Source, archive: zipfile.ZipFile | None) -> Picture:
    try:
        if source.member is None or archive is None:
            return Picture(source.name, read_file(Path(source.file)))
        return Picture(source.name, unzip(archive, archive.getinfo(source.member), MAX_BYTES))
    except OSError as error:
        return Picture(source.name, b"", error.strerror or str(error))
    except (DataRejected, ValueError) as error:  # ValueError: a path with a null character
        return Picture(source.name, b"", str(error))


def read_file(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise DataRejected("not a file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataRejected(f"{size} bytes; at most {MAX_BYTES} are read")
    return path.read_bytes()
