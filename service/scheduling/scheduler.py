"""From images to answers: a theta for every image, images grouped by ticket, each drawn ticket run once on its images.

1. Images wait in a fair queue.
2. A free engine thread takes the next batch, draws a theta for each image, and makes one task per drawn ticket.
3. The tasks are split into shards of equal cost, one for each thread.
4. The thread that ends the last shard of a batch sums, and wakes the event loop once.

So nothing waits for a batch to fill, and one batch is formed while the last shard of another runs. A batch's images are
answered together, which hides much of what their ensembles cost.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from model_store.library import Library
from model_store.policy import inclusion_probabilities
from service.engine.base import Engine, Images
from service.errors import DeadlineExceeded, Draining, EngineFailed, NotReady, Overloaded, RateLimited
from service.observability.metrics import PUBLISH_EVERY, Metrics
from service.observability.tracing import record_queue_spans
from service.scheduling.admission import FairQueue, RateLimiter, ThroughputEstimate
from service.scheduling.answers import Probabilities
from service.scheduling.batch import Batch, PendingRequest, ServedModel
from service.scheduling.worker_pool import WorkerPool
from service.settings import Settings

# Admit a request only if the estimated wait is below 40 % of its remaining time. With 100 %, a third of the admitted
# requests still missed their deadline at twice the capacity, after their images had been computed.
MAX_WAIT_SHARE: Final = 0.4


class AdmissionController:
    """Limits over all libraries: images admitted and not yet answered, rates, and the estimated wait."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.in_flight = 0  # images
        self.throughput = ThroughputEstimate()
        self.rate_limiter = RateLimiter(settings.rate_images_per_s, settings.rate_burst_images)

    def check(self, client: str, size: int, ahead: int, left_s: float) -> None:
        """Whether so many images may come in.

        ahead: images that are answered up to and including the last of these.  left_s: to the deadline.

        Raises RateLimited, DeadlineExceeded, Overloaded.
        """
        wait_s = self.rate_limiter.wait_s(client, size, time.monotonic())
        if wait_s > 0:
            self.metrics.inc("shed_total", reason="rate")
            raise RateLimited(retry_after=math.ceil(wait_s))
        if left_s <= 0:
            self.metrics.inc("shed_total", reason="deadline")
            raise DeadlineExceeded
        if self.in_flight + size > self.settings.max_queue_size:
            self.metrics.inc("shed_total", reason="queue")
            raise Overloaded(retry_after=self.throughput.retry_after_s(self.in_flight))
        if self.in_flight > 0 and self.throughput.wait_s(ahead) > MAX_WAIT_SHARE * left_s:  # it would come too late
            self.metrics.inc("shed_total", reason="deadline")
            raise Overloaded(retry_after=self.throughput.retry_after_s(self.in_flight))

    def admit(self, client: str, size: int) -> None:
        self.rate_limiter.take(client, size, time.monotonic())
        self.count(size)

    def count(self, change: int) -> None:
        self.in_flight += change


