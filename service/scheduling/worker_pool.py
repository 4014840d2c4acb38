"""The engine's threads. Idle ones take the next batch; a watchdog on the event loop replaces those that die or hang.

One set of threads serves every library: while a library is being swapped, batches of the old one and of the new one
follow each other.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from service.cpu import NICE_INFERENCE, lower_priority
from service.engine.factory import batch_limit
from service.errors import EngineFailed
from service.observability.metrics import Metrics
from service.scheduling.admission import FairQueue
from service.scheduling.answers import Probabilities
from service.scheduling.batch import (
    Batch,
    PendingRequest,
    ServedModel,
    Shard,
    Slot,
    combine_members,
    form_batch,
    partition,
    run_shard,
)
from service.settings import Settings

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 0.25  # an idle thread shows life this often, and the watchdog looks as often


class BatchSource(Protocol):
    """Where batches come from and where their answers go. `deliver` is called on the event loop's thread."""

    @property
    def model(self) -> ServedModel: ...
    @property
    def queue(self) -> FairQueue[PendingRequest]: ...
    def deliver(self, batch: Batch, probabilities: Probabilities) -> None: ...


@dataclass(eq=False)
class Worker:
    """One engine thread, as the watchdog sees it."""

    last_seen: float  # when it last showed life (time.monotonic)
    shard: Shard | None = None
    forming: list[Slot] | None = None
    dead: bool = False
    retired: bool = False

    def heartbeat(self) -> None:
        self.last_seen = time.monotonic()


