"""The planes of the service over a stand-in for the engine, in process or behind a real port."""

import asyncio
import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final, cast

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image
from starlette.types import ASGIApp

from model_store.images import Pixels
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from service import errors
from service.admin.audit_jobs import AuditQueue
from service.app import create_admin_app
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.scheduling.answers import Probabilities
from service.settings import Settings
from service.web.auth import ApiKeyStore
from service.web.public_app import create_public_app
from service.web.server import create_server, loop_factory
from tests.support.tickets import CLASSES
from tests.support.waiting import until

DIGEST: Final = "ab" * 32
TOKEN: Final = "a-token-for-the-tests-alone"


@dataclass
class Oracle:
    """Stands in for the scheduler: class j for an image whose red channel is about 25*j + 12 in the mean.

    error: raised instead.  full: raised before anything is decoded.  hold: nothing is answered before it is set.
    """

    error: Exception | None = None
    full: Exception | None = None
    shape: tuple[int, int, int] = CIFAR10_INPUT.shape
    hold: asyncio.Event | None = None
    rows: list[Pixels] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    cancelled: int = 0
    submitted: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self, size: int, client: str, left_s: float) -> None:
        if self.full is not None:
            raise self.full

    async def submit(self, rows: Pixels, *, client: str, deadline: float | None) -> Probabilities:
        assert rows.dtype == np.uint8
        assert rows.shape[1:] == self.shape
        self.rows.append(rows)
        self.clients.append(client)
        self.deadlines.append(-1 if deadline is None else deadline - asyncio.get_running_loop().time())
        self.submitted.set()
        if self.hold is not None:
            await self.wait(self.hold)
        if self.error is not None:
            raise self.error
        return probabilities(rows)

    async def wait(self, hold: asyncio.Event) -> None:
        try:
            await hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def probabilities(rows: Pixels) -> Probabilities:
    """0.6172 for the class the red channel names, and the rest, falling, for the others."""
    indices = np.minimum(rows[:, 0].mean(axis=(1, 2)) // 25, len(CLASSES) - 1).astype(int)
    values = np.tile(np.linspace(0.0701, 0.01495, len(CLASSES), dtype=np.float32), (len(rows), 1))
    values[np.arange(len(rows)), indices] = 0
    values *= (1 - 0.6172) / values.sum(axis=1, keepdims=True)
    values[np.arange(len(rows)), indices] = 0.6172
    return values


@dataclass
class StandIn:
    """A manager of one library that is not there."""

    scheduler: Oracle = field(default_factory=Oracle)
    ready: bool = True
    loaded: bool = True
    draining: bool = False
    library: Any = field(default_factory=lambda: SimpleNamespace(classes=CLASSES, digest=DIGEST, input=CIFAR10_INPUT))
    on_reload: Callable[[], None] = lambda: None

    @property
    def current(self) -> "StandIn | None":
        return self if self.loaded else None

    async def reload(self, digest: str | None = None) -> "StandIn":
        self.on_reload()
        return self


def stand_in_of(spec: InputSpec) -> StandIn:
    """A manager of a library that takes such pictures."""
    library = SimpleNamespace(classes=CLASSES, digest=DIGEST, input=spec)
    return StandIn(Oracle(shape=spec.shape), library=library)


def public_app(manager: StandIn | None = None, metrics: Metrics | None = None, **overrides: Any) -> FastAPI:
    """The public plane over a stand-in."""
    settings, metrics = Settings(**overrides), metrics or Metrics()
    served = cast("LibraryManager", manager or StandIn())
    return create_public_app(served, settings, metrics, ApiKeyStore(settings.api_keys_file, metrics))


def admin_app(
    manager: StandIn | None = None,
    metrics: Metrics | None = None,
    *,
    jobs: AuditQueue | None = None,
    metrics_open: bool = True,
) -> FastAPI:
    """The admin plane over a stand-in."""
    settings, metrics, served = Settings(metrics_open=metrics_open), metrics or Metrics(), manager or StandIn()
    queue = jobs or AuditQueue(settings, metrics, lambda: served.library)
    return create_admin_app(cast("LibraryManager", served), settings, metrics, TOKEN, queue)


def ask(app: ASGIApp, method: str, path: str, **request: Any) -> httpx.Response:
    """One request, in process."""

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(cast("Any", app))  # an exception that passes the app would be raised here
        async with httpx.AsyncClient(transport=transport, base_url="http://tombola", timeout=30) as client:
            return await client.request(method, path, **request)

    return asyncio.run(once())


def refused(response: httpx.Response, status: int, text: errors.ErrorMessage | None = None) -> str:
    """Checks the error form, and the text if one is given, up to its numbers; returns what was said."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    message: str = response.json()["error"]
    if text is not None:
        assert matches(text, message), message
    return message


def one_of_the_catalogue(message: str) -> bool:
    return any(matches(text, message) for text in errors.ErrorMessage)


def matches(text: str, message: str) -> bool:
    """Whether `said` is this text of the catalogue with nothing but numbers filled in."""
    escaped = re.escape(text.replace("{{", "{").replace("}}", "}"))
    pattern = re.sub(r"\\{(limit|height|width)\\}", r"[0-9]+(\.[0-9]+)?", escaped)
    return re.fullmatch(pattern, message) is not None


@contextmanager
def behind_a_port(app: FastAPI, listener: socket.socket | None = None, **knobs: Any) -> Iterator[str]:
    """The app in a real server on a free port, or on the given one, in a thread; gives host:port."""
    listener = listener or socket.create_server(("127.0.0.1", 0))
    server = create_server(app, Settings(**knobs), listener)

    def serve() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


def picture(red: int = 100, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    """One colour throughout; in grey modes, that grey."""
    return Image.new("RGB", size, (red, red, red) if mode in ("L", "1") else (red, 40, 200)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(red: int = 100, size: tuple[int, int] = (32, 32)) -> bytes:
    return encoded(picture(red, size))
