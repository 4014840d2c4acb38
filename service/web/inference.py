"""What both public protocols share: a request's way to the scheduler and back, and how much of the answer is shown."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from model_store.images import Pixels
from model_store.library import Library
from service.errors import (
    BadRequest,
    ClientDisconnected,
    ContentTooLarge,
    DeadlineExceeded,
    ErrorMessage,
    NotReady,
    Overloaded,
    RateLimited,
    RequestTimeout,
    ServiceError,
    Unauthorized,
    UnsupportedMediaType,
)
from service.observability.metrics import Metrics
from service.observability.tracing import stage
from service.settings import Settings
from service.web.auth import ApiKeyStore
from service.web.body import BodyReader, BodyReservation, cancel_on_disconnect, unique_headers
from service.web.decoder import Decoder

Detail = Literal["rounded", "label", "full"]
ARRIVAL_TIME: Final = (
    "tombola.arrived"  # where the scope may hold when the event loop had read its headers, on the loop's clock
)
DIGITS: Final = 2  # of a rounded probability
ZERO_WEIGHT: Final = re.compile(r"[qQ]\s*=\s*0(\.0{0,3})?")
Probabilities = NDArray[np.float32]


class SchedulerProtocol(Protocol):
    def check(self, size: int, client: str, left_s: float) -> None: ...
    async def submit(self, images: Pixels, *, client: str, deadline: float | None) -> Probabilities: ...


class LoadedLibraryProtocol(Protocol):
    """A library with what runs it. A request keeps the one it began with."""

    @property
    def library(self) -> Library: ...
    @property
    def scheduler(self) -> SchedulerProtocol: ...


class LibraryManagerProtocol(Protocol):
    """What is being served now; None before the first library is verified and warm."""

    @property
    def current(self) -> LoadedLibraryProtocol | None: ...
    @property
    def ready(self) -> bool: ...
    async def reload(self) -> LoadedLibraryProtocol:
        """Opens LIBRARY again, warms it up beside the old one, and swaps. Raises StoreError; the old one then stays."""


class RawRoute(APIRoute):
    """A documented route whose endpoint takes the request and returns the response, without FastAPI's machinery of
    parameters: bodies are read raw, since no client sends the content type that a declared body insists on."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


REFUSES: Final = (
    BadRequest,
    Unauthorized,
    RequestTimeout,
    ContentTooLarge,
    UnsupportedMediaType,
    RateLimited,
    Overloaded,
    NotReady,
    DeadlineExceeded,
)
"""For the OpenAPI document: what a classification may end with, on both protocols."""


class FastPathMiddleware:
    """Middleware that takes the busiest paths past the framework's routing, which costs a quarter of such a request.
    The endpoints are those of the routes; other methods go the usual way, to the usual 405."""

    def __init__(self, app: ASGIApp, *, routes: Mapping[str, tuple[RawRoute, Mapping[str, str]]]) -> None:
        self.app = app
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"], scope["path_params"] = route
        response: Response = await route[0].endpoint(Request(scope, receive))
        await response(scope, receive, send)


ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def json_response(content: Any, status: int = 200) -> Response:
    return Response(ENCODER.encode(content), status, media_type="application/json")


def without_refused(header: str) -> str:
    """The codings that an Accept-Encoding header names with a weight above 0 (RFC 9110, 12.4.2), without weights."""
    items = (item.partition(";") for item in header.split(","))
    return ",".join(name.strip() for name, _, weight in items if not ZERO_WEIGHT.fullmatch(weight.strip()))


@dataclass(frozen=True)
class InferenceContext:
    """One classification request, read and admitted. deadline: in loop time, the latest this server allows."""

    headers: Mapping[bytes, bytes]
    body: bytes
    client: str
    arrived: float
    deadline: float
    serving: LoadedLibraryProtocol
    receive: Receive