class WorkerPool:
    """The threads, the shards that wait for them, and the watchdog.

    probe: one forward pass; a replaced thread has to survive it before it gets work.
    on_broken: called on the event loop when the engine died more often than settings.engine_restarts.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        on_broken: Callable[[], None],
    ) -> None:
        self.threads = 0
        self.niceness = NICE_INFERENCE
        self.settings = settings
        self.metrics = metrics
        self.on_broken = on_broken
        self.on_heartbeat: Callable[[], None] = lambda: None
        self.probe: Callable[[], object] = lambda: None
        self.condition = threading.Condition()
        self.sources: deque[BatchSource] = deque()
        self.shards: deque[Shard] = deque()
        self.batches: dict[Batch, BatchSource] = {}
        self.running = 0  # images of batches with shards left
        self.workers: list[Worker] = []
        self.restarts = 0
        self.broken = False
        self.closing = False
        self.timer: asyncio.TimerHandle | None = None

    # On the event loop

    def start(self, threads: int, *, niceness: int = NICE_INFERENCE) -> None:
        """niceness: of the threads; 0 where they only wait for others."""
        self.threads, self.niceness = threads, niceness
        self.loop = asyncio.get_running_loop()
        for _ in range(threads):
            self.start_worker()
        self.watch()

    @property
    def started(self) -> bool:
        return self.timer is not None

    def start_worker(self, *, probe: bool = False) -> None:
        worker = Worker(last_seen=time.monotonic())
        self.workers.append(worker)
        threading.Thread(target=self.work, args=(worker, probe), name="engine", daemon=True).start()

    def stop(self) -> None:
        """Threads end after their present shard. What is still queued is never answered: drain before."""
        with self.condition:
            self.closing = True
            self.condition.notify_all()
        if self.timer is not None:
            self.timer.cancel()

    def push(self, source: BatchSource, request: PendingRequest) -> None:
        with self.condition:
            source.queue.push(request)
            if source not in self.sources:
                self.sources.append(source)
            self.condition.notify()

    def drop(self, source: BatchSource, request: PendingRequest) -> None:
        with self.condition:
            source.queue.drop(request)

    @property
    def heartbeat_age_s(self) -> float:
        """Since the thread that was silent for longest showed life."""
        now = time.monotonic()
        return max((now - worker.last_seen for worker in self.workers), default=float("inf"))

    @property
    def healthy(self) -> bool:
        fresh = self.heartbeat_age_s < self.settings.engine_timeout_s
        return fresh and not self.broken and not any(worker.dead for worker in self.workers)

    def watch(self) -> None:
        self.timer = self.loop.call_later(HEARTBEAT_S, self.watch)
        self.metrics.set("engine_heartbeat_age_seconds", self.heartbeat_age_s)
        self.check()
        self.on_heartbeat()

    def check(self) -> None:
        """Replaces threads that have died, or have shown no life for longer than any honest ticket takes."""
        for worker in list(self.workers):
            silent = time.monotonic() - worker.last_seen > self.settings.engine_timeout_s
            if (worker.dead or silent) and not (self.closing or self.broken):
                self.replace(worker)

    def replace(self, worker: Worker) -> None:
        log.error("engine thread %s; its images have failed", "died" if worker.dead else "hangs")
        self.abandon(worker)
        self.restarts += 1
        self.metrics.inc("engine_restarts_total")
        if self.restarts > self.settings.engine_restarts:
            self.mark_broken()
        else:
            self.start_worker(probe=True)

    def abandon(self, worker: Worker) -> None:
        """Fails the images of the thread's work, at once. If the thread ever returns, its results are discarded."""
        with self.condition:
            worker.retired = True
            shard, worker.shard = worker.shard, None
            forming, worker.forming = worker.forming, None
            self.workers.remove(worker)
        for request, _ in forming or []:
            request.fail(EngineFailed())
        if shard is not None:
            for index in {index for task in shard.tasks for index in task.indices}:
                shard.batch.slots[index][0].fail(EngineFailed())
            self.finish_shard(shard)

    def mark_broken(self) -> None:
        """Fails everything that waits: the engine does not come back."""
        self.broken = True
        with self.condition:
            waiting = [request for source in self.sources for request, _ in source.queue.take(source.queue.length)]
            waiting += [request for batch in self.batches for request, _ in batch.slots]
            self.shards.clear()
            self.batches.clear()
        for request in waiting:
            request.fail(EngineFailed())
        log.critical("the engine died %d times and is not started again", self.restarts)
        self.on_broken()

    def deliver(self, batch: Batch, probabilities: Probabilities) -> None:
        source = self.batches.pop(batch, None)
        if source is not None:
            source.deliver(batch, probabilities)

    # In the engine's threads

    def work(self, worker: Worker, probe: bool) -> None:
        try:
            lower_priority(self.niceness)
            if probe:
                self.probe()
            while self.step(worker):
                pass
        except BaseException as error:  # noqa: BLE001 -- EngineDied among them: the watchdog replaces this thread
            log.error("engine thread ended by %s", type(error).__name__)  # noqa: TRY400 -- the text may quote a request
            worker.dead = True
            self.call_on_loop(self.check)

    def step(self, worker: Worker) -> bool:
        """Runs the next shard, or forms the next batch where there is none. False: this thread is to end.

        Keeps nothing of a library between steps, so that one that was replaced can be freed.
        """
        with self.condition:
            source = self.wait_for_work(worker)
            if self.closing or worker.retired:
                return False
            if source is None:
                worker.shard = self.shards.popleft()
            else:
                worker.forming = source.queue.take(self.batch_size(source))
        if source is None:
            self.run_shard(worker, worker.shard)
        else:
            self.form_batch(worker, source)
        return True

    def wait_for_work(self, worker: Worker) -> BatchSource | None:
        """A source to form a batch from; None when there is a shard, or nothing will come any more."""
        while not (self.closing or worker.retired):
            worker.heartbeat()
            if self.shards:
                return None
            others_form = any(other.forming for other in self.workers)  # their shards will be there in a moment
            source = None if others_form else self.next_source()
            if source is not None:
                return source
            self.condition.wait(HEARTBEAT_S)
        return None

    def batch_size(self, source: BatchSource) -> int:
        """Half of the images that are queued or running, up to the setting.

        If one batch took all of them, clients in a closed loop would all send again at the same moment.
        The engine would be idle while their requests are read.
        """
        return min(
            batch_limit(source.model.engine.device, self.settings), (source.queue.length + self.running + 1) // 2
        )

    def next_source(self) -> BatchSource | None:
        """Sources take turns; those without images are forgotten until they are pushed to."""
        while self.sources:
            source = self.sources.popleft()
            if source.queue.length:
                self.sources.append(source)
                return source
        return None

    def form_batch(self, worker: Worker, source: BatchSource) -> None:
        batch = form_batch(source.model, worker.forming or [])
        shards = partition(batch, self.threads)  # not under the lock, for which the event loop would wait
        with self.condition:
            if worker.retired:
                return
            worker.forming = None
            self.batches[batch] = source
            self.running += len(batch.slots)
            self.shards.extend(shards)
            self.condition.notify_all()

    def run_shard(self, worker: Worker, shard: Shard | None) -> None:
        if shard is None:  # the watchdog has abandoned this thread meanwhile
            return
        run_shard(shard, self.metrics, worker.heartbeat)
        with self.condition:
            if worker.retired:
                return
            worker.shard = None
        self.finish_shard(shard)

    def finish_shard(self, shard: Shard) -> None:
        """The thread that ends the last shard of a batch sums."""
        batch = shard.batch
        with self.condition:
            batch.unfinished -= 1
            last = batch.unfinished == 0
            if last:
                self.running -= len(batch.slots)
        if last:
            probabilities = combine_members(batch)
            self.call_on_loop(lambda: self.deliver(batch, probabilities))

    def call_on_loop(self, callback: Callable[[], None]) -> None:
        """Does nothing after the event loop has been closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback)
