"""The library being served, whether it is ready, and how another takes its place."""

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch

from model_store.errors import LibraryRejected
from model_store.library import EMBEDDED, Library, open_library
from service.cpu import NICE_INFERENCE, NICE_LOADING, cpu_s, lower_priority, resident_bytes
from service.engine.base import Engine
from service.engine.errors import EngineRejected
from service.engine.factory import open_for_serving
from service.engine.gpu import gpu_usage
from service.engine.launcher import ForkServer, start_ahead
from service.errors import NotReady
from service.library_source import local_library, remove_unused
from service.observability.metrics import Metrics
from service.scheduling.scheduler import AdmissionController, Scheduler
from service.scheduling.worker_pool import WorkerPool
from service.settings import Settings

COLLECT_S: Final = 2.0  # between collections while the engine of a replaced library is still there
log = logging.getLogger(__name__)
Result = TypeVar("Result")


class LibraryChanged(LibraryRejected):
    """Another library than the one that was to be served."""


@dataclass(frozen=True)
class LoadedLibrary:
    """A verified library, its warm engine and its scheduler. A request keeps the one it began with."""

    library: Library
    engine: Engine
    scheduler: Scheduler


class LibraryManager:
    """Loads and swaps libraries, and knows whether the service is ready.

    current: None before the first library is verified and warm.  draining: from the moment the process is to end.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.current: LoadedLibrary | None = None
        self.draining = False
        self.admission = AdmissionController(settings, metrics)
        self.on_broken: Callable[[], None] = lambda: None  # on the event loop, when the engine has died for good
        self.workers = WorkerPool(settings, metrics, lambda: self.on_broken())
        self.workers.on_heartbeat = self.on_heartbeat
        self.first_fork_server: ForkServer | None = None  # one that was started for the first library before
        self.libraries_in_use: Callable[[], set[Path]] = set  # of others than requests: audits that are not over
        self.on_change: Callable[[], None] = lambda: None  # called whenever the state may have changed
        self.on_step: Callable[[str], None] = lambda step: log.info("start: %s", step)
        self.opening = asyncio.Lock()
        self.retired_engines: list[weakref.ref[Engine]] = []  # of libraries that were replaced
        self.collected_at = 0.0
        self.cpu_s: dict[int, float] = {}  # of the engine's processes, at the last heartbeat

    async def start(self) -> LoadedLibrary:
        """Loads the library and starts the engine's threads. Raises StoreError."""
        return await self.load()

    async def reload(self, digest: str | None = None) -> LoadedLibrary:
        """Opens settings.library again, warms it up beside the old one, and swaps. Raises StoreError.

        If it raises, the old one stays. Requests that began with the old library are answered by it.

        digest: of the library that is to be served; another one raises LibraryChanged. None: whichever is there.
        """
        try:
            loaded = await self.load(digest)
        except Exception:
            self.metrics.inc("library_swaps_total", outcome="refused")
            raise
        self.metrics.inc("library_swaps_total", outcome="ok")
        return loaded

    async def load(self, digest: str | None = None) -> LoadedLibrary:
        async with self.opening:
            library, engine = await self.open_library_and_engine(digest)
            if not self.workers.started:
                self.workers.start(engine.threads, niceness=niceness(engine))
            scheduler = Scheduler(library, engine, self.workers, self.admission, self.settings, self.metrics)
            if self.current is not None:
                self.retired_engines.append(weakref.ref(self.current.engine))
            self.current = LoadedLibrary(library, engine, scheduler)
            self.workers.probe = lambda: engine.forward(0, np.zeros((1, *engine.input_shape), np.uint8))
            self.describe(library)
            await asyncio.to_thread(self.remove_unused_libraries, library.path)
            log.info("library %s is being served by %s (%s)", library.digest, engine.name, engine.note)
            return self.current

    def remove_unused_libraries(self, serving: Path) -> None:
        for old in remove_unused(self.settings, {serving, *self.libraries_in_use()}):
            log.info("library %s is no longer used and was removed from %s", old.name, old.parent)

    async def open_configured_library(self) -> Library:
        """The library that `reload` would serve now, verified whole; nothing is served. Raises StoreError."""
        path, pool = await self.library_path(), loading_thread(NICE_LOADING)
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, open_library, path)
        finally:
            pool.shutdown(wait=False)

    async def library_path(self) -> Path:
        """The configured library's folder, fetched first if it is elsewhere. Raises LibraryRejected."""
        return await asyncio.to_thread(local_library, self.settings, self.on_step) or EMBEDDED

    async def open_library_and_engine(self, digest: str | None) -> tuple[Library, Engine]:
        """Verifies the library, while a fork server compiles it where one is used.

        Both stand back for requests that another library answers meanwhile. The fork server is started from a
        normal-priority thread, because children inherit priority permanently.
        """
        settings, loop = self.settings, asyncio.get_running_loop()
        path, background = await self.library_path(), self.current is not None
        pool = loading_thread(NICE_LOADING if background else 0)
        fork_server, self.first_fork_server = self.first_fork_server, None
        try:
            if fork_server is None:
                gpu = torch.cuda.is_available()
                start = partial(start_ahead, path, settings, self.on_step, gpu=gpu, background=background)
                fork_server = await asyncio.to_thread(start)
            self.on_step("verifying the library")
            library = await loop.run_in_executor(pool, open_library, path)
            if digest not in (None, library.digest):
                raise LibraryChanged(f"{path}: digest {library.digest}; expected {digest}")
            ahead, fork_server = fork_server, None  # the engine owns it from here on
            if ahead is not None:
                return library, await run_in_daemon_thread(lambda: self.open_engine(library, ahead))
            return library, await loop.run_in_executor(pool, self.open_engine, library, None)
        except EngineRejected as error:
            raise LibraryRejected(f"{path}: {error}") from error
        finally:
            if fork_server is not None:
                fork_server.close()
            pool.shutdown(wait=False)

    def open_engine(self, library: Library, fork_server: ForkServer | None) -> Engine:
        engine = open_for_serving(library, self.settings, fork_server, self.on_step)
        self.on_step(f"warm: {len(library.tickets)} tickets on {engine.device}")
        return engine

    def describe(self, library: Library) -> None:
        self.metrics.set("library_tickets", len(library.tickets), state="serving")
        self.metrics.set("library_tickets", len(library.baselines), state="baseline")
        self.metrics.forget("library_info")
        self.metrics.set("library_info", 1, digest=library.digest)
        self.update_metrics()

    def library(self) -> Library:
        """The one being served. Raises NotReady."""
        if self.current is None:
            raise NotReady
        return self.current.library

    @property
    def reason(self) -> str:
        """Why the service is not ready; empty when it is."""
        if self.draining:
            return "draining"
        if self.current is None:
            return "loading"
        return "" if self.workers.healthy else "engine"

    @property
    def ready(self) -> bool:
        return not self.reason

    def on_heartbeat(self) -> None:
        """Runs at every heartbeat of the watchdog. Forces a collection while a replaced library is still in memory.

        Failed requests leave reference cycles (exception and frame) that keep an old library alive.
        """
        self.update_metrics()
        self.retired_engines = [engine for engine in self.retired_engines if engine() is not None]
        if self.retired_engines and time.monotonic() - self.collected_at > COLLECT_S:
            gc.collect()
            self.collected_at = time.monotonic()

    def update_metrics(self) -> None:
        """Called whenever the state may have changed."""
        self.on_change()
        self.metrics.set("ready", float(self.ready))
        self.metrics.set("draining", float(self.draining))
        if self.current is None:
            return
        engine = self.current.engine
        if pids := engine.pids():
            self.update_process_metrics(pids)
        if engine.device.startswith("cuda"):
            self.update_gpu_metrics(engine.device)

    def update_process_metrics(self, pids: Sequence[int]) -> None:
        now = {pid: cpu_s(pid) for pid in pids}
        new_s = sum(max(0, seconds - self.cpu_s.get(pid, 0)) for pid, seconds in now.items())
        self.metrics.inc("engine_cpu_seconds_total", new_s)
        self.metrics.set("engine_resident_memory_bytes", resident_bytes(pids[0]))
        self.cpu_s = now

    def update_gpu_metrics(self, device: str) -> None:
        usage = gpu_usage(torch.device(device))
        self.metrics.set("gpu_memory_bytes", usage.memory_bytes)
        self.metrics.set("gpu_utilization_ratio", usage.utilization or 0.0)

    def drain(self) -> None:
        self.draining = True
        self.update_metrics()


def loading_thread(steps: int) -> ThreadPoolExecutor:
    """One thread, so many steps of niceness below the others."""
    return ThreadPoolExecutor(1, "open", initializer=lower_priority, initargs=(steps,))


def niceness(engine: Engine) -> int:
    """Of inference threads. 0 where a thread only waits for a worker process, or launches what a GPU runs."""
    return NICE_INFERENCE if engine.run_remote is None and engine.device == "cpu" else 0


async def run_in_daemon_thread(work: Callable[[], Result]) -> Result:
    """As asyncio.to_thread, in a thread that does not delay the end of the process."""
    answer: Future[Result] = Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- the caller gets it
            answer.set_exception(error)

    threading.Thread(target=run, name="open", daemon=True).start()
    return await asyncio.wrap_future(answer)
