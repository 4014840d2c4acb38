"""Which part and which class the pictures of a data set belong to, by their paths, and what is said of the others."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Final, Literal

from model_store.errors import DataRejected, DataUnlabelled
from model_store.input_spec import InputSpec

SUFFIXES: Final = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif")
)
PartName = Literal["train", "val", "test", "all"]
PARTS: Final[Mapping[str, PartName]] = {  # the words that Hugging Face's folder datasets know
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SYSTEM_FOLDERS: Final = frozenset(
    ("__macosx", ".ipynb_checkpoints", "$recycle.bin", "system volume information", "@eadir", "#recycle", "lost+found")
)
SYSTEM_FILES: Final = frozenset(("thumbs.db", "desktop.ini", ".ds_store"))
TABLES: Final = (".csv", ".tsv")
ARCHIVES: Final = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".npz")
LAYOUTS: Final = (
    "expected <class>/<file>, or train/<class>/<file> and test/<class>/<file>, as a folder, a zip or a tar; "
    "an npz of images and labels; or torchvision's CIFAR"
)
LOOSE: Final = "pictures in no class's folder"
NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?")


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

    def leave_out(self, parts: "Mapping[PartName, Sized]", used: Iterable[PartName]) -> None:
        """Counts the pictures of parts that nobody reads."""
        for name in sorted(parts.keys() - set(used)):
            place = "beside the parts" if name == "all" else f"of {name}/"
            read = " and ".join(f"{part}/" for part in sorted(used))
            self.pass_over(f"pictures {place}, since {read} is read", name, len(parts[name]))

    def pass_over(self, reason: str, name: str, count: int = 1) -> None:
        self.passed_over[reason] += count
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
class Place:
    """Where a picture belongs. kind: its class, "" for none.  id: its path inside the part, unique."""

    part: PartName
    kind: str
    id: str


def place_pictures(where: str, names: Sequence[str], notes: Notes) -> dict[str, Place]:
    """The place of every picture that has a class; the other files are noted. Raises DataUnlabelled, DataRejected."""
    placed = dict(places(pictures_among(names, notes)))
    for name in [name for name, place in placed.items() if not place.kind]:
        notes.pass_over(LOOSE, name)
        del placed[name]
    if not placed:
        raise DataUnlabelled(f"{where}: {no_pictures(names, notes)}")
    if notes.refused_links:
        raise DataRejected(f"{where}: {links(notes)}; copy what they lead to")
    return placed


def no_pictures(names: Sequence[str], notes: Notes) -> str:
    """Why there are none, and what to do."""
    loose = notes.passed_over[LOOSE]
    tables = [name for name in names if name.lower().endswith(TABLES)]
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    if loose:
        table = (
            f", and a table {tables[0][-60:]}; tables are not read"
            if tables
            else "; without labels nothing is measured"
        )
        return (
            f"{loose} pictures in no class's folder, such as {notes.examples[LOOSE][-60:]}{table}: move each picture "
            "into a folder named after its class, train/<class>/<file>"
        )
    if archives:
        return f"no images but an archive {archives[0][-60:]}; give that instead, or unpack it"
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
        elif ".." in path.parts:
            notes.pass_over("names that lead out of their folder", name)
        elif any(part.startswith(".") for part in path.parts if part != "."):
            notes.pass_over("hidden files", name)
        elif path.suffix.lower() not in SUFFIXES:
            notes.pass_over("files of a kind not read", name)
        else:
            lines.append(name)
    return lines


def places(names: Sequence[str]) -> Iterator[tuple[str, Place]]:
    """Each picture's place by its path."""
    paths = {name: tuple(p for p in name.replace("\\", "/").split("/") if p not in ("", ".")) for name in names}
    known = part_names(paths.values())
    parted = {name: at for name, path in paths.items() if (at := part_place(path, known)) is not None}
    rest = {name: path for name, path in paths.items() if name not in parted}
    shared = shared_folders([path[:-2] for path in rest.values()])
    kinds = {name: composed(path[shared]) if len(path) - shared >= 2 else "" for name, path in rest.items()}
    of_part = {name for name, kind in kinds.items() if kind.lower() in known}
    if not parted and len(of_part) < sum(map(bool, kinds.values())):
        of_part = set()  # trains beside planes and ships: a class, and no part
    for name, path in paths.items():
        if name in parted:
            part, inner = known[path[parted[name]].lower()], path[parted[name] + 1 :]
            yield name, Place(part, composed(inner[0]), "/".join((part, *inner)))
        else:
            yield name, Place("all", "" if name in of_part else kinds[name], "/".join(path[shared:]))


def part_names(paths: Iterable[tuple[str, ...]]) -> dict[str, PartName]:
    """The folders that name parts: those of PARTS, and such as seg_train and seg_test, which are alike but for such a
    word. One of the two alone may be a class."""
    alike: dict[tuple[str, ...], dict[str, PartName]] = {}
    for name in {name.lower() for path in paths for name in path[:-2]}:
        words = [word for word in re.split(r"[\W_]+", name) if word]
        others = tuple(word for word in words if word not in PARTS)
        if len(words) - len(others) == 1:
            part = next(PARTS[word] for word in words if word in PARTS)
            alike.setdefault(others, {})[name] = part
    pairs = (names for others, names in alike.items() if others and {"train"} < set(names.values()))
    return {**PARTS, **{name: part for names in pairs for name, part in names.items()}}


def part_place(path: tuple[str, ...], known: Mapping[str, PartName]) -> int | None:
    """Where a path names its part, with a class and a file behind it."""
    return next((at for at in range(len(path) - 3, -1, -1) if path[at].lower() in known), None)


def shared_folders(paths: Sequence[tuple[str, ...]]) -> int:
    """How many folders all paths begin with."""
    columns = zip(*paths, strict=False)
    return next((at for at, names in enumerate(columns) if len(set(names)) > 1), min(map(len, paths), default=0))


def composed(name: str) -> str:
    """One spelling of a name: macOS writes accents apart (NFD), other systems in one (NFC)."""
    return unicodedata.normalize("NFC", name)


def number_of(name: str) -> Decimal | None:
    """The number that a class's name is, if it is one."""
    return Decimal(name) if NUMBER.fullmatch(name) else None


def ordered(where: str, classes: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of the alphabet; numbers by their value. Raises DataRejected for 1 beside 01."""
    names = sorted(set(classes))
    numbers = {name: number for name in names if (number := number_of(name)) is not None}
    if len(numbers) < len(names):
        return tuple(names)
    counts = Counter(numbers.values())
    if twice := [name for name in names if counts[numbers[name]] > 1]:
        raise DataRejected(f"{where}: class {twice[0]!r} is there in two spellings; expected one number for each class")
    return tuple(sorted(names, key=lambda name: numbers[name]))
