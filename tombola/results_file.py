"""The table of `tombola classify`: a journal while it runs, and the finished table in its place at the end.

The journal is `.NAME.unfinished` beside the table: a line that says how the run began, then a line for each picture.
A run that is killed leaves it, and the next one goes on from its last whole line. The table itself is written whole.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self, TypeVar

from model_store.errors import TombolaError
from model_store.files import naming, replacing

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

if sys.platform != "win32":
    import fcntl

FORMATS: Final = (".jsonl", ".csv", ".parquet")
PARQUET_ROWS: Final = 10_000  # of one row group


class ResultsRejected(TombolaError):
    """A table that cannot be written, or an unfinished one of another run."""


@dataclass(frozen=True)
class Row:
    """One picture's answer, or its error.

    label, index: the commonest over the draws.  probability: its mean over the draws that gave it, as far as shown.
    agreement: share of the draws that gave it.  library: digest.
    """

    file: str
    label: str | None = None
    index: int | None = None
    probability: float | None = None
    agreement: float | None = None
    draws: int = 0
    library: str | None = None
    error: str | None = None


COLUMNS: Final = tuple(Row.__dataclass_fields__)


class ResultsFile:
    """A table that is being made. Use it with `with`; `finish` puts the table in its place.

    done: names of the pictures that an earlier run has finished.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Raises ResultsRejected: an unknown suffix, a finished table, an unfinished one of another run."""
        check_path(path)
        self.path = path
        self.journal = path.with_name(f".{path.name}.unfinished")
        self.run = {"tombola": "classify", **run}
        self.file = self.open()
        try:
            self.done = frozenset(self.resume())
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def open(self) -> BinaryIO:
        """The journal, locked. Raises ResultsRejected if another process has it."""
        with naming(self.journal):
            file = self.journal.open("a+b")
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ResultsRejected(f"{self.journal}: another process is writing it") from None
        return file

    def resume(self) -> Iterator[str]:
        """The names in the journal; what follows its last whole line is cut off."""
        self.file.seek(0)
        head = self.file.readline()
        if not head.endswith(b"\n"):
            if head and not self.head().startswith(head):
                raise ResultsRejected(f"{self.journal}: not an unfinished table of `tombola classify`; move it away")
            self.file.truncate(0)
            self.file.write(self.head())
            return
        self.check_head(head)
        end = self.file.tell()
        for number, line in enumerate(self.file, 2):
            if not line.endswith(b"\n"):
                break
            yield self.parse(line, number).file
            end += len(line)
        self.file.truncate(end)

    def head(self) -> bytes:
        return json.dumps(self.run).encode() + b"\n"

    def check_head(self, line: bytes) -> None:
        try:
            head = dict(json.loads(line))
        except (ValueError, TypeError):
            head = {}
        if head.get("tombola") != "classify":
            raise ResultsRejected(f"{self.journal}: not an unfinished table of `tombola classify`; move it away")
        for name, value in self.run.items():
            if head.get(name) != value:
                raise ResultsRejected(
                    f"{self.journal}: begun with {name} {head.get(name)}, not {value}; "
                    "repeat the options it was begun with, or delete it"
                )

    def parse(self, line: bytes, number: int) -> Row:
        try:
            return Row(**json.loads(line))
        except (ValueError, TypeError):
            raise ResultsRejected(f"{self.journal}: line {number} is damaged; delete the file to begin anew") from None

    def add(self, row: Row) -> None:
        """Whole lines reach the file at once, so that a killed run loses none."""
        self.file.write(json.dumps(asdict(row)).encode() + b"\n")
        self.file.flush()

    def rows(self) -> Iterator[Row]:
        self.file.seek(0)
        self.file.readline()
        for number, line in enumerate(self.file, 2):
            yield self.parse(line, number)

    def finish(self) -> None:
        """Writes the table and removes the journal."""
        writers = {".jsonl": self.write_jsonl, ".csv": self.write_csv, ".parquet": self.write_parquet}
        with replacing(self.path) as file:
            writers[self.path.suffix.lower()](file)
        self.journal.unlink()

    def write_jsonl(self, file: BinaryIO) -> None:
        file.writelines(json.dumps(values(row), ensure_ascii=False).encode() + b"\n" for row in self.rows())

    def write_csv(self, file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(map(values, self.rows()))
        text.detach()

    def write_parquet(self, file: BinaryIO) -> None:
        from pyarrow import parquet

        with parquet.ParquetWriter(file, table_of(()).schema) as table:
            for rows in batched(self.rows(), PARQUET_ROWS):
                table.write_table(table_of(rows))


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch


def table_of(rows: Sequence[Row]) -> "pyarrow.Table":
    import pyarrow as arrow

    text, number, share = arrow.string(), arrow.int32(), arrow.float64()
    types = (text, text, number, share, share, number, text, text)
    return arrow.Table.from_pylist(list(map(values, rows)), schema=arrow.schema(list(zip(COLUMNS, types, strict=True))))


def values(row: Row) -> dict[str, Any]:
    """By column. A file's name that is no UTF-8 is shown with escapes: no format of tables has such bytes."""
    return {**asdict(row), "file": os.fsencode(row.file).decode("utf-8", "backslashreplace")}


def check_path(path: Path) -> None:
    """Whether a table may be written there. Raises ResultsRejected."""
    if path.suffix.lower() not in FORMATS:
        raise ResultsRejected(f"--out {path}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix.lower() == ".parquet":
        require_pyarrow(path)
    if path.exists():
        raise ResultsRejected(f"--out {path}: is there already; delete it, or choose another name")
    if not path.parent.is_dir():
        raise ResultsRejected(f"--out {path}: the folder {path.parent} is not there")


def require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ResultsRejected(f"--out {path}: needs pyarrow; `pip install tombola[parquet]`") from None
