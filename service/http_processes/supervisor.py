"""The public plane in several processes: what starts them, answers them and replaces those that die.

They share one port. Each has a listening socket that stays open when its process dies, so the next one takes over the
connections that wait there. The service's own process keeps every law that must hold in one place: admission, fair
turns, rate limits, memory for pixels, theta, batches, metrics, readiness and the library.
"""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from service.cpu import cpu_s
from service.engine.launcher import child_environment
from service.errors import ServiceError
from service.http_processes.channel import Channel, Message
from service.http_processes.shared_memory import SharedMemory, create_shared_memory
from service.library_manager import LibraryManager, LoadedLibrary
from service.observability.metrics import Metrics
from service.settings import Settings
from service.web.error_handling import as_service_error
from service.web.inference import DataPlane
from service.web.inference_statistics import InferenceStatistics
from service.web.server import LINGER_S

log = logging.getLogger(__name__)

LOOK_S: Final = 0.1  # between two looks at the processes
PAUSE_S: Final = 1.0  # before one that died sooner than this is started again
GAPS: Final = 8  # the shared memory is so many times the limit on pixels; what is not written takes no memory
MODULE: Final = "service.http_processes.http_process"


@dataclass(eq=False)
class ReservedImages:
    """A request of an HTTP process that was let in. holds: the memory for its pixels."""

    serving: LoadedLibrary
    size: int
    client: str
    deadline: float
    holds: ExitStack
    answering: asyncio.Task[None] | None = None

    def close(self) -> None:
        self.holds.close()
        if self.answering is not None:
            self.answering.cancel()


class HttpProcess:
    """One process, from its start to its end."""

    def __init__(self, parent: "HttpProcesses", listener: socket.socket) -> None:
        self.parent = parent
        self.listener = listener
        self.metrics = parent.metrics
        self.channel = Channel(self.receive, self.end)
        self.reservations: dict[int, ReservedImages] = {}
        self.libraries: dict[int, LoadedLibrary] = {}  # by serial: those that its requests may hold
        self.gauges: dict[tuple[Any, ...], float] = {}  # what it has added to each
        self.started_at = time.monotonic()
        self.cpu_s = 0.0
        self.ended = False

    async def start(self) -> None:
        settings, (ours, theirs) = self.parent.settings, socket.socketpair()
        descriptor = create_shared_memory(GAPS * settings.pixel_memory_bytes)
        given = (theirs.fileno(), self.listener.fileno(), descriptor)
        with theirs:
            self.popen = subprocess.Popen(  # noqa: ASYNC220, S603 -- milliseconds; our own interpreter and module
                [sys.executable, "-m", MODULE, *map(str, given), json.dumps(share_of(settings))],
                pass_fds=given,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for the service, which drains first
            )
        self.memory = SharedMemory(descriptor)
        await asyncio.get_running_loop().create_unix_connection(lambda: self.channel, sock=ours)
        self.publish()

    def publish(self) -> None:
        """What is being served, and whether it is ready."""
        parent = self.parent
        library = None
        if parent.serving is not None:
            self.libraries[parent.serial] = parent.serving
            served = parent.serving.library
            library = {"digest": served.digest, "classes": served.classes, "input": asdict(served.input)}
        self.channel.send("state", parent.serial, library, parent.manager.ready, parent.manager.draining)

    # Messages

    def receive(self, message: Message) -> None:
        kind, *fields = message
        match kind:
            case "reserve":
                self.reserve(*fields)
            case "submit":
                self.submit(*fields)
            case "release":
                self.release(*fields)
            case "metrics":
                self.add_metrics(*fields)
            case "inferences":
                self.parent.data_plane.statistics.add(InferenceStatistics(**fields[0]))
            case "statistics":
                self.channel.send("statistics", fields[0], asdict(self.parent.data_plane.statistics))
            case "dropped":
                self.libraries.pop(fields[0], None)

    def reserve(self, number: int, serial: int, size: int, client: str, deadline: float) -> None:
        serving = self.libraries[serial]
        try:
            serving.scheduler.check(size, client, deadline - asyncio.get_running_loop().time())
            with ExitStack() as stack:
                stack.enter_context(self.parent.data_plane.pixel_memory(size * serving.library.input.numel))
                holds = stack.pop_all()
        except ServiceError as error:
            self.refuse(number, error)
            return
        self.reservations[number] = ReservedImages(serving, size, client, deadline, holds)
        self.channel.send("granted", number)

    def submit(self, number: int, start: int) -> None:
        reserved = self.reservations[number]
        reserved.answering = asyncio.ensure_future(self.answer(number, reserved, start))

    async def answer(self, number: int, reserved: ReservedImages, start: int) -> None:
        shape = (reserved.size, *reserved.serving.library.input.shape)
        try:
            images = self.memory.array(start, shape, np.uint8)
            probabilities = await reserved.serving.scheduler.submit(
                images, client=reserved.client, deadline=reserved.deadline
            )
        except Exception as error:  # noqa: BLE001 -- the client gets what it would get from this process
            reserved.answering = None
            self.release(number)
            self.refuse(number, as_service_error(error))
            return
        self.memory.array(start, probabilities.shape, np.float32)[:] = probabilities
        reserved.answering = None
        self.release(number)
        self.channel.send("answered", number)

    def release(self, number: int) -> None:
        reserved = self.reservations.pop(number, None)
        if reserved is not None:
            reserved.close()

    def refuse(self, number: int, error: ServiceError) -> None:
        self.channel.send("refused", number, type(error).__name__, error.retry_after)

    def add_metrics(self, increments: list[Any], observations: list[Any]) -> None:
        for name, labels, amount in increments:
            self.metrics.inc(name, amount, **dict(labels))
            if self.metrics.rows[name].kind == "gauge":
                key = (name, *map(tuple, labels))
                self.gauges[key] = self.gauges.get(key, 0.0) + amount
        for name, labels, values in observations:
            for value in values:
                self.metrics.observe(name, value, **dict(labels))

    # Its end

    def end(self) -> None:
        """The process has closed its end, by dying or in good order: nothing of it stays."""
        self.ended = True
        for number in list(self.reservations):
            self.release(number)
        for (name, *labels), amount in self.gauges.items():
            self.metrics.inc(name, -amount, **dict(labels))
        self.gauges.clear()
        self.libraries.clear()

    def is_over(self) -> bool:
        """Whether it has ended; reaped by then."""
        if self.ended and self.popen.poll() is None and not self.parent.should_exit:
            self.popen.kill()  # it cannot reach the service any more
        return self.ended and self.popen.poll() is not None

    def measure(self) -> None:
        now = cpu_s(self.popen.pid)
        self.metrics.inc("http_cpu_seconds_total", max(0.0, now - self.cpu_s))
        self.cpu_s = now


