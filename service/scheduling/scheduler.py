"""From rows to answers: a theta for every row, rows grouped by ticket, each drawn ticket run once on its rows.

Rows wait in fair queues. Whenever an engine thread has nothing to do it takes the next window of rows, draws a theta
for each, lays out one task per drawn ticket, and puts them into as many parts of equal cost as there are threads;
whoever ends the last part of a window adds up. So nothing waits for a window to fill, one window is formed while the
last part of another runs, and the event loop is woken once per window. A window's rows are answered together, which
hides much of what their ensembles cost.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from model_store.library import Library
from model_store.policy import inclusion_probabilities
from service.engine.base import Engine, Rows
from service.errors import DeadlineExceeded, Draining, EngineFailed, NotReady, Overloaded, RateLimited
from service.observability.metrics import PUBLISH_EVERY, Metrics
from service.observability.tracing import record_queue_spans
from service.scheduling.admission import FairQueue, RateLimiter, ThroughputEstimate
from service.scheduling.batch import Batch, PendingRequest, Probabilities, ServedModel
from service.scheduling.worker_pool import WorkerPool
from service.settings import Settings

# Of the time left, what may be spent waiting by the estimate. At twice the capacity everyone admitted waits as long as
# the gate allows: with all of it a third came too late, by the estimate's error, after their rows had been computed.
MAX_WAIT_SHARE: Final = 0.4


class AdmissionController:
    """Who may come in, over all libraries: rows admitted and not yet answered, rates, and the pace of late."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.rows = 0
        self.pace = ThroughputEstimate()
        self.buckets = RateLimiter(settings.rate_images_per_s, settings.rate_burst_images)

    def check(self, client: str, size: int, ahead: int, left_s: float) -> None:
        """Whether so many rows may come in. ahead: rows to be taken before the last of these, and those being run.
        left_s: to the deadline.

        Raises RateLimited, DeadlinePassed, Overloaded.
        """
        wait_s = self.buckets.wait_s(client, size, time.monotonic())
        if wait_s > 0:
            self.metrics.inc("shed_total", reason="rate")
            raise RateLimited(retry_after=math.ceil(wait_s))
        if left_s <= 0:
            self.metrics.inc("shed_total", reason="deadline")
            raise DeadlineExceeded
        if self.rows + size > self.settings.queue_rows:
            self.metrics.inc("shed_total", reason="queue")
            raise Overloaded(retry_after=self.pace.retry_after_s(self.rows))
        if self.rows > 0 and self.pace.wait_s(ahead) > MAX_WAIT_SHARE * left_s:  # it would be computed for nothing
            self.metrics.inc("shed_total", reason="deadline")
            raise Overloaded(retry_after=self.pace.retry_after_s(self.rows))

    def admit(self, client: str, size: int) -> None:
        self.buckets.take(client, size, time.monotonic())
        self.count(size)

    def count(self, change: int) -> None:
        self.rows += change


