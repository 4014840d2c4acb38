"""`python -m service.http_processes.http_process CHANNEL LISTENER MEMORY SETTINGS`: HTTP beside the service's process.

It reads requests, decodes images and encodes answers. Whether a request may come in, theta, batches and the library are
the service's: this process sees pixels, probabilities and what the library calls its classes. It ends with the service.
`service/http_processes/supervisor.py` is the other side.
"""

import asyncio
import gc
import itertools
import json
import os
import signal
import socket
import sys
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import numpy as np

from model_store.images import Pixels
from model_store.input_spec import InputSpec
from service import errors
from service.cpu import die_with_parent
from service.errors import Overloaded, ServiceError
from service.http_processes.channel import Channel, Message
from service.http_processes.shared_memory import GIVE_BACK_BYTES, RangeAllocator, SharedMemory
from service.observability.logs import configure_logging
from service.observability.metrics import Metrics
from service.observability.tracing import stage
from service.scheduling.answers import Probabilities
from service.settings import Settings
from service.web.auth import ApiKeyStore
from service.web.inference import DataPlane, InferenceContext
from service.web.inference_statistics import InferenceStatistics
from service.web.public_app import create_public_app
from service.web.server import SWITCH_S, Server, create_server, loop_factory
from service.web.serving import Manager

FLUSH_S: Final = 0.25  # between two reports of what was counted
COLLECT_S: Final = 2.0  # between collections while a request may still hold a replaced library
FLOAT_BYTES: Final = 4


@dataclass(frozen=True)
class RemoteLibrary:
    """What requests need to know of the library that the service has."""

    digest: str
    classes: tuple[str, ...]
    input: InputSpec


class CollectedMetrics(Metrics):
    """Increments and observations since the last report. The service adds them to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.increments: dict[tuple[Any, ...], float] = {}
        self.observations: dict[tuple[Any, ...], list[float]] = {}

    def inc(self, name: str, amount: float = 1.0, **labels: str) -> None:
        key = (name, *labels.items())
        self.increments[key] = self.increments.get(key, 0.0) + amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observations.setdefault((name, *labels.items()), []).append(value)

    def set(self, name: str, value: float, **_: str) -> None:
        """A value cannot be added to another process's."""
        raise TypeError(f"metric {name}: {value} was set; an HTTP process can only add")

    def take(self) -> tuple[list[Any], list[Any]]:
        """(name, labels, amount) of each counter and gauge, (name, labels, values) of each histogram."""
        increments, self.increments = self.increments, {}
        observations, self.observations = self.observations, {}
        return (
            [(name, labels, amount) for (name, *labels), amount in increments.items()],
            [(name, labels, values) for (name, *labels), values in observations.items()],
        )