class Scheduler:
    """Answers images with one library. Several schedulers may share one worker pool and one admission controller."""

    def __init__(
        self,
        library: Library,
        engine: Engine,
        workers: WorkerPool,
        admission: AdmissionController,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.model = ServedModel(engine, library.policy, len(library.classes))
        self.queue: FairQueue[PendingRequest] = FairQueue()
        self.workers = workers
        self.admission = admission
        self.settings = settings
        self.metrics = metrics
        self.draw_statistics = DrawStatistics(library, metrics)

    async def submit(self, images: Images, *, client: str, deadline: float | None = None) -> Probabilities:
        """Softmax of the members' mean, [N, classes], of a theta drawn for each image. To cancel the call drops them.

        images: uint8 [N, 3, H, W].  client: whose turn it uses up.  deadline: on the event loop's clock; None for
        settings.deadline_s from now.

        Raises Overloaded, RateLimited, DeadlineExceeded, EngineFailed, Draining, NotReady.
        """
        loop = asyncio.get_running_loop()
        arrived_at = loop.time()
        until = arrived_at + self.settings.deadline_s if deadline is None else deadline
        request = self.admit(images, client, until - arrived_at)
        timer = loop.call_at(until, self.expire, request)
        try:
            probabilities = await request.answer
            await self.pad_latency(loop.time() - arrived_at)
        finally:
            timer.cancel()
            self.release(request)
            record_queue_spans(request.admitted_at, request.started_at)
        return probabilities

    def check(self, size: int, client: str, left_s: float) -> None:
        """Whether so many images would be admitted now. Called before they are decoded: a refusal must be cheap.

        Raises what submit does.
        """
        if self.workers.closing:
            self.metrics.inc("shed_total", reason="draining")
            raise Draining
        if self.workers.broken:
            raise NotReady
        running = self.admission.in_flight - self.queue.length
        self.admission.check(client, size, self.queue.images_until_last(client, size) + running, left_s)

    def admit(self, images: Images, client: str, left_s: float) -> PendingRequest:
        self.check(len(images), client, left_s)
        self.admission.admit(client, len(images))
        request = PendingRequest(images, client, asyncio.get_running_loop().create_future(), time.perf_counter())
        self.workers.push(self, request)
        self.metrics.set("queue_depth", self.queue.length)
        return request

    def expire(self, request: PendingRequest) -> None:
        self.metrics.inc("shed_total", reason="deadline")
        request.fail(DeadlineExceeded())

    def release(self, request: PendingRequest) -> None:
        """Ends a request, answered or not. Images that no batch has taken yet are not computed."""
        request.active = False
        if request.next_index < request.size:
            self.workers.drop(self, request)
        self.admission.count(-request.size)
        self.metrics.set("queue_depth", self.queue.length)

    async def pad_latency(self, passed_s: float) -> None:
        """Waits for the next multiple of quantum_ms, so that the time to an answer reveals less of its theta."""
        step_s = self.settings.latency_quantum_ms / 1000
        if step_s > 0:
            await asyncio.sleep(math.ceil(passed_s / step_s) * step_s - passed_s)

    def deliver(self, batch: Batch, probabilities: Probabilities) -> None:
        """Hands out the answers of a batch, on the event loop."""
        self.admission.throughput.record(len(batch.slots), batch.started_at, time.perf_counter())
        self.observe(batch)
        for position, (request, index) in enumerate(batch.slots):
            if position in batch.failed:
                request.fail(EngineFailed())
            elif request.active:
                request.fill(index, probabilities[position])

    def observe(self, batch: Batch) -> None:
        metrics = self.metrics
        metrics.observe("batch_size", len(batch.slots))
        metrics.observe("batch_seconds", time.perf_counter() - batch.started_at)
        metrics.inc("inference_images_total", len(batch.slots) - len(batch.failed))
        for request, index in batch.slots:
            if index == 0:
                request.started_at = batch.started_at
                metrics.observe("queue_wait_seconds", batch.started_at - request.admitted_at)
        self.draw_statistics.add(batch)


class DrawStatistics:
    """What was drawn, published PUBLISH_EVERY images at a time, so that no scrape shows one image's theta."""

    def __init__(self, library: Library, metrics: Metrics) -> None:
        self.metrics = metrics
        self.labels = [(ticket.structure.name, f"{ticket.density:g}") for ticket in library.tickets]
        self.expected = inclusion_probabilities(library.policy)
        self.drawn: list[tuple[int, ...]] = []
        self.runs: list[tuple[int, float]] = []  # images and seconds of each ticket's run: as many as were drawn
        self.count([0] * len(self.labels), 0)

    def add(self, batch: Batch) -> None:
        self.drawn += [theta.members for theta in batch.thetas]
        self.runs += [(len(task.indices), task.seconds) for task in batch.tasks if task.logits is not None]
        if len(self.drawn) >= PUBLISH_EVERY:
            self.publish()

    def publish(self) -> None:
        for members in self.drawn:
            self.metrics.observe("ensemble_size", len(members))
        for images, seconds in self.runs:
            self.metrics.observe("member_batch_size", images)
            self.metrics.observe("member_forward_seconds", seconds)
        counts = np.bincount([member for members in self.drawn for member in members], minlength=len(self.labels))
        self.count(counts.tolist(), len(self.drawn))
        self.drawn.clear()
        self.runs.clear()

    def count(self, counts: Sequence[int], images: int) -> None:
        """counts: of each ticket, in draws for so many images."""
        for (structure, density), count, probability in zip(self.labels, counts, self.expected, strict=True):
            self.metrics.inc("draws_total", count, structure=structure, density=density)
            self.metrics.inc("draws_expected_total", images * probability, structure=structure, density=density)
