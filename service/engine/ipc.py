"""The messages between a thread of the service and its worker process. Numbers only: nothing is unpickled."""

import itertools
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from service.engine.base import Engine, Images, JobResult, Jobs

READY, RESULT, ERROR, HEARTBEAT = range(4)  # the kind of a worker's message: its first eight bytes
WORD: Final = struct.Struct("q")


def encode_request(images: Images, jobs: Jobs) -> bytes:
    """The images' shape; the number of jobs; (ticket, number of images) of each; its images' indices; all images."""
    head = [number for member, indices in jobs for number in (member, len(indices))]
    indices = [index for _, indices in jobs for index in indices]
    numbers = (*images.shape, len(jobs), *head, *indices)
    return struct.pack(f"{len(numbers)}i", *numbers) + images.tobytes()


def decode_request(message: bytes, shape: tuple[int, int, int]) -> tuple[Images, Jobs]:
    """shape: of one image. Raises ValueError for images of another shape."""
    *sent, count = struct.unpack_from("5i", message)
    if tuple(sent[1:]) != shape:
        raise ValueError(f"images of shape {sent[1:]}; this engine takes {list(shape)}")
    head = struct.unpack_from(f"{2 * count}i", message, 20)
    members, sizes = head[::2], head[1::2]
    start = 20 + 4 * len(head)
    indices = struct.unpack_from(f"{sum(sizes)}i", message, start)
    images = np.frombuffer(message, np.uint8, offset=start + 4 * len(indices)).reshape(sent)
    ends = itertools.accumulate(sizes)
    jobs = [(member, indices[end - size : end]) for member, size, end in zip(members, sizes, ends, strict=True)]
    return images, jobs


def encode_result(results: Sequence[JobResult]) -> bytes:
    """The seconds of each job; all logits."""
    seconds = struct.pack(f"{len(results)}d", *(seconds for _, seconds in results))
    return WORD.pack(RESULT) + seconds + b"".join(logits.tobytes() for logits, _ in results)


def decode_result(payload: bytes, jobs: Jobs, classes: int) -> list[JobResult]:
    """payload: a RESULT without its first word."""
    times = struct.unpack_from(f"{len(jobs)}d", payload)
    logits = np.frombuffer(payload, np.float32, offset=8 * len(jobs)).reshape(-1, classes)
    sizes = [len(indices) for _, indices in jobs]
    ends = itertools.accumulate(sizes)
    return [(logits[end - size : end], seconds) for size, end, seconds in zip(sizes, ends, times, strict=True)]


def encode_error(error: Exception) -> bytes:
    """The type's name alone: the text may quote a request."""
    return WORD.pack(ERROR) + type(error).__name__.encode()


def describe_engine(engine: Engine, digest: str) -> dict[str, Any]:
    names = ("name", "device", "threads", "macs", "input_shape", "difference", "note", "warm_up_s")
    return {"digest": digest} | {name: getattr(engine, name) for name in names}