class Service:
    """The service, as this process sees it."""

    def __init__(self, memory: SharedMemory, metrics: CollectedMetrics) -> None:
        self.memory = memory
        self.ranges = RangeAllocator(len(memory.map))
        self.metrics = metrics
        self.channel = Channel(self.receive, end_at_once)
        self.current: RemoteServing | None = None
        self.ready = False
        self.draining = False
        self.replaced: set[int] = set()  # serials of libraries that a request may still hold
        self.collected_at = 0.0
        self.numbers = itertools.count()
        self.replies: dict[int, asyncio.Future[Any]] = {}
        self.statistics = InferenceStatistics()  # since the last report
        self.keys: ApiKeyStore | None = None
        self.server: Server | None = None

    # Messages

    def receive(self, message: Message) -> None:
        kind, *fields = message
        match kind:
            case "granted" | "answered":
                self.settle(fields[0], None)
            case "refused":
                number, name, retry_after = fields
                self.fail(number, getattr(errors, name)(retry_after=retry_after))
            case "statistics":
                number, counted = fields
                self.settle(number, InferenceStatistics(**counted))
            case "state":
                self.take_state(*fields)
            case "keys" if self.keys is not None:
                self.keys.reload()
            case "stop" if self.server is not None:
                self.server.should_exit = True

    def settle(self, number: int, result: Any) -> None:
        if (reply := self.waiting(number)) is not None:
            reply.set_result(result)

    def fail(self, number: int, error: ServiceError) -> None:
        if (reply := self.waiting(number)) is not None:
            reply.set_exception(error)

    def waiting(self, number: int) -> asyncio.Future[Any] | None:
        """None where the client has gone meanwhile."""
        reply = self.replies.get(number)
        return None if reply is None or reply.done() else reply

    async def call(self, kind: str, number: int, *fields: Any) -> Any:
        """Sends a message, and waits for what the service answers. Raises the error that it answers with."""
        reply = self.replies[number] = asyncio.get_running_loop().create_future()
        self.channel.send(kind, number, *fields)
        try:
            return await reply
        finally:
            del self.replies[number]

    def take_state(self, serial: int, library: dict[str, Any] | None, ready: bool, draining: bool) -> None:
        self.ready, self.draining = ready, draining
        if library is None or (self.current is not None and self.current.serial == serial):
            return
        if self.current is not None:
            self.replaced.add(self.current.serial)
        described = RemoteLibrary(library["digest"], tuple(library["classes"]), InputSpec(**library["input"]))
        self.current = RemoteServing(serial, described, RemoteScheduler(self, serial, described))
        weakref.finalize(self.current, self.drop, serial).atexit = False

    def drop(self, serial: int) -> None:
        """No request holds that library any more."""
        self.replaced.discard(serial)
        self.channel.send("dropped", serial)

    async def report(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            self.flush()
            if self.replaced and time.monotonic() - self.collected_at > COLLECT_S:
                gc.collect()  # a failed request leaves cycles that hold its library
                self.collected_at = time.monotonic()

    def flush(self) -> None:
        increments, observations = self.metrics.take()
        if increments or observations:
            self.channel.send("metrics", increments, observations)
        if any(self.statistics.counts.values()):
            self.channel.send("inferences", asdict(self.statistics))
            self.statistics.clear()


class RemoteScheduler:
    """The service's scheduler of one library."""

    def __init__(self, service: Service, serial: int, library: RemoteLibrary) -> None:
        self.service = service
        self.serial = serial
        self.library = library

    def check(self, size: int, client: str, left_s: float) -> None:
        """Nothing: the service checks when images are reserved, which is before they are decoded."""

    async def submit(self, images: Pixels, *, client: str, deadline: float | None = None) -> Probabilities:
        """As the service's. Raises what it raises."""
        async with self.reserve(len(images), client, cast("float", deadline)) as reservation:
            return await reservation.submit(images)

    @asynccontextmanager
    async def reserve(self, size: int, client: str, deadline: float) -> AsyncIterator["Reservation"]:
        """Room in the service for so many images. Raises what the service's scheduler raises, and Overloaded."""
        reservation = Reservation(self.service, self.library, next(self.service.numbers), size)
        try:
            await reservation.call("reserve", self.serial, size, client, deadline)
            yield reservation
        finally:
            reservation.close()


class Reservation:
    """A request that the service knows of, from its admission to its answer."""

    def __init__(self, service: Service, library: RemoteLibrary, number: int, size: int) -> None:
        self.service = service
        self.library = library
        self.number = number
        self.size = size
        self.start: int | None = None  # of its range of the shared memory
        self.ended = False  # in the service

    async def submit(self, images: Pixels) -> Probabilities:
        """uint8 [N, 3, H, W] -> [N, classes]."""
        shape = (self.size, len(self.library.classes))
        self.start = self.service.ranges.take(max(images.nbytes, FLOAT_BYTES * shape[0] * shape[1]))
        if self.start is None:
            self.service.metrics.inc("shed_total", reason="queue")
            raise Overloaded
        self.service.memory.array(self.start, images.shape, np.uint8)[:] = images
        await self.call("submit", self.start)
        self.ended = True
        answer: Probabilities = self.service.memory.array(self.start, shape, np.float32).copy()
        return answer

    async def call(self, kind: str, *fields: Any) -> None:
        """As the service's."""
        try:
            await self.service.call(kind, self.number, *fields)
        except ServiceError:
            self.ended = True
            raise

    def close(self) -> None:
        """Messages keep their order: whoever takes this range next, the service has let go of it before."""
        if not self.ended:
            self.service.channel.send("release", self.number)
        if self.start is not None:
            end = self.service.ranges.free(self.start)
            if end - self.start >= GIVE_BACK_BYTES:
                self.service.memory.give_back(self.start, end)


@dataclass(frozen=True, eq=False)
class RemoteServing:
    """A library that the service serves, or did when a request began."""

    serial: int
    library: RemoteLibrary
    scheduler: RemoteScheduler


class RemoteDataPlane(DataPlane):
    """A data plane whose images are admitted, counted and answered by the service."""

    def __init__(self, manager: Manager, settings: Settings, metrics: Metrics, keys: ApiKeyStore) -> None:
        super().__init__(manager, settings, metrics, keys)
        self.service = cast("Service", manager)
        self.statistics = self.service.statistics

    async def all_statistics(self) -> InferenceStatistics:
        """Other processes' requests of the last FLUSH_S may be missing."""
        self.service.flush()
        return cast("InferenceStatistics", await self.service.call("statistics", next(self.service.numbers)))

    async def submit(
        self, context: InferenceContext, images: Sequence[bytes] | Pixels, deadline: float
    ) -> Probabilities:
        scheduler = cast("RemoteScheduler", context.serving.scheduler)
        if isinstance(images, np.ndarray):
            return await scheduler.submit(images, client=context.client, deadline=deadline)
        async with scheduler.reserve(len(images), context.client, deadline) as reservation:
            with stage("decode"):
                rows = await self.decoder.rows(images, context.serving.library.input)
            return await reservation.submit(rows)


def end_at_once() -> None:
    """The service has gone: nobody can be answered any more."""
    os._exit(1)


async def serve(channel: int, listener: int, memory: int, settings: Settings) -> None:
    """Runs until the service says stop, and then until what was read is answered."""
    metrics = CollectedMetrics()
    service = Service(SharedMemory(memory), metrics)
    service.keys = ApiKeyStore(settings.api_keys_file, metrics)
    app = create_public_app(service, settings, metrics, service.keys, RemoteDataPlane)
    service.server = create_server(app, settings, socket.socket(fileno=listener))
    ours = socket.socket(fileno=channel)
    await asyncio.get_running_loop().create_unix_connection(lambda: service.channel, sock=ours)
    gc.collect()
    gc.freeze()  # what is there now stays
    reporting = asyncio.ensure_future(service.report())
    await service.server.serve_forever()
    reporting.cancel()
    service.flush()
    closed = asyncio.Event()
    service.channel.on_closed = closed.set
    service.channel.close()
    await closed.wait()  # the last report has left


def main(channel: int, listener: int, memory: int, settings: Settings) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # for the service, which drains first
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    configure_logging(settings.log_level)
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(channel, listener, memory, settings))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Settings(**json.loads(sys.argv[4])))
