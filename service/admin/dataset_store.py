"""Labelled data sets by name: those of a configured folder, and uploads, which are checked before they are stored."""

import re
import secrets
import zipfile
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field

from model_store.files import rename
from model_store.library import Library
from service.audit.errors import AuditRejected, AuditUnknown, DataRejected
from service.audit.labelled_data import read_data
from service.audit.report.model import GENERATED
from service.settings import Settings

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
CHECKED_IMAGES: Final = 256  # of an upload, decoded before it is stored; arrays are checked whole


class Dataset(BaseModel):
    """One data set that an audit may name."""

    name: str
    kind: str = Field(description="folder, zip, npz or generated")
    uploaded: bool


class StoredDataset(BaseModel):
    """An upload, as it was stored."""

    name: str
    checked: int = Field(description="images that were decoded")
    classes: int


class DatasetStore:
    """Data sets in two folders: the configured one, whose entries are data sets, and that of uploads."""

    def __init__(self, settings: Settings) -> None:
        self.configured = settings.audits_data
        self.uploads = settings.state_dir / "datasets"

    def paths(self) -> dict[str, Path]:
        """Configured sets win over uploads of the same name."""
        paths: dict[str, Path] = {}
        for folder in (self.uploads, self.configured):
            if folder is not None and folder.is_dir():
                visible = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
                paths |= {path.name: path for path in visible if is_dataset(path)}
        return paths

    def list(self) -> list[Dataset]:
        """All of them, the generated one last."""
        rows = [
            Dataset(name=name, kind=path.suffix.removeprefix(".") or "folder", uploaded=path.parent == self.uploads)
            for name, path in self.paths().items()
        ]
        return [*rows, Dataset(name=GENERATED, kind="generated", uploaded=False)]

    def path(self, name: str | None, profile: str) -> Path | None:
        """None: generated images, which only smoke may use. Raises AuditRejected, AuditUnknown."""
        known = self.paths()
        if name is not None and name != GENERATED:
            if name not in known:
                raise AuditUnknown(f"no data set {name[:64]!r}; there are: {', '.join((*known, GENERATED))}")
            return known[name]
        if profile == "smoke":
            return None
        raise AuditRejected(
            f"profile {profile} needs labelled images: set data to one of: {', '.join(known) or 'none yet'}"
        )

    def add(self, name: str, upload: Path, library: Library) -> StoredDataset:
        """Checks an uploaded file and stores it under its name. Raises AuditRejected, DataRejected."""
        if not NAME.fullmatch(name) or name == GENERATED:
            raise AuditRejected("the name of a data set: 1 to 64 of a-z, 0-9, dot, underscore, hyphen, not `generated`")
        suffix = archive_suffix(upload)
        stem = name.removesuffix(".zip").removesuffix(".npz")
        part = upload.with_name(f".{secrets.token_hex(8)}{suffix}")
        rename(upload, part)
        try:
            images = read_data(part, library.classes, CHECKED_IMAGES, library.input)
            rename(part, self.uploads / f"{stem}{suffix}")
        except DataRejected as error:  # the sender knows the file by its own name
            raise DataRejected(str(error).replace(part.name, name)) from None
        finally:
            part.unlink(missing_ok=True)
        return StoredDataset(name=f"{stem}{suffix}", checked=len(images), classes=len(set(images.labels.tolist())))


def is_dataset(path: Path) -> bool:
    return path.is_dir() or path.suffix in (".zip", ".npz")


def archive_suffix(upload: Path) -> str:
    """By content, never by a name: an npz is a zip of arrays."""
    try:
        with zipfile.ZipFile(upload) as archive:
            return ".npz" if any(name.endswith(".npy") for name in archive.namelist()) else ".zip"
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        raise DataRejected("the upload is neither a zip nor an npz") from None
