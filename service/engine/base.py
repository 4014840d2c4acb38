"""What every backend shares: its function type, and what a ticket's logits have to be."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.structures import Network, fold
from model_store.ticket import Ticket

Rows = NDArray[np.uint8]
"""[N, 3, 32, 32], 0 to 255."""
Logits = NDArray[np.float32]
"""[N, classes], divided by the ticket's temperature."""
Forward = Callable[[int, Rows], Logits]
"""(ticket's index in the library, its rows) -> its logits. May be called from several threads at once."""
Jobs = Sequence[tuple[int, Sequence[int]]]
"""(ticket's index, the places of its rows among some rows), one job a ticket."""
JobResult = tuple[Logits, float]
"""What a job found, and its seconds."""
Heartbeat = Callable[[], None]
"""Called between jobs: whoever watches knows that nothing hangs."""

TOLERANCE: Final = 1e-4  # of logits, relative to the largest (or to 1, if that is smaller): float32 in another order
HALF_TOLERANCE: Final = 2e-2  # the same for float16
INT8_TOLERANCE: Final = 1.0  # the same for 8 bits: only nonsense is refused; `bench int8` says what rounding costs


class EngineRejected(Exception):
    """A backend that is not there, or whose logits are not those of the tickets."""


class EngineDied(BaseException):
    """A process of the engine has died, or hung and was ended. Not an Exception: what it was at is not tried again, and
    the thread that waited for it ends as if it had died itself."""


class Backend(NamedTuple):
    """What a backend's `build` returns. note: what was decided on the way, for the log."""

    forward: Forward
    tolerance: float
    note: str


@dataclass(frozen=True)
class Engine:
    """A library's tickets, warm. Frozen: a new library gets a new engine.

    threads: how many calls of `forward` may run at once.  costs: multiply-adds of one image by ticket.
    difference: the largest difference of a probe's logit from torch's in float32, relative as TOLERANCE is.
    apart: several jobs at once in a process of its own; None where tickets run in the calling thread.
    pids: of the processes that are there for that, the host's first.
    """

    name: str
    device: str
    threads: int
    forward: Forward
    costs: tuple[int, ...]
    difference: float
    note: str
    warm_up_s: float
    apart: Callable[[Rows, Jobs, Heartbeat], list[JobResult]] | None = None
    pids: Callable[[], list[int]] = list

    def run(self, rows: Rows, jobs: Jobs, alive: Heartbeat) -> list[JobResult]:
        """Every job's logits. Raises whatever the backend does."""
        if self.apart is not None:
            return self.apart(rows, jobs, alive)
        found = []
        for member, places in jobs:
            begun = time.perf_counter()
            logits = self.forward(member, rows[list(places)])
            found.append((logits, time.perf_counter() - begun))
            alive()
        return found


class Folded(NamedTuple):
    """A ticket as it is run: what `model_store.ensemble.calibrated` computes is network(images) / temperature."""

    name: str
    network: Network
    temperature: float


def folded(ticket: Ticket) -> Folded:
    return Folded(ticket.name, fold(ticket.network()), ticket.temperature)


def reference(ticket: Folded, rows: Rows) -> Logits:
    """What the ticket means: torch, float32, on the CPU."""
    with torch.inference_mode():
        logits: Logits = (ticket.network(torch.from_numpy(rows).float() / 255) / ticket.temperature).numpy()
    return logits


def max_relative_error(found: Logits, expected: Logits) -> float:
    """The largest, relative to the largest expected, or to 1 if that is smaller."""
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
