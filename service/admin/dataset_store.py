"""Labelled sets by name: a configured folder's, and those that were uploaded. Checked before they are kept."""

import re
import secrets
import zipfile
from pathlib import Path
from typing import Any, Final

from model_store.files import rename
from model_store.library import Library
from service.audit.errors import AuditRejected, AuditUnknown, DataRejected
from service.audit.labelled_data import GENERATED, read_data
from service.settings import Settings

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
CHECKED_IMAGES: Final = 256  # of an upload, decoded before it is kept; arrays are checked whole
Json = dict[str, Any]


class DatasetStore:
    """configured: a folder whose entries are data sets, or None.  uploads: where uploaded ones are kept."""

    def __init__(self, settings: Settings) -> None:
        self.configured = settings.audits_data
        self.uploads = settings.state_dir / "datasets"

    def paths(self) -> dict[str, Path]:
        """Configured sets win over uploads of the same name."""
        found: dict[str, Path] = {}
        for folder in (self.uploads, self.configured):
            if folder is not None and folder.is_dir():
                found |= {p.name: p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and usable(p)}
        return found

    def listed(self) -> list[Json]:
        rows = [
            {"name": name, "kind": path.suffix.removeprefix(".") or "folder", "uploaded": path.parent == self.uploads}
            for name, path in self.paths().items()
        ]
        return [*rows, {"name": GENERATED, "kind": "generated", "uploaded": False}]

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

    def keep(self, name: str, upload: Path, library: Library) -> Json:
        """Checks an uploaded file and keeps it under its name. Raises AuditRejected, DataRejected."""
        if not NAME.fullmatch(name) or name == GENERATED:
            raise AuditRejected("the name of a data set: 1 to 64 of a-z, 0-9, dot, underscore, hyphen, not `generated`")
        kind = kind_of(upload)
        stem = name.removesuffix(".zip").removesuffix(".npz")
        named = upload.with_name(f".{secrets.token_hex(8)}{kind}")
        rename(upload, named)
        try:
            found = read_data(named, library.classes, CHECKED_IMAGES)
            rename(named, self.uploads / f"{stem}{kind}")
        except DataRejected as error:  # in the words of whoever sent it
            raise DataRejected(str(error).replace(named.name, name)) from None
        finally:
            named.unlink(missing_ok=True)
        return {"name": f"{stem}{kind}", "checked": len(found), "classes": len(set(found.labels.tolist()))}


def usable(path: Path) -> bool:
    return path.is_dir() or path.suffix in (".zip", ".npz")


def kind_of(upload: Path) -> str:
    """By content, never by a name: an npz is a zip of arrays."""
    try:
        with zipfile.ZipFile(upload) as archive:
            return ".npz" if any(name.endswith(".npy") for name in archive.namelist()) else ".zip"
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        raise DataRejected("the upload is neither a zip nor an npz") from None