class DataPlane:
    def __init__(
        self, manager: LibraryManagerProtocol, settings: Settings, metrics: Metrics, keys: ApiKeyStore
    ) -> None:
        self.manager = manager
        self.settings = settings
        self.metrics = metrics
        self.keys = keys
        self.bodies = BodyReader(settings, metrics)
        self.decoder = Decoder(settings, metrics)

    def serving(self) -> LoadedLibraryProtocol:
        serving = self.manager.current
        if serving is None:
            raise NotReady
        return serving

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[InferenceContext]:
        """Reads a request and admits it. On exit it is counted by its outcome, and its body's memory is released."""
        with self.counting() as reservation:
            yield await self.read(request, reservation)

    @contextmanager
    def counting(self) -> Iterator[BodyReservation]:
        """Memory for a request's body, released on exit, when the request is counted by its outcome."""
        outcome = "error"
        reservation = BodyReservation(self.bodies)
        try:
            yield reservation
            outcome = "ok"
        except ServiceError as error:
            outcome = error.outcome
            raise
        except (ClientDisconnected, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        finally:
            reservation.close()
            self.metrics.inc("inference_requests_total", outcome=outcome)

    async def read(self, request: Request, reservation: BodyReservation) -> InferenceContext:
        loop = asyncio.get_running_loop()
        arrived: float = request.scope.get(ARRIVAL_TIME, loop.time())
        headers = unique_headers(request.scope)
        client = self.identify(request.scope, headers)
        serving = self.serving()
        body = await self.bodies.read(request.receive, headers, reservation)
        context = InferenceContext(
            headers, body, client, arrived, arrived + self.settings.deadline_s, serving, request.receive
        )
        self.admit(context)
        return context

    def identify(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Who asks. Raises Unauthorized, and BadRequest for what no answer can honour."""
        client = self.keys.client(scope, headers)
        if b"idempotency-key" in headers:
            raise BadRequest(ErrorMessage.IDEMPOTENCY)
        return client

    def admit(self, context: InferenceContext) -> None:
        """Once a request has been read: a refusal costs least before all the rest. Raises Overloaded, RateLimited."""
        left_s = context.deadline - asyncio.get_running_loop().time()
        context.serving.scheduler.check(1, context.client, left_s)

    async def classify(
        self, context: InferenceContext, images: Sequence[bytes] | Pixels, timeout_s: float | None = None
    ) -> Probabilities:
        """Encoded files, or uint8 [N, 3, H, W] -> [N, classes]. A client that hangs up meanwhile: ClientGone."""
        if len(images) > self.settings.max_images:
            raise ContentTooLarge(ErrorMessage.IMAGES_TOO_MANY, limit=self.settings.max_images)
        deadline = context.deadline if timeout_s is None else min(context.deadline, context.arrived + timeout_s)
        if not isinstance(images, np.ndarray):  # these have to be decoded: not for a request that will be refused
            left_s = deadline - asyncio.get_running_loop().time()
            context.serving.scheduler.check(len(images), context.client, left_s)
        return await cancel_on_disconnect(context.receive, self.submit(context, images, deadline))

    async def submit(
        self, context: InferenceContext, images: Sequence[bytes] | Pixels, deadline: float
    ) -> Probabilities:
        with stage("decode"):
            rows = (
                images
                if isinstance(images, np.ndarray)
                else await self.decoder.rows(images, context.serving.library.input)
            )
        return await context.serving.scheduler.submit(rows, client=context.client, deadline=deadline)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Times what makes a response of probabilities."""
        began = time.perf_counter()
        with stage("encode"):
            yield
        self.metrics.observe("compute_seconds", time.perf_counter() - began, stage="encode")


def apply_output_detail(probabilities: Probabilities, detail: Detail) -> NDArray[np.float64]:
    """What may be seen of probabilities [N, classes]: two decimals, or all of a float32's digits."""
    wide = probabilities.astype(np.float64)
    return wide if detail == "full" else np.round(wide, DIGITS)


def rank_classes(probabilities: Probabilities) -> NDArray[np.int64]:
    """[N, classes] -> class indices, likeliest first; of equals the first class, as argmax has it."""
    return np.argsort(-probabilities, axis=1, kind="stable")
