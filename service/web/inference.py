"""What both public protocols share: a request's way to the scheduler and back, and how much of the answer is shown."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.types import Receive, Scope

from model_store.images import Pixels
from model_store.input_spec import InputSpec
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
from service.scheduling.answers import Probabilities
from service.settings import Settings
from service.web.auth import ApiKeyStore
from service.web.body import BodyReader, BodyReservation, cancel_on_disconnect, unique_headers
from service.web.decoder import Decoder
from service.web.inference_statistics import InferenceStatistics
from service.web.routing import ARRIVAL_TIME
from service.web.serving import Manager, Serving

Detail = Literal["rounded", "label", "full"]
DIGITS: Final = 2  # of a rounded probability


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


@dataclass(frozen=True)
class InferenceContext:
    """One classification request, read and admitted.

    deadline: in loop time, the latest this server allows.  receive: tells of a hang-up; None where that cancels the
    request's task by itself.
    """

    headers: Mapping[bytes, bytes]
    body: bytes
    client: str
    arrived: float
    deadline: float
    serving: Serving
    receive: Receive | None


class DataPlane:
    def __init__(self, manager: Manager, settings: Settings, metrics: Metrics, keys: ApiKeyStore) -> None:
        self.manager = manager
        self.settings = settings
        self.metrics = metrics
        self.keys = keys
        self.bodies = BodyReader(settings, metrics)
        self.decoder = Decoder(settings, metrics)
        self.statistics = InferenceStatistics()
        self.pixel_bytes = 0  # of all images that are decoded or wait for their answer

    async def all_statistics(self) -> InferenceStatistics:
        """Of all processes."""
        return self.statistics

    def serving(self) -> Serving:
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
        most = self.max_images(context.serving.library.input)
        if len(images) > most:
            raise ContentTooLarge(ErrorMessage.IMAGES_TOO_MANY, limit=most)
        deadline = context.deadline if timeout_s is None else min(context.deadline, context.arrived + timeout_s)
        if not isinstance(images, np.ndarray):  # these have to be decoded: not for a request that will be refused
            left_s = deadline - asyncio.get_running_loop().time()
            context.serving.scheduler.check(len(images), context.client, left_s)
        work = self.submit(context, images, deadline)
        return await (work if context.receive is None else cancel_on_disconnect(context.receive, work))

    async def submit(
        self, context: InferenceContext, images: Sequence[bytes] | Pixels, deadline: float
    ) -> Probabilities:
        spec = context.serving.library.input
        with self.pixel_memory(len(images) * spec.numel):
            with stage("decode"):
                rows = images if isinstance(images, np.ndarray) else await self.decoder.rows(images, spec)
            return await context.serving.scheduler.submit(rows, client=context.client, deadline=deadline)

    def max_images(self, spec: InputSpec) -> int:
        """Images of one request, so that one alone never needs more than all the memory for pixels."""
        return min(self.settings.max_images, self.settings.pixel_memory_bytes // spec.numel)

    @contextmanager
    def pixel_memory(self, size: int) -> Iterator[None]:
        """Bytes of pixels that a request holds. Raises Overloaded when all requests together would hold too many."""
        if self.pixel_bytes + size > self.settings.pixel_memory_bytes:
            self.metrics.inc("shed_total", reason="queue")
            raise Overloaded
        self.pixel_bytes += size
        try:
            yield
        finally:
            self.pixel_bytes -= size

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
