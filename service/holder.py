"""The library being served, whether it may be asked, and how another takes its place."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from model_store.errors import LibraryRejected
from model_store.library import Library, open_library
from service.engine import Engine, EngineRejected, engine_threads, open_engine
from service.engine.cores import stand_back
from service.errors import NotReady
from service.metrics import Metrics
from service.scheduler import Gate, Scheduler
from service.settings import Settings
from service.workers import Workers

NICENESS: Final = 10  # of what opens a library: below the engine's threads, above an audit
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """A verified library, its warm engine, and the way in. A request keeps the one it began with."""

    library: Library
    engine: Engine
    scheduler: Scheduler


class Holder:
    """current: None before the first library is verified and warm.  draining: from the moment the process is to end.

    on_broken: called on the event loop when the engine has died for good.
    """

    def __init__(self, settings: Settings, metrics: Metrics, on_broken: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.metrics = metrics
        self.current: Serving | None = None
        self.draining = False
        self.gate = Gate(settings, metrics)
        self.workers = Workers(engine_threads(settings), settings, metrics, on_broken)
        self.workers.on_beat = self.tell
        self.opening = asyncio.Lock()

    async def start(self) -> Serving:
        """Starts the engine's threads and loads the library. Raises StoreError."""
        self.workers.start()
        return await self.load()

    async def reload(self) -> Serving:
        """Opens settings.library again, warms it up beside the old one, and swaps. Raises StoreError; the old one then
        stays. Requests that began with the old library are answered by it."""
        try:
            serving = await self.load()
        except Exception:
            self.metrics.inc("library_swaps_total", outcome="refused")
            raise
        self.metrics.inc("library_swaps_total", outcome="ok")
        return serving

    async def load(self) -> Serving:
        async with self.opening:
            library, engine = await self.opened()
            scheduler = Scheduler(library, engine, self.workers, self.gate, self.settings, self.metrics)
            self.current = Serving(library, engine, scheduler)
            self.workers.probe = lambda: engine.forward(0, np.zeros((1, 3, 32, 32), np.uint8))
            self.describe(library)
            log.info("library %s is being served by %s (%s)", library.digest, engine.name, engine.note)
            return self.current

    async def opened(self) -> tuple[Library, Engine]:
        """Off the event loop, by threads that stand back for those that answer meanwhile."""
        pool = ThreadPoolExecutor(1, "open", initializer=stand_back, initargs=(NICENESS,))
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, self.open)
        finally:
            pool.shutdown(wait=False)

    def open(self) -> tuple[Library, Engine]:
        """Takes seconds."""
        library = open_library(self.settings.library)
        try:
            return library, open_engine(library, self.settings)
        except EngineRejected as error:
            raise LibraryRejected(f"{library.path}: {error}") from error

    def describe(self, library: Library) -> None:
        self.metrics.set("library_tickets", len(library.tickets), state="serving")
        self.metrics.set("library_tickets", len(library.baselines), state="baseline")
        self.metrics.forget("library_info")
        self.metrics.set("library_info", 1, digest=library.digest)
        self.tell()

    def library(self) -> Library:
        """The one being served. Raises NotReady."""
        if self.current is None:
            raise NotReady
        return self.current.library

    @property
    def reason(self) -> str:
        """Why nothing may be asked now; empty when it may."""
        if self.draining:
            return "draining"
        if self.current is None:
            return "loading"
        return "" if self.workers.healthy else "engine"

    @property
    def ready(self) -> bool:
        return not self.reason

    def tell(self) -> None:
        """The state as gauges; called whenever it may have changed, and at every beat of the watchdog."""
        self.metrics.set("ready", float(self.ready))
        self.metrics.set("draining", float(self.draining))

    def drain(self) -> None:
        self.draining = True
        self.tell()
