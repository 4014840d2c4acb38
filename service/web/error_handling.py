"""From exceptions to answers: the only place that maps one to a status, and the middleware that answers every one."""

import asyncio
import json
import logging
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    REQUEST_ID,
    BadRequest,
    ClientDisconnected,
    ContentTooLarge,
    EngineFailed,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RateLimited,
    ServiceError,
    Unauthorized,
    UnsupportedMediaType,
    where,
)
from service.web.routing import allowed_methods

log = logging.getLogger(__name__)

LINGER_S: Final = 1.0  # a refused body is read and thrown away this long, so that the client can read the refusal
# Ids tell requests apart and are no secret. The system's generator would cost each request a system call; nothing else
# draws from this one, least of all theta.
IDS: Final = random.Random(secrets.randbits(256))
BY_STATUS: Final[dict[int, type[ServiceError]]] = {
    kind.status: kind
    for kind in (Unauthorized, NotFound, MethodNotAllowed, ContentTooLarge, UnsupportedMediaType, RateLimited, NotReady)
}


def as_service_error(error: Exception) -> ServiceError:
    """The mapping: our own errors say their status, the framework's lose their text, and anything else is a 500."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return BadRequest()
    if isinstance(error, HTTPException):
        default = BadRequest if error.status_code < 500 else ServiceError
        return BY_STATUS.get(error.status_code, default)()
    log.error("unexpected %s, answered with 500, raised at %s", type(error).__name__, where(error))
    return EngineFailed()


def answer(error: Exception) -> Response:
    """The only place where an exception becomes a status and a body."""
    known = as_service_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if known.retry_after is not None:
        headers["Retry-After"] = str(known.retry_after)
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if known.close_connection:
        headers["Connection"] = "close"
    body = json.dumps({"error": known.message})
    return Response(body, known.status, headers, media_type="application/json")


async def answer_framework(request: Request, error: Exception) -> Response:
    response = answer(error)
    if response.status_code == MethodNotAllowed.status:  # the framework names those of one route
        response.headers["Allow"] = ", ".join(allowed_methods(request.app.routes, request.scope))
    return response


EXCEPTION_HANDLERS: Final[dict[Any, Callable[[Request, Exception], Awaitable[Response]]]] = {
    HTTPException: answer_framework,
    RequestValidationError: answer_framework,
}
"""For FastAPI: the error form for what the framework raises, 404 and 405 included."""


class ErrorMiddleware:
    """Around a whole app: a random request id and no-store on every answer, and an answer to every exception.

    A middleware inside the app, not an exception handler: Starlette raises again what a handler for Exception answered,
    and the server then drops a connection that the client believes it can use.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = f"{IDS.getrandbits(64):016x}"
        started = False

        async def reply(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                extra = ((b"x-request-id", request_id.encode()), (b"cache-control", b"no-store"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            await self.app(scope, receive, reply)
        except ClientDisconnected:
            return
        except Exception as error:  # noqa: BLE001 -- the last resort, and it must not raise
            if started:
                log.error("%s after the answer began, at %s", type(error).__name__, where(error))  # noqa: TRY400
                raise EngineFailed from None  # the server closes the connection: the answer is incomplete
            await send_error(error, scope, receive, reply)


async def send_error(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the answer. If a body is still arriving, reads on for a moment: closing at once would reset the
    connection before the client has read what was wrong."""
    response = answer(error)
    if not getattr(error, "close_connection", False):
        await response(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    await discard_body(receive)
    await send({"type": "http.response.body", "body": b""})


async def discard_body(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):  # noqa: ASYNC110
                await asyncio.sleep(0)  # the clock must have its turn, however fast the client sends
    except TimeoutError:
        return
