"""What every backend shares: its function type, and what a ticket's logits have to be."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.input_spec import InputSpec
from model_store.structures import Network, fold_in_place
from model_store.ticket import Ticket

Images = NDArray[np.uint8]
"""[N, 3, H, W], 0 to 255."""
Logits = NDArray[np.float32]
"""[N, classes], divided by the ticket's temperature."""
Forward = Callable[[int, Images], Logits]
"""(ticket's index in the library, images) -> its logits. May be called from several threads at once."""
Jobs = Sequence[tuple[int, Sequence[int]]]
"""(ticket's index, indices of its images in a batch), one job a ticket."""
JobResult = tuple[Logits, float]
"""A job's logits, and its seconds."""
Precision = Literal["float32", "bfloat16", "int8"]
"""The arithmetic that tickets run in on a CPU."""
Heartbeat = Callable[[], None]
"""Called between jobs, so that the watchdog knows that nothing hangs."""

TOLERANCE: Final = 1e-4  # of logits, relative to the largest (or to 1, if that is smaller): float32 in another order
HALF_TOLERANCE: Final = 2e-2  # the same for float16
BFLOAT16_TOLERANCE: Final = 1e-1  # the same for bfloat16, which rounds eight times as coarsely
INT8_TOLERANCE: Final = 1.0  # the same for 8 bits: only nonsense is refused; `bench rounding` says what it costs


class Backend(NamedTuple):
    """What a backend's `build` returns. note: what was decided on the way, for the log."""

    forward: Forward
    tolerance: float
    note: str


@dataclass(frozen=True)
class Engine:
    """A library's tickets, warm. Frozen: a new library gets a new engine."""

    name: str
    device: str
    threads: int  # calls of `forward` that may run at once
    forward: Forward
    macs: tuple[int, ...]  # multiply-adds of one image, by ticket
    input_shape: tuple[int, int, int]  # of one image: (channels, height, width)
    difference: float  # the largest of a probe's logits from torch's in float32, relative as TOLERANCE is
    note: str
    warm_up_s: float
    run_remote: Callable[[Images, Jobs, Heartbeat], list[JobResult]] | None = None  # None: in the calling thread
    pids: Callable[[], list[int]] = list  # of the engine's own processes, the fork server's first

    def run(self, images: Images, jobs: Jobs, heartbeat: Heartbeat) -> list[JobResult]:
        """Every job's logits. Raises whatever the backend does."""
        if self.run_remote is not None:
            return self.run_remote(images, jobs, heartbeat)
        results = []
        for member, indices in jobs:
            started_at = time.perf_counter()
            logits = self.forward(member, images[list(indices)])
            results.append((logits, time.perf_counter() - started_at))
            heartbeat()
        return results


class FoldedTicket(NamedTuple):
    """A ticket as it is run: what `model_store.ensemble.calibrated` computes is network(images) / temperature."""

    name: str
    network: Network
    temperature: float
    input: InputSpec


def fold_ticket(ticket: Ticket) -> FoldedTicket:
    return FoldedTicket(ticket.name, fold_in_place(ticket.network()), ticket.temperature, ticket.input)


def random_images(count: int, shape: tuple[int, int, int]) -> Images:
    """Noise, other at each call. uint8 [count, *shape]."""
    noise = np.frombuffer(bytearray(os.urandom(count * math.prod(shape))), np.uint8)
    return noise.reshape(count, *shape)


def reference_logits(ticket: FoldedTicket, images: Images) -> Logits:
    """What the ticket means: torch, float32, on the CPU."""
    with torch.inference_mode():
        logits: Logits = (ticket.network(torch.from_numpy(images).float() / 255) / ticket.temperature).numpy()
    return logits


def max_relative_error(logits: Logits, expected: Logits) -> float:
    """The largest, relative to the largest expected, or to 1 if that is smaller."""
    return float(np.abs(logits - expected).max() / max(1.0, float(np.abs(expected).max())))
