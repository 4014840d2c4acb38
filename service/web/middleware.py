"""What every request passes on either plane: it is counted and timed, logged if it failed; and a crowd is kept out."""

import logging
import time
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import REQUEST_ID, BadRequest, ErrorMessage, Overloaded
from service.observability.metrics import UNMATCHED, Metrics
from service.web.error_handling import answer
from service.web.serving import Manager

log = logging.getLogger(__name__)

CLOSE: Final = (b"connection", b"close")
CORS_METHODS: Final = ("GET", "HEAD", "POST")
CORS_REQUEST_HEADERS: Final = (
    "Authorization",
    "Content-Encoding",
    "Inference-Header-Content-Length",
    "Tombola-Timeout-Ms",
    "Traceparent",
    "X-Api-Key",
)
CORS_RESPONSE_HEADERS: Final = ("Inference-Header-Content-Length", "Retry-After", "X-Request-Id")


class RequestMetricsMiddleware:
    """The outermost middleware. While draining it ends each connection with its answer, so that clients come back
    elsewhere."""

    def __init__(self, app: ASGIApp, *, manager: Manager, metrics: Metrics, plane: str, log_all: bool) -> None:
        self.app = app
        self.manager = manager
        self.metrics = metrics
        self.plane = plane
        self.log_all = log_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 499  # nobody was answered: the client hung up

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.manager.draining:
                    message["headers"] = [*message["headers"], CLOSE]
            await send(message)

        try:
            await self.app(scope, receive, reply)
        finally:
            self.count(scope, status, time.perf_counter() - begun)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self.metrics.inc("http_requests_total", route=route, method=scope["method"], code=str(status))
        self.metrics.observe("http_request_duration_seconds", seconds, route=route, code=str(status))
        if self.log_all or (status >= 500 and status != 503):  # a storm of refusals is counted, not written down
            fields = {
                "request_id": scope.get(REQUEST_ID),
                "plane": self.plane,
                "method": scope["method"],
                "route": route,
            }
            log.info("request", extra={"fields": {**fields, "status": status, "seconds": round(seconds, 6)}})


class ConcurrencyLimitMiddleware:
    """Inside the error middleware: at most `limit` requests with a body at once; health is answered regardless."""

    def __init__(self, app: ASGIApp, *, limit: int, metrics: Metrics) -> None:
        self.app = app
        self.limit = limit
        self.metrics = metrics
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        if self.inside >= self.limit:
            self.metrics.inc("shed_total", reason="inflight")
            raise Overloaded
        self.add(1)
        try:
            await self.app(scope, receive, send)
        finally:
            self.add(-1)

    def add(self, change: int) -> None:
        self.inside += change
        self.metrics.inc("http_requests_in_flight", change)


class HeadMiddleware:
    """The innermost middleware: HEAD is answered as GET without the body, on every route (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        ended = False

        async def reply(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                scope["route"] = as_get.get("route")
                await send(message)
            elif not ended:
                ended = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def read() -> Message:
            return {"type": "http.disconnect"} if ended else await receive()  # a stream ends with its first piece

        await self.app(as_get, read, reply)


class CrossOriginMiddleware(CORSMiddleware):
    """Around the error middleware: pages of other origins may use the public plane, without cookies."""

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=CORS_METHODS,
            allow_headers=CORS_REQUEST_HEADERS,
            allow_credentials=False,
            expose_headers=CORS_RESPONSE_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        checked = super().preflight_response(request_headers)
        vary = {"vary": checked.headers["vary"]}
        if checked.status_code != 200:
            refused = answer(BadRequest(ErrorMessage.CROSS_ORIGIN))
            refused.headers.update(vary)
            return refused
        allowed = {name: value for name, value in checked.headers.items() if name.startswith("access-control-")}
        return Response(status_code=204, headers=allowed | vary)
