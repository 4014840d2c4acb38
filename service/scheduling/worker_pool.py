"""The engine's threads. Idle ones take the next window; a watchdog on the event loop replaces those that die or hang.

One set of threads serves every library there is: while a library is being swapped, windows of the old one and of the
new one follow each other.
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
from service.errors import EngineFailed
from service.observability.metrics import Metrics
from service.scheduling.admission import FairQueue
from service.scheduling.batch import (
    Batch,
    PendingRequest,
    Probabilities,
    ServedModel,
    Shard,
    combine_members,
    form_batch,
    partition,
    run,
)
from service.settings import Settings

log = logging.getLogger(__name__)

BEAT_S: Final = 0.25  # an idle thread shows life this often, and the watchdog looks as often


class BatchSource(Protocol):
    """Where windows come from and where their answers go. `deliver` is called on the event loop's thread."""

    @property
    def model(self) -> ServedModel: ...
    @property
    def queue(self) -> FairQueue[PendingRequest]: ...
    def deliver(self, window: Batch, found: Probabilities) -> None: ...


@dataclass(eq=False)
class Worker:
    """One engine thread, as the watchdog sees it. beat: when it last showed life (time.monotonic)."""

    beat: float
    part: Shard | None = None
    forming: list[tuple[PendingRequest, int]] | None = None
    dead: bool = False
    retired: bool = False

    def alive(self) -> None:
        self.beat = time.monotonic()


