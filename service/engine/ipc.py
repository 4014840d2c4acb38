"""What a thread of the service and its process say to each other. Numbers only: nothing is unpickled."""

import itertools
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from service.engine.base import Engine, JobResult, Jobs, Rows

READY, FOUND, FAILED, HEARTBEAT = range(4)  # what a message from a process says: its first eight bytes
WORD: Final = struct.Struct("q")


def encode_request(rows: Rows, jobs: Jobs) -> bytes:
    """How many jobs; (ticket, how many rows) of each; the places of its rows; all rows."""
    head = [number for member, places in jobs for number in (member, len(places))]
    places = [place for _, places in jobs for place in places]
    return struct.pack(f"{1 + len(head) + len(places)}i", len(jobs), *head, *places) + rows.tobytes()


def decode_request(message: bytes) -> tuple[Rows, Jobs]:
    (count,) = struct.unpack_from("i", message)
    head = struct.unpack_from(f"{2 * count}i", message, 4)
    members, sizes = head[::2], head[1::2]
    places = struct.unpack_from(f"{sum(sizes)}i", message, 4 + 4 * len(head))
    rows = np.frombuffer(message, np.uint8, offset=4 + 4 * len(head) + 4 * len(places)).reshape(-1, 3, 32, 32)
    ends = itertools.accumulate(sizes)
    return rows, [(member, places[end - size : end]) for member, size, end in zip(members, sizes, ends, strict=True)]


def encode_result(ran: Sequence[JobResult]) -> bytes:
    """The seconds of each job; all logits."""
    seconds = struct.pack(f"{len(ran)}d", *(seconds for _, seconds in ran))
    return WORD.pack(FOUND) + seconds + b"".join(logits.tobytes() for logits, _ in ran)


def decode_result(answer: bytes, jobs: Jobs, classes: int) -> list[JobResult]:
    """`found` without its first word."""
    seconds = struct.unpack_from(f"{len(jobs)}d", answer)
    logits = np.frombuffer(answer, np.float32, offset=8 * len(jobs)).reshape(-1, classes)
    sizes = [len(places) for _, places in jobs]
    ends = itertools.accumulate(sizes)
    return [(logits[end - size : end], passed) for size, end, passed in zip(sizes, ends, seconds, strict=True)]


def encode_error(error: Exception) -> bytes:
    """Its type alone: the text may quote a request."""
    return WORD.pack(FAILED) + type(error).__name__.encode()


def describe_engine(engine: Engine, digest: str) -> dict[str, Any]:
    names = ("name", "device", "threads", "costs", "difference", "note", "warm_up_s")
    return {"digest": digest} | {name: getattr(engine, name) for name in names}
