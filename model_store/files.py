"""The one way in which files are made: whole or not at all.

Data goes into a part file in the same folder, which takes the name once every byte is on the disk. An OSError names the
file that was to be written, so that a command can say it in one line.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

PART: Final = re.compile(r"^\..+\.[0-9a-f]{16}\.part$")  # what a writer that was killed leaves behind
NO_LINKS: Final = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # of a file system without hard links


def write_atomically(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Puts `data` into the file at `path`. After a crash at any point it holds its old content or all of the new one.

    Args:
      path: a new file or one to replace. Symbolic links are followed; a device or a pipe is written to as it is.
      data: bytes, or text that is stored as UTF-8.
      mode: permissions; by default those of the file that is replaced, or 0o666, less the umask in both cases of a new
        file.

    Raises:
      OSError: it names `path`, which is as it was.
    """
    with replacing(path, mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """As write_atomically, for what is written in pieces or by a library: file.name is where it may write to.

    If the block raises, `path` stays as it was.
    """
    with naming(path):
        if path.exists() and not path.is_file():
            with path.open("wb") as device:
                yield device
            return
        target = Path(os.path.realpath(path))
        part = part_of(target)
        try:
            with create(part, 0o666 if mode is None else mode) as file:
                yield file
            if mode is None and target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            sync_file(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(target.parent)


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Makes a file that is not there yet. Of several processes that do so at the same time exactly one succeeds.

    Where the file system has no hard links, a process that is killed meanwhile may leave the file unfinished.

    Raises:
      FileExistsError: there is one, finished, whoever made it.
      OSError: it names `path`, and there is none.
    """
    with naming(path):
        part = part_of(path)
        try:
            with create(part, mode) as file:
                file.write(data)
            sync_file(part)
            try:
                os.link(part, path)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                write_exclusively(path, data, mode)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_exclusively(path: Path, data: bytes, mode: int) -> None:
    file = create(path, mode)
    try:
        with file:
            file.write(data)
        sync_file(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path) -> None:
    """Gives a finished file its name. Raises OSError, which names `target`."""
    with naming(target):
        sync_file(source)
        source.replace(target)
        sync_folder(target.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError name this file instead of a part of it, or none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def part_of(path: Path) -> Path:
    """A new name for an unfinished file in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def create(path: Path, mode: int = 0o666) -> BinaryIO:
    """A new file, open for writing, that nobody else had a chance to open with other permissions."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))


def sync_file(path: Path) -> None:
    """Makes a file's bytes last through a power cut."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder last through a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