class Scheduler:
    """The way in for rows of one library. Several may share one set of workers and one gate."""

    def __init__(
        self,
        library: Library,
        engine: Engine,
        workers: WorkerPool,
        gate: AdmissionController,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.model = ServedModel(engine, library.policy, len(library.classes))
        self.queue: FairQueue[PendingRequest] = FairQueue()
        self.workers = workers
        self.gate = gate
        self.settings = settings
        self.metrics = metrics
        self.tally = DrawStatistics(library, metrics)

    async def submit(self, rows: Rows, *, client: str, deadline: float | None = None) -> Probabilities:
        """Softmax of the members' mean, [N, classes], of a theta drawn for each row.

        rows: uint8 [N, 3, 32, 32].  client: whose turn it uses up.  deadline: on the event loop's clock; None for
        settings.deadline_s from now. Whoever cancels the call drops its rows. Raises Overloaded, RateLimited,
        DeadlinePassed, EngineFailed, Draining, NotReady.
        """
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        until = arrived + self.settings.deadline_s if deadline is None else deadline
        request = self.admit(rows, client, until - arrived)
        timer = loop.call_at(until, self.expire, request)
        try:
            found = await request.answer
            await self.pad_latency(loop.time() - arrived)
        finally:
            timer.cancel()
            self.release(request)
            record_queue_spans(request.admitted, request.taken)
        return found

    def check(self, size: int, client: str, left_s: float) -> None:
        """Whether so many rows would be admitted now: asked before they are decoded, since a refusal must be cheap.

        Raises what submit does.
        """
        if self.workers.closing:
            self.metrics.inc("shed_total", reason="draining")
            raise Draining
        if self.workers.broken:
            raise NotReady
        running = self.gate.rows - self.queue.rows
        self.gate.check(client, size, self.queue.ahead(client, size) + running, left_s)

    def admit(self, rows: Rows, client: str, left_s: float) -> PendingRequest:
        self.check(len(rows), client, left_s)
        self.gate.admit(client, len(rows))
        request = PendingRequest(rows, client, asyncio.get_running_loop().create_future(), time.perf_counter())
        self.workers.push(self, request)
        self.metrics.set("queue_depth", self.queue.rows)
        return request

    def expire(self, request: PendingRequest) -> None:
        self.metrics.inc("shed_total", reason="deadline")
        request.fail(DeadlineExceeded())

    def release(self, request: PendingRequest) -> None:
        """Answered or not: rows that no window has taken yet are not computed."""
        request.live = False
        if request.next < request.size:
            self.workers.drop(self, request)
        self.gate.count(-request.size)
        self.metrics.set("queue_depth", self.queue.rows)

    async def pad_latency(self, passed_s: float) -> None:
        """Waits for the next multiple of quantum_ms, so that the time to an answer tells less of its theta."""
        step_s = self.settings.quantum_ms / 1000
        if step_s > 0:
            await asyncio.sleep(math.ceil(passed_s / step_s) * step_s - passed_s)

    def deliver(self, window: Batch, found: Probabilities) -> None:
        """The answers of a window, on the event loop."""
        self.gate.pace.record(len(window.places), window.begun, time.perf_counter())
        self.observe(window)
        for place, (request, index) in enumerate(window.places):
            if place in window.failed:
                request.fail(EngineFailed())
            elif request.live:
                request.fill(index, found[place])

    def observe(self, window: Batch) -> None:
        metrics = self.metrics
        metrics.observe("batch_window_rows", len(window.places))
        metrics.observe("batch_window_seconds", time.perf_counter() - window.begun)
        metrics.inc("inference_images_total", len(window.places) - len(window.failed))
        for request, index in window.places:
            if index == 0:
                request.taken = window.begun
                metrics.observe("queue_wait_seconds", window.begun - request.admitted)
        self.tally.add(window)


class DrawStatistics:
    """What was drawn, told to the metrics a lot at a time: no scrape shows one image's theta."""

    def __init__(self, library: Library, metrics: Metrics) -> None:
        self.metrics = metrics
        self.labels = [(ticket.structure.name, f"{ticket.density:g}") for ticket in library.tickets]
        self.expected = inclusion_probabilities(library.policy)
        self.drawn: list[tuple[int, ...]] = []
        self.ran: list[tuple[int, float]] = []  # rows and seconds of each ticket that was run: as many as were drawn
        self.count([0] * len(self.labels), 0)

    def add(self, window: Batch) -> None:
        self.drawn += [theta.members for theta in window.thetas]
        self.ran += [(len(task.places), task.seconds) for task in window.tasks if task.logits is not None]
        if len(self.drawn) >= PUBLISH_EVERY:
            self.publish()

    def publish(self) -> None:
        for members in self.drawn:
            self.metrics.observe("ensemble_size", len(members))
        for rows, seconds in self.ran:
            self.metrics.observe("batch_rows", rows)
            self.metrics.observe("member_forward_seconds", seconds)
        counts = np.bincount([member for members in self.drawn for member in members], minlength=len(self.labels))
        self.count(counts.tolist(), len(self.drawn))
        self.drawn.clear()
        self.ran.clear()

    def count(self, counts: Sequence[int], images: int) -> None:
        """counts: of each ticket, in draws for so many images."""
        for (structure, density), count, probability in zip(self.labels, counts, self.expected, strict=True):
            self.metrics.inc("draws_total", count, structure=structure, density=density)
            self.metrics.inc("draws_expected_total", images * probability, structure=structure, density=density)
