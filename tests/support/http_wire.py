"""HTTP/1.1 by hand: an application that echoes what was read, a wire without a network, and a reader of answers."""

import asyncio
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPMessage, HTTPResponse
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from service.web.http_protocol import HttpProtocol


@dataclass(frozen=True)
class Answer:
    status: int
    headers: HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Stream(io.BytesIO):
    """Bytes that came, in the form that http.client reads from."""

    def makefile(self, *_: Any) -> "Stream":
        return self

    def close(self) -> None:
        """One stream holds several answers."""


def read_answers(received: bytes, method: str = "POST") -> list[Answer]:
    """All answers in these bytes; interim ones are passed over. Raises HTTPException if the last is incomplete."""
    stream, answers = Stream(received), []
    while stream.tell() < len(received):
        response = HTTPResponse(stream, method=method)  # type: ignore[arg-type]
        response.begin()
        answers.append(Answer(response.status, response.headers, response.read()))
    return answers


class Wire(asyncio.Transport):
    """Keeps what is written; ends as a socket does."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self.half_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.half_closed:
            raise RuntimeError("Cannot call write() after write_eof()")
        self.sent += bytes(data)

    def write_eof(self) -> None:
        self.half_closed = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    @property
    def ended(self) -> bool:
        return self.closed or self.half_closed


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with what was read of the request: the whole of it, if nothing was lost."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        body += message["body"]
        more = message["more_body"]
    await answer(send, {**described(scope), "body": body.decode("latin-1")})


async def hasty(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body."""
    await answer(send, described(scope))


def described(scope: Scope) -> dict[str, Any]:
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [[part.decode("latin-1") for part in header] for header in scope["headers"]]
    return {"method": scope["method"], "target": target.decode(), "headers": headers}


async def answer(send: Send, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def make_protocol(app: ASGIApp, wire: Wire) -> HttpProtocol:
    """A protocol of the service on that wire. Only in a running event loop."""
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False, date_header=False
    )
    protocol = HttpProtocol(config=config, server_state=ServerState(), app_state={})
    protocol.connection_made(wire)
    return protocol


def converse(segments: Sequence[bytes], app: ASGIApp = echo) -> Wire:
    """Sends the segments one by one to a protocol over `app`, and gives it time after each."""

    failures: list[Any] = []

    async def run() -> Wire:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        wire = Wire()
        protocol = make_protocol(app, wire)
        for segment in segments:
            if wire.closed:
                break
            protocol.data_received(segment)
            await settle(protocol)
        protocol.connection_lost(ConnectionResetError())  # without an error uvicorn would close its side, too
        await settle(protocol)
        return wire

    answers = asyncio.run(run())
    assert failures == []
    return answers


async def settle(protocol: HttpProtocol, turns: int = 4) -> None:
    """Until nothing moves: applications wait for bytes, and what was written has left."""
    for _ in range(turns):
        await asyncio.sleep(0)
    while any(not task.done() and not waits(task) for task in protocol.tasks):  # noqa: ASYNC110 -- others' tasks
        await asyncio.sleep(0)
    await asyncio.sleep(0)


def waits(task: Any) -> bool:
    return getattr(task, "_fut_waiter", None) is not None


def single_cuts(data: bytes) -> Iterator[list[bytes]]:
    """Every way to send the bytes in two segments, and in one."""
    yield [data]
    for place in range(1, len(data)):
        yield [data[:place], data[place:]]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[place : place + 1] for place in range(len(data))]


def random_cuts(data: bytes, rng: random.Random, most: int = 6) -> list[bytes]:
    places = sorted(rng.sample(range(1, len(data)), min(rng.randint(0, most), len(data) - 1)))
    return [data[first:last] for first, last in zip([0, *places], [*places, len(data)], strict=True)]


def segmentations(data: bytes) -> Iterator[list[bytes]]:
    yield from single_cuts(data)
    yield byte_by_byte(data)
    rng = random.Random(0)
    for _ in range(20):
        yield random_cuts(data, rng)


def chunked(body: bytes, rng: random.Random | None = None, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """The body in chunks, of random sizes or whole."""
    pieces = [piece for piece in (random_cuts(body, rng) if rng and len(body) > 1 else [body]) if piece]
    coded = b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces)
    return coded + b"0\r\n" + trailers + b"\r\n"


def post(headers: bytes = b"", body: bytes = b"", target: bytes = b"/", version: bytes = b"1.1") -> bytes:
    return b"POST " + target + b" HTTP/" + version + b"\r\nhost: x\r\n" + headers + b"\r\n" + body


def with_length(body: bytes, headers: bytes = b"", target: bytes = b"/") -> bytes:
    return post(headers + b"content-length: %d\r\n" % len(body), body, target)


def with_chunks(body: bytes, headers: bytes = b"", target: bytes = b"/") -> bytes:
    return post(headers + b"transfer-encoding: chunked\r\n", chunked(body), target)
