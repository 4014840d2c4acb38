"""Library: a manifest and the tickets it names, verified whole before use, and replaced whole or not at all.

A ticket's file name ends in the first twelve characters of its SHA-256. So a new library never writes over a file of
the old one. The new library is there once manifest.json is replaced, which is atomic.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError

from model_store import manifest as manifests
from model_store.errors import LibraryRejected, PolicyRejected, StoreError, TicketRejected
from model_store.files import PART, sync_folder, write_atomically
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.json_object import first_error
from model_store.manifest import Claim, DefaultPolicy, Entry, Manifest, Provenance
from model_store.policy import Policy
from model_store.ticket import (
    ZERO_DIGEST,
    Ticket,
    decode,
    encode,
    read_bytes,
)

if sys.platform != "win32":
    import fcntl

EMBEDDED: Final = Path(__file__).parent / "library"
MANIFEST: Final = "manifest.json"
TICKETS: Final = "tickets"
WRITING: Final = ".writing"  # there, and locked, while a writer is at work
OURS: Final = re.compile(r"[a-z0-9][a-z0-9.-]*-[0-9a-f]{12}\.safetensors")

Item = tuple[Ticket, Provenance, Sequence[Claim]]


class File(NamedTuple):
    """A ticket's entry and the bytes it is the entry of."""

    entry: Entry
    data: bytes


@dataclass(frozen=True)
class Library:
    """tickets: those that may be drawn, in manifest order: index j is ticket j of `policy`.  baselines: the others.

    digest: the manifest's own, in hex; it covers every file.
    """

    path: Path
    manifest: Manifest
    digest: str
    tickets: tuple[Ticket, ...]
    baselines: tuple[Ticket, ...]
    policy: Policy

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def input(self) -> InputSpec:
        """What its networks take as a picture."""
        return self.manifest.input or CIFAR10_INPUT

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The manifest's entries of `tickets`, in the same order."""
        return with_role(self.manifest, "ticket")

    @property
    def baseline_entries(self) -> tuple[Entry, ...]:
        return with_role(self.manifest, "baseline")


def with_role(manifest: Manifest, role: str) -> tuple[Entry, ...]:
    return tuple(entry for entry in manifest.entries if entry.role == role)


# Reading


def open_library(path: Path | None = None) -> Library:
    """Opens a library with every byte of it verified.

    A library that is being replaced meanwhile opens as the old one or as the new one.

    Args:
      path: the library's folder; None for the embedded library.

    Returns:
      The library, its tickets in the manifest's order.

    Raises:
      LibraryRejected: a file is missing, damaged or not listed. The message names it.
      TicketRejected: a ticket is damaged.
    """
    root = EMBEDDED if path is None else Path(path)
    try:
        return latest(root, read_manifest(root))
    except OSError as error:
        raise LibraryRejected(f"{root}: cannot be read: {error}") from error


def latest(root: Path, data: bytes) -> Library:
    """The library of this manifest, or of the one that has replaced it while its tickets were being read."""
    try:
        return verified(root, data)
    except StoreError:
        now = read_manifest(root)
        if now == data:
            raise
        return latest(root, now)


def read_manifest(root: Path) -> bytes:
    file = root / MANIFEST
    if not root.is_dir():
        raise LibraryRejected(f"{root}: no such folder. Export a library there, or choose another")
    if file.is_symlink() or not file.is_file():
        raise LibraryRejected(f"{file}: no such file, or not a regular one; expected the manifest of a library")
    if file.stat().st_size > manifests.MAX_MANIFEST_BYTES:
        raise LibraryRejected(f"{file}: {file.stat().st_size} bytes; at most {manifests.MAX_MANIFEST_BYTES} are read")
    return file.read_bytes()


