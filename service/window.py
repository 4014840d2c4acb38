"""A window: rows that are answered together, each with a theta of its own, grouped by the tickets they drew."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.ensemble import probabilities
from model_store.theta import Policy, Theta, draw_theta
from service.engine import Engine, Logits, Rows
from service.errors import ServiceError
from service.metrics import Metrics

log = logging.getLogger(__name__)

Probabilities = NDArray[np.float32]
"""[N, classes]"""

CHANCE: Final = (
    secrets.SystemRandom()
)  # the operating system's entropy: no state that could be learnt, or copied by fork


@dataclass(frozen=True)
class Model:
    """What rows are answered with: a library's tickets on an engine, and the law of theta over them."""

    engine: Engine
    policy: Policy
    classes: int


@dataclass(eq=False)
class Request:
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
class Task:
    """One drawn ticket and the rows of a window that drew it. times: how often each drew it (1 without replacement)."""

    window: "Window"
    member: int
    places: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    logits: Logits | None = None
    seconds: float = 0.0


@dataclass(eq=False)
class Window:
    """Rows that are answered together, each with its own theta."""

    model: Model
    places: list[tuple[Request, int]]
    rows: Rows
    thetas: list[Theta]
    begun: float
    tasks: list[Task] = field(default_factory=list)
    unfinished: int = 0
    failed: set[int] = field(default_factory=set)

    def live(self, place: int) -> bool:
        return self.places[place][0].live


def lay_out(model: Model, places: list[tuple[Request, int]]) -> Window:
    """Draws a theta for every row and groups the rows by ticket; the costliest task comes first."""
    begun = time.perf_counter()
    thetas = [draw_theta(model.policy, CHANCE) for _ in places]
    rows = np.stack([request.rows[index] for request, index in places])
    window = Window(model, places, rows, thetas, begun)
    tasks: dict[int, Task] = {}
    for place, theta in enumerate(thetas):
        for member, times in Counter(theta.members).items():
            task = tasks.setdefault(member, Task(window, member))
            task.places.append(place)
            task.times.append(times)
    costs = model.engine.costs
    window.tasks = sorted(tasks.values(), key=lambda task: -costs[task.member] * len(task.places))
    window.unfinished = len(window.tasks)
    return window


def run(task: Task, metrics: Metrics) -> None:
    """One forward pass of one ticket. If it fails, each row again alone, so that a bad row fails only itself."""
    task.places, task.times = still_wanted(task)
    if not task.places:
        return
    begun = time.perf_counter()
    try:
        task.logits = forward(task, task.places)
    except Exception as error:  # noqa: BLE001 -- whatever a backend raises concerns these rows only
        log.warning("ticket failed on %d rows (%s), each is run again alone", len(task.places), type(error).__name__)
        metrics.inc("engine_retries_total", len(task.places))
        task.logits = np.concatenate([alone(task, place) for place in task.places])
    task.seconds = time.perf_counter() - begun


def still_wanted(task: Task) -> tuple[list[int], list[int]]:
    """Rows whose request was cancelled or came too late are not computed."""
    window = task.window
    wanted = [(place, times) for place, times in zip(task.places, task.times, strict=True) if window.live(place)]
    return [place for place, _ in wanted], [times for _, times in wanted]


def forward(task: Task, places: list[int]) -> Logits:
    logits = task.window.model.engine.forward(task.member, task.window.rows[places])
    if not np.isfinite(logits).all():
        raise ArithmeticError("a logit is not finite")
    return logits


def alone(task: Task, place: int) -> Logits:
    try:
        return forward(task, [place])
    except Exception:  # noqa: BLE001 -- as above
        task.window.failed.add(place)
        return np.zeros((1, task.window.model.classes), np.float32)


def summed(window: Window) -> Probabilities:
    """Eq. 1 for every row, then the softmax of its members' mean. In the order of the tickets, so that the answer does
    not depend on which thread was faster. Rows of requests that have ended are zero."""
    sums = np.zeros((len(window.places), window.model.classes), np.float32)
    for task in sorted(window.tasks, key=lambda task: task.member):
        if task.logits is not None:
            sums[task.places] += task.logits * np.array(task.times, np.float32)[:, None]
    sizes = torch.tensor([len(theta.members) for theta in window.thetas])
    found: Probabilities = probabilities(torch.from_numpy(sums), sizes).numpy()
    return found
