"""A window: rows that are answered together, each with a theta of its own, grouped by the tickets they drew."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_store.policy import Policy, Theta, draw_theta
from service.engine.base import Engine, Heartbeat, Logits, Rows
from service.errors import ServiceError
from service.observability.metrics import Metrics

log = logging.getLogger(__name__)

Probabilities = NDArray[np.float32]
"""[N, classes]"""

SYSTEM_RNG: Final = (
    secrets.SystemRandom()
)  # the operating system's entropy: no state that could be learnt, or copied by fork


@dataclass(frozen=True)
class ServedModel:
    """What rows are answered with: a library's tickets on an engine, and the law of theta over them."""

    engine: Engine
    policy: Policy
    classes: int


@dataclass(eq=False)
class PendingRequest:
    """The rows of one call of submit. Its answer is filled in by windows; only the event loop's thread touches that.

    live: somebody still waits for it. Engine threads read it to skip rows.  taken: when the window of its first row
    was begun, known once that row is answered.
    """

    rows: Rows
    client: str
    answer: asyncio.Future[Probabilities]
    admitted: float
    taken: float | None = None
    next: int = 0
    live: bool = True
    found: Probabilities | None = None
    answered: int = 0

    @property
    def size(self) -> int:
        return len(self.rows)

    def fill(self, index: int, row: Probabilities) -> None:
        if self.found is None:
            self.found = np.empty((self.size, len(row)), np.float32)
        self.found[index] = row
        self.answered += 1
        if self.answered == self.size and not self.answer.done():
            self.answer.set_result(self.found)

    def fail(self, error: ServiceError) -> None:
        self.live = False
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False)
class MemberTask:
    """One drawn ticket and the rows of a window that drew it. times: how often each drew it (1 without replacement)."""

    window: "Batch"
    member: int
    places: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    logits: Logits | None = None
    seconds: float = 0.0


@dataclass(eq=False)
class Batch:
    """Rows that are answered together, each with its own theta."""

    model: ServedModel
    places: list[tuple[PendingRequest, int]]
    rows: Rows
    thetas: list[Theta]
    begun: float
    tasks: list[MemberTask] = field(default_factory=list)
    unfinished: int = 0  # parts that are not done
    failed: set[int] = field(default_factory=set)

    def live(self, place: int) -> bool:
        return self.places[place][0].live


@dataclass(eq=False)
class Shard:
    """Some of a window's tasks, which one thread runs."""

    window: Batch
    tasks: list[MemberTask] = field(default_factory=list)
    cost: int = 0

    def add(self, task: MemberTask) -> None:
        self.tasks.append(task)
        self.cost += cost_of(task)


def form_batch(model: ServedModel, places: list[tuple[PendingRequest, int]]) -> Batch:
    """Draws a theta for every row and groups the rows by ticket; the costliest task comes first."""
    begun = time.perf_counter()
    thetas = [draw_theta(model.policy, SYSTEM_RNG) for _ in places]
    rows = np.stack([request.rows[index] for request, index in places])
    window = Batch(model, places, rows, thetas, begun)
    tasks: dict[int, MemberTask] = {}
    for place, theta in enumerate(thetas):
        for member, times in Counter(theta.members).items():
            task = tasks.setdefault(member, MemberTask(window, member))
            task.places.append(place)
            task.times.append(times)
    window.tasks = sorted(tasks.values(), key=cost_of, reverse=True)
    return window


def cost_of(task: MemberTask) -> int:
    return task.window.model.engine.costs[task.member] * len(task.places)


def partition(window: Batch, threads: int) -> list[Shard]:
    """The window's tasks in as many parts as there are threads to run them, or as tasks: the costliest first, each to
    the part that is cheapest yet."""
    parts = [Shard(window) for _ in range(min(threads, len(window.tasks)))]
    for task in window.tasks:
        min(parts, key=lambda part: part.cost).add(task)
    window.unfinished = len(parts)
    return parts


def run(part: Shard, metrics: Metrics, alive: Heartbeat = lambda: None) -> None:
    """One forward pass of each of its tickets. If that fails, each ticket again by itself."""
    tasks = [task for task in part.tasks if drop_cancelled(task)]
    if not tasks:
        return
    jobs = [(task.member, task.places) for task in tasks]
    try:
        ran = part.window.model.engine.run(part.window.rows, jobs, alive)
        for task, (logits, seconds) in zip(tasks, ran, strict=True):
            task.logits, task.seconds = finite(logits), seconds
    except Exception:  # noqa: BLE001 -- whatever a backend raises concerns these rows only
        for task in tasks:
            run_again(task, metrics)
            alive()


def run_again(task: MemberTask, metrics: Metrics) -> None:
    """One ticket. If it fails, each row alone, so that a bad row fails only itself."""
    begun = time.perf_counter()
    try:
        task.logits = forward(task, task.places)
    except Exception as error:  # noqa: BLE001 -- as above
        log.warning("ticket failed on %d rows (%s), each is run again alone", len(task.places), type(error).__name__)
        metrics.inc("engine_retries_total", len(task.places))
        task.logits = np.concatenate([run_single(task, place) for place in task.places])
    task.seconds = time.perf_counter() - begun


def drop_cancelled(task: MemberTask) -> bool:
    """Rows whose request was cancelled or came too late are taken out: they are not computed."""
    pairs = [pair for pair in zip(task.places, task.times, strict=True) if task.window.live(pair[0])]
    task.places, task.times = [place for place, _ in pairs], [times for _, times in pairs]
    return bool(pairs)


def forward(task: MemberTask, places: list[int]) -> Logits:
    return finite(task.window.model.engine.forward(task.member, task.window.rows[places]))


def finite(logits: Logits) -> Logits:
    if not np.isfinite(logits).all():
        raise ArithmeticError("a logit is not finite")
    return logits


def run_single(task: MemberTask, place: int) -> Logits:
    try:
        return forward(task, [place])
    except Exception:  # noqa: BLE001 -- as above
        task.window.failed.add(place)
        return np.zeros((1, task.window.model.classes), np.float32)


def combine_members(window: Batch) -> Probabilities:
    """Eq. 1 for every row, then the softmax of its members' mean. In the order of the tickets, so that the answer does
    not depend on which thread was faster. Rows of requests that have ended are zero."""
    done = sorted(
        ((task, task.logits) for task in window.tasks if task.logits is not None), key=lambda pair: pair[0].member
    )
    sums = np.zeros((len(window.places), window.model.classes), np.float32)
    if done:
        places = [place for task, _ in done for place in task.places]
        times = np.array([times for task, _ in done for times in task.times], np.float32)
        np.add.at(sums, places, np.concatenate([logits for _, logits in done]) * times[:, None])
    sizes = np.array([len(theta.members) for theta in window.thetas], np.float32)
    return softmax(sums / sizes[:, None])


def softmax(logits: Probabilities) -> Probabilities:
    """By row. As `model_store.ensemble.probabilities` has it; torch would take a third of a millisecond to begin."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Probabilities = powers / powers.sum(axis=1, keepdims=True)
    return found