def verified(root: Path, data: bytes) -> Library:
    try:
        manifest = manifests.parse(data)
    except LibraryRejected as error:
        raise LibraryRejected(f"{root / MANIFEST}: {error}") from error
    policy = default_policy(root / MANIFEST, manifest)
    check_no_unlisted_files(root, manifest)
    spec = manifest.input or CIFAR10_INPUT
    tickets = {entry.name: read_ticket(root, entry, spec) for entry in manifest.entries}
    return Library(
        path=root,
        manifest=manifest,
        digest=manifest.digest,
        tickets=tuple(tickets[entry.name] for entry in with_role(manifest, "ticket")),
        baselines=tuple(tickets[entry.name] for entry in with_role(manifest, "baseline")),
        policy=policy,
    )


def default_policy(where: Path, manifest: Manifest) -> Policy:
    fields, names = manifest.policy, [entry.name for entry in with_role(manifest, "ticket")]
    unknown = sorted({name for group in fields.groups for name in group} - set(names))
    if unknown:
        raise LibraryRejected(f"{where}: policy: {unknown[0]!r} is no ticket of this library")
    groups = tuple(tuple(names.index(name) for name in group) for group in fields.groups)
    try:
        return Policy(groups, len(names), fields.sizes, fields.every, fields.replacement)
    except PolicyRejected as error:
        raise LibraryRejected(f"{where}: policy: {error}") from error


def check_no_unlisted_files(root: Path, manifest: Manifest) -> None:
    """Nothing lies among the tickets that the manifest does not name, unless a writer is at work or was cut off."""
    folder = root / TICKETS
    if folder.is_symlink() or not folder.is_dir():
        raise LibraryRejected(f"{folder}: no such folder, or a symbolic link; expected the library's tickets")
    writing = (root / WRITING).exists()  # before the listing and after it: a writer may start or end in between
    strangers = sorted(set(folder.iterdir()) - {root / entry.file for entry in manifest.entries})
    if strangers and not (writing or (root / WRITING).exists()):
        raise LibraryRejected(f"{strangers[0]}: not in the manifest. A library holds nothing else; take it away")


def read_ticket(root: Path, entry: Entry, spec: InputSpec) -> Ticket:
    """The entry's ticket, once its file's digest is right and it is what the entry says. The file is read once."""
    path = root / entry.file
    if path.is_symlink():
        raise TicketRejected(f"{path}: a symbolic link; expected a regular file in the library's folder")
    data = read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise TicketRejected(
            f"{path}: SHA-256 {digest}; the manifest says {entry.sha256}: damaged or from another export"
        )
    try:
        ticket = decode(data)
    except TicketRejected as error:
        raise TicketRejected(f"{path}: {error}") from error
    for field in ("structure", "density", "kind"):
        inside, declared = getattr(ticket, field), getattr(entry, field)
        if inside != declared:
            raise TicketRejected(f"{path}: {field} {inside} in the file, {declared} in the manifest")
    if ticket.input != spec:
        raise TicketRejected(f"{path}: its {difference(ticket.input, spec)} in the manifest")
    return ticket


def difference(spec: InputSpec, other: InputSpec) -> str:
    """Where two inputs differ: "input height 64, and 32"."""
    ours, theirs = asdict(spec), asdict(other)
    field = next(name for name in ours if ours[name] != theirs[name])
    return f"input {field} is {ours[field]}, and {theirs[field]}"


# Writing


def write_library(
    path: Path,
    *,
    classes: Sequence[str],
    data: str,
    tickets: Sequence[Item],
    baselines: Sequence[Item] = (),
    policy: Policy | None = None,
) -> Library:
    """Writes or replaces the library in a folder, and opens what it wrote.

    All or nothing: after a crash or a power cut the folder has the old library or the new one.

    Args:
      path: the folder; it is made if need be.
      classes: the labels, in the order of the logits.
      data: the name of the data set that the tickets were searched on.
      tickets: those that may be drawn, each with its provenance and its results.
      baselines: dense networks to compare with, which are never drawn.
      policy: how ensembles are drawn; None for the method's own sampling policy.

    Returns:
      The library, as `open_library` reads it.

    Raises:
      LibraryRejected: the parts do not fit together, the folder has files of another origin, or another process
        writes there. Nothing was written.
      OSError: the disk does not take it.
    """
    root = Path(path)
    if not tickets:
        raise LibraryRejected(f"{root}: no tickets given: there would be nothing to draw from")
    files = [described(item, "ticket") for item in tickets] + [described(item, "baseline") for item in baselines]
    law = policy or Policy.over([ticket.structure.name for ticket, _, _ in tickets])
    spec = common_input([ticket for ticket, _, _ in (*tickets, *baselines)])
    manifest = composed(tuple(classes), data, law, [file.entry for file in files], spec)
    default_policy(root / MANIFEST, manifest)
    (root / TICKETS).mkdir(parents=True, exist_ok=True)
    check_only_own_files(root / TICKETS)
    with write_lock(root):
        for file in files:
            write_atomically(root / file.entry.file, file.data)
        write_atomically(root / MANIFEST, manifests.canonical(manifest))
        remove_unreferenced(root, manifest)
    return open_library(root)