class WorkerPool:
    """niceness: of threads that run tickets themselves; those that wait for processes stand back for nobody.
    probe: one forward pass; a replaced thread has to survive it before it is given work.

    on_broken: called on the event loop when the engine died more often than settings.engine_restarts.
    """

    def __init__(
        self,
        threads: int,
        settings: Settings,
        metrics: Metrics,
        on_broken: Callable[[], None],
        *,
        niceness: int = NICE_INFERENCE,
    ) -> None:
        self.threads = threads
        self.niceness = niceness
        self.settings = settings
        self.metrics = metrics
        self.on_broken = on_broken
        self.on_beat: Callable[[], None] = lambda: None
        self.probe: Callable[[], object] = lambda: None
        self.condition = threading.Condition()
        self.feeds: deque[BatchSource] = deque()
        self.parts: deque[Shard] = deque()
        self.windows: dict[Batch, BatchSource] = {}
        self.running = 0  # rows of windows with parts left
        self.crew: list[Worker] = []
        self.restarts = 0
        self.broken = False
        self.closing = False

    # On the event loop

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        for _ in range(self.threads):
            self.start_worker()
        self.watch()

    def start_worker(self, *, probe: bool = False) -> None:
        worker = Worker(beat=time.monotonic())
        self.crew.append(worker)
        threading.Thread(target=self.work, args=(worker, probe), name="engine", daemon=True).start()

    def stop(self) -> None:
        """Threads end after the part they are at. What is still queued is never answered: drain before."""
        with self.condition:
            self.closing = True
            self.condition.notify_all()
        self.timer.cancel()

    def push(self, feed: BatchSource, request: PendingRequest) -> None:
        with self.condition:
            feed.queue.push(request)
            if feed not in self.feeds:
                self.feeds.append(feed)
            self.condition.notify()

    def drop(self, feed: BatchSource, request: PendingRequest) -> None:
        with self.condition:
            feed.queue.drop(request)

    @property
    def heartbeat_age_s(self) -> float:
        """Since the thread that was silent for longest showed life."""
        now = time.monotonic()
        return max((now - worker.beat for worker in self.crew), default=float("inf"))

    @property
    def healthy(self) -> bool:
        fresh = self.heartbeat_age_s < self.settings.engine_timeout_s
        return fresh and not self.broken and not any(worker.dead for worker in self.crew)

    def watch(self) -> None:
        self.timer = self.loop.call_later(BEAT_S, self.watch)
        self.metrics.set("engine_heartbeat_age_seconds", self.heartbeat_age_s)
        self.check()
        self.on_beat()

    def check(self) -> None:
        """Replaces threads that have died, or have shown no life for longer than any honest ticket takes."""
        for worker in list(self.crew):
            silent = time.monotonic() - worker.beat > self.settings.engine_timeout_s
            if (worker.dead or silent) and not (self.closing or self.broken):
                self.replace(worker)

    def replace(self, worker: Worker) -> None:
        log.error("engine thread %s; what it was at has failed", "died" if worker.dead else "hangs")
        self.abandon(worker)
        self.restarts += 1
        self.metrics.inc("engine_restarts_total")
        if self.restarts > self.settings.engine_restarts:
            self.mark_broken()
        else:
            self.start_worker(probe=True)

    def abandon(self, worker: Worker) -> None:
        """Fails the rows the thread was at, at once; if it ever comes back, its results are thrown away."""
        with self.condition:
            worker.retired = True
            part, worker.part = worker.part, None
            forming, worker.forming = worker.forming, None
            self.crew.remove(worker)
        for request, _ in forming or []:
            request.fail(EngineFailed())
        if part is not None:
            for place in {place for task in part.tasks for place in task.places}:
                part.window.places[place][0].fail(EngineFailed())
            self.finish_shard(part)

    def mark_broken(self) -> None:
        """Nobody waits for an engine that does not come back."""
        self.broken = True
        with self.condition:
            waiting = [request for feed in self.feeds for request, _ in feed.queue.take(feed.queue.rows)]
            waiting += [request for window in self.windows for request, _ in window.places]
            self.parts.clear()
            self.windows.clear()
        for request in waiting:
            request.fail(EngineFailed())
        log.critical("the engine died %d times and is not started again", self.restarts)
        self.on_broken()

    def hand_over(self, window: Batch, found: Probabilities) -> None:
        feed = self.windows.pop(window, None)
        if feed is not None:
            feed.deliver(window, found)

    # In the engine's threads

    def work(self, worker: Worker, probe: bool) -> None:
        try:
            lower_priority(self.niceness)
            if probe:
                self.probe()
            while self.step(worker):
                pass
        except BaseException as error:  # noqa: BLE001 -- whatever ends this thread, the watchdog has to know
            log.error("engine thread ended by %s", type(error).__name__)  # noqa: TRY400 -- the text may quote a request
            worker.dead = True
            self.call_on_loop(self.check)

    def step(self, worker: Worker) -> bool:
        """Runs the next part, or lays out the next window where there is none. False: this thread is to end.

        Nothing of a library is remembered between steps, so that one that has been replaced can go.
        """
        with self.condition:
            feed = self.wait_for_work(worker)
            if self.closing or worker.retired:
                return False
            if feed is None:
                worker.part = self.parts.popleft()
            else:
                worker.forming = feed.queue.take(self.window_size(feed))
        if feed is None:
            self.run_shard(worker, worker.part)
        else:
            self.form_batch(worker, feed)
        return True

    def wait_for_work(self, worker: Worker) -> BatchSource | None:
        """A feed to form a window from; None when there is a part, or nothing will come any more."""
        while not (self.closing or worker.retired):
            worker.alive()
            if self.parts:
                return None
            others_form = any(other.forming for other in self.crew)  # their parts will be there in a moment
            feed = None if others_form else self.next_feed()
            if feed is not None:
                return feed
            self.condition.wait(BEAT_S)
        return None

    def window_size(self, feed: BatchSource) -> int:
        """Half of the rows that are here, up to the setting. If one window took them all, clients that ask again as
        soon as they have their answers would all ask at once, and the engine would wait while they are read."""
        return min(self.settings.window_rows, (feed.queue.rows + self.running + 1) // 2)

    def next_feed(self) -> BatchSource | None:
        """Feeds take turns; those without rows are forgotten until they are pushed to."""
        while self.feeds:
            feed = self.feeds.popleft()
            if feed.queue.rows:
                self.feeds.append(feed)
                return feed
        return None

    def form_batch(self, worker: Worker, feed: BatchSource) -> None:
        window = form_batch(feed.model, worker.forming or [])
        with self.condition:
            if worker.retired:
                return
            worker.forming = None
            self.windows[window] = feed
            self.running += len(window.places)
            self.parts.extend(partition(window, self.threads))
            self.condition.notify_all()

    def run_shard(self, worker: Worker, part: Shard | None) -> None:
        if part is None:  # the watchdog has taken it away meanwhile
            return
        run(part, self.metrics, worker.alive)
        with self.condition:
            if worker.retired:
                return
            worker.part = None
        self.finish_shard(part)

    def finish_shard(self, part: Shard) -> None:
        """Whoever ends the last part of a window adds up."""
        with self.condition:
            part.window.unfinished -= 1
            last = part.window.unfinished == 0
            if last:
                self.running -= len(part.window.places)
        if last:
            found = combine_members(part.window)
            self.call_on_loop(lambda: self.hand_over(part.window, found))

    def call_on_loop(self, news: Callable[[], None]) -> None:
        """To the event loop; after the end there is nobody left to be told."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(news)