class HttpProcesses:
    """All of them, as one plane: serve_forever, should_exit and force_exit are as a Server's.

    data_plane: the service's own, whose memory for pixels they use.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: list[socket.socket],
        data_plane: DataPlane,
        manager: LibraryManager,
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.listeners = listeners
        self.data_plane = data_plane
        self.manager = manager
        self.metrics = metrics
        self.should_exit = False
        self.force_exit = False
        self.processes: list[HttpProcess] = []
        self.serving: LoadedLibrary | None = None
        self.serial = 0  # of `serving`
        self.published: tuple[int, bool, bool] | None = None
        manager.on_change = self.publish

    async def serve_forever(self) -> None:
        """Ends when each of them has answered what it had read, after should_exit."""
        self.publish()
        self.processes = [await self.start(listener) for listener in self.listeners]
        while not self.should_exit:
            await asyncio.sleep(LOOK_S)
            self.processes = [await self.replaced(process) for process in self.processes]
            self.measure()
        self.send("stop")
        late = time.monotonic() + self.settings.drain_timeout_s + 2 * LINGER_S
        while not all(process.is_over() for process in self.processes):
            if self.force_exit or time.monotonic() > late:
                for process in self.processes:
                    process.popen.kill()
            await asyncio.sleep(LOOK_S)
        self.metrics.set("http_processes", 0)
        for listener in self.listeners:
            listener.close()

    async def start(self, listener: socket.socket) -> HttpProcess:
        process = HttpProcess(self, listener)
        await process.start()
        return process

    async def replaced(self, process: HttpProcess) -> HttpProcess:
        """The process, or the one that takes its place."""
        if not process.is_over() or time.monotonic() - process.started_at < PAUSE_S:
            return process
        log.error("HTTP process ended with code %s and is replaced", process.popen.returncode)
        self.metrics.inc("http_process_restarts_total")
        return await self.start(process.listener)

    def publish(self) -> None:
        """Tells them what has changed."""
        if self.manager.current is not self.serving:
            self.serving, self.serial = self.manager.current, self.serial + 1
        state = (self.serial, self.manager.ready, self.manager.draining)
        if state != self.published:
            self.published = state
            for process in self.processes:
                process.publish()

    def reload_keys(self) -> None:
        self.send("keys")

    def send(self, *message: Any) -> None:
        for process in self.processes:
            process.channel.send(*message)

    def measure(self) -> None:
        self.metrics.set("http_processes", sum(not process.ended for process in self.processes))
        for process in self.processes:
            if not process.ended:
                process.measure()


def share_of(settings: Settings) -> dict[str, Any]:
    """The settings of one process: its share of what is counted where it arrives, and no secret."""
    count = settings.http_processes
    shared = {
        "max_requests": settings.max_requests // count,
        "body_memory_bytes": settings.body_memory_bytes // count,
        "http_processes": 1,
    }
    hidden = {"admin_token", "admin_token_file"}
    return settings.model_copy(update=shared).model_dump(mode="json", exclude=hidden, exclude_none=True)