def described(item: Item, role: str) -> File:
    ticket, provenance, claims = item
    data = encode(ticket)
    sha256 = hashlib.sha256(data).hexdigest()
    fields = {
        "name": ticket.name,
        "file": manifests.file_name(ticket.name, sha256),
        "sha256": sha256,
        "role": role,
        "structure": ticket.structure,
        "density": float(ticket.density),
        "kind": ticket.kind,
        "provenance": provenance,
        "claims": tuple(claims),
    }
    try:
        return File(Entry.model_validate(fields), data)
    except ValidationError as error:
        raise LibraryRejected(f"{ticket.name}: {first_error(error)}") from error


def common_input(tickets: Sequence[Ticket]) -> InputSpec:
    """The input that all take. Raises LibraryRejected."""
    first, *others = tickets
    for other in others:
        if other.input != first.input:
            where = difference(other.input, first.input)
            raise LibraryRejected(f"{other.name}: its {where} of {first.name}; expected one input for all")
    return first.input


def composed(classes: tuple[str, ...], data: str, law: Policy, entries: list[Entry], spec: InputSpec) -> Manifest:
    names = [entry.name for entry in entries if entry.role == "ticket"]
    if law.tickets != len(names):
        raise LibraryRejected(f"a policy over {law.tickets} tickets; the library has {len(names)}")
    groups = tuple(tuple(names[index] for index in group) for group in law.groups)
    policy = DefaultPolicy(groups=groups, sizes=law.sizes, every=law.every, replacement=law.replacement)
    version = manifests.version_for((entry.structure for entry in entries), spec)
    try:
        return manifests.with_digest(
            Manifest(
                version=version,
                digest=ZERO_DIGEST,
                classes=classes,
                data=data,
                policy=policy,
                entries=tuple(entries),
                input=None if version == 1 else spec,
            )
        )
    except ValidationError as error:
        raise LibraryRejected(f"manifest: {first_error(error)}") from error


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Holds the folder's lock file, which tells readers that files may lie there that no manifest names yet."""
    marker = root / WRITING
    with marker.open("a") as lock:
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LibraryRejected(f"{root}: another process is writing this library; try again later") from error
            if not marker.exists() or marker.stat().st_ino != os.fstat(lock.fileno()).st_ino:
                raise LibraryRejected(f"{root}: another process has just written this library; try again")
        sync_folder(root)
        sync_folder(root.parent)
        yield
        marker.unlink()
        sync_folder(root)


def check_only_own_files(folder: Path) -> None:
    """The sweep removes what no manifest names, so only what a library's writer leaves may lie here."""
    foreign = [path for path in sorted(folder.iterdir()) if not (OURS.fullmatch(path.name) or PART.match(path.name))]
    if foreign:
        raise LibraryRejected(f"{foreign[0]}: no file of a library's; take it away, or choose another folder")


def remove_unreferenced(root: Path, manifest: Manifest) -> None:
    """Removes what the manifest does not name: the last library's tickets, and the parts of cut-off writers."""
    named = {root / entry.file for entry in manifest.entries}
    parts = [path for path in root.iterdir() if PART.match(path.name)]
    for path in [*parts, *(root / TICKETS).iterdir()]:
        if path not in named:
            path.unlink()
    sync_folder(root / TICKETS)
