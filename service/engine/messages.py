"""What a thread of the service and its process say to each other. Numbers only: nothing is unpickled."""

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from service.engine.base import Engine, Jobs, Ran, Rows

PROVEN, FOUND, FAILED, ALIVE = range(4)  # what a message from a process says: its first eight bytes
WORD: Final = struct.Struct("q")


def question(rows: Rows, jobs: Jobs) -> bytes:
    """How many jobs; (ticket, how many rows) of each; the places of its rows; all rows."""
    head = [len(jobs), *(number for member, places in jobs for number in (member, len(places)))]
    places = [place for _, places in jobs for place in places]
    return np.array(head + places, np.int32).tobytes() + np.ascontiguousarray(rows).tobytes()


def understood(message: bytes) -> tuple[Rows, Jobs]:
    (count,) = np.frombuffer(message, np.int32, 1).tolist()
    pairs = np.frombuffer(message, np.int32, 2 * count, 4).reshape(-1, 2)
    total = int(pairs[:, 1].sum())
    places = np.frombuffer(message, np.int32, total, 4 + 8 * count)
    rows = np.frombuffer(message, np.uint8, offset=4 + 8 * count + 4 * total).reshape(-1, 3, 32, 32)
    parts = [part.tolist() for part in np.split(places, np.cumsum(pairs[:, 1])[:-1])]
    return rows, list(zip(pairs[:, 0].tolist(), parts, strict=True))


def found(ran: Sequence[Ran]) -> bytes:
    """The seconds of each job; all logits."""
    seconds = np.array([seconds for _, seconds in ran], np.float64)
    return WORD.pack(FOUND) + seconds.tobytes() + np.concatenate([logits for logits, _ in ran]).tobytes()


def read(answer: bytes, jobs: Jobs, classes: int) -> list[Ran]:
    """`found` without its first word."""
    seconds = np.frombuffer(answer, np.float64, len(jobs)).tolist()
    logits = np.frombuffer(answer, np.float32, offset=8 * len(jobs)).reshape(-1, classes)
    cuts = np.cumsum([len(places) for _, places in jobs])[:-1]
    return list(zip(np.split(logits, cuts), seconds, strict=True))


def failed(error: Exception) -> bytes:
    """Its type alone: the text may quote a request."""
    return WORD.pack(FAILED) + type(error).__name__.encode()


def described(engine: Engine, digest: str) -> dict[str, Any]:
    names = ("name", "device", "threads", "costs", "difference", "note", "warm_up_s")
    return {"digest": digest} | {name: getattr(engine, name) for name in names}
