"""Reading what clients send: headers once, bodies within limits of size, time and memory, and the hang-up."""

import asyncio
import json
import re
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from typing import Any, Final, TypeVar

from starlette.types import Receive, Scope

from service.errors import (
    BadRequest,
    BodyTooLarge,
    ClientDisconnected,
    ContentTooLarge,
    ErrorMessage,
    Overloaded,
    RequestTimeout,
    UnsupportedMediaType,
)
from service.observability.metrics import Metrics
from service.settings import Settings

SINGLE_VALUE_HEADERS: Final = frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"idempotency-key",
        b"inference-header-content-length",
        b"tombola-timeout-ms",
        b"x-api-key",
    )
)
GZIP: Final = frozenset((b"gzip", b"x-gzip"))
CODINGS: Final = GZIP | {b"deflate"}
GZIP_BITS, ZLIB_BITS, RAW_BITS = 31, 15, -15  # zlib's `wbits`: gzip's header, zlib's own, none
MAX_MEMBERS: Final = 4096  # of one gzip body: each costs a new decompressor, however little it holds
PIECES: Final = (1024, 65536)  # bytes fed at once to a member, doubled from the first to the second
BEGIN_OF_JSON: Final = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[{\[]")  # after a byte order mark, perhaps
JSON_ELEMENTS: Final = 1 << 18  # commas in one JSON text: a parsed number takes up to 16 times its text in memory
Answer = TypeVar("Answer")

sys.set_int_max_str_digits(640)  # the least Python allows, process-wide: reading n digits takes n^2 steps


def unique_headers(scope: Scope) -> dict[bytes, bytes]:
    """The request's headers by lower-case name; of those that matter here, two of one name are refused."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in SINGLE_VALUE_HEADERS and headers.get(name, value) != value:
            raise BadRequest(ErrorMessage.HEADER_TWICE)
        headers[name] = value
    return headers


def whole_number(text: bytes, digits: int = 15) -> int | None:
    """A decimal number without sign or spaces, small enough to compute with; None for anything else."""
    return int(text) if text.isdigit() and len(text) <= digits else None


def refuse_length(headers: Mapping[bytes, bytes], limit: int) -> None:
    """Before any of the body is read. Raises BadRequest, BodyTooLarge."""
    length = whole_number(headers.get(b"content-length", b"0"))
    if length is None:
        raise BadRequest(ErrorMessage.LENGTH_HEADER)
    if length > limit:
        raise BodyTooLarge(limit=limit)


async def stream_body(scope: Scope, receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """A body piece by piece, without its Content-Encoding: at most `limit` bytes as sent, and as many unpacked.

    Raises BadRequest, BodyTooLarge, ContentTooLarge, UnsupportedMediaType, ClientDisconnected.
    """
    headers = unique_headers(scope)
    refuse_length(headers, limit)
    coding = content_coding(headers)
    inflater = None if coding is None else Inflater(coding, limit)
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnected
        data, more = message.get("body", b""), message.get("more_body", False)
        size += len(data)
        if size > limit:
            raise BodyTooLarge(limit=limit)
        if inflater is None:
            yield data
            continue
        pieces = inflater.unpack_chunk(data)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    if inflater is not None:
        inflater.finish()


class BodyReader:
    """Reads bodies, and counts what all requests together hold of them: what has arrived, not what was announced, so
    that slow clients cannot take the room of others by promising much."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.reserved_bytes = 0

    async def read(self, receive: Receive, headers: Mapping[bytes, bytes], room: "BodyReservation") -> bytes:
        """The whole body, without its Content-Encoding. Raises BadRequest, Overloaded, BodyTooLarge, TooLarge, TooSlow,
        Unsupported, ClientGone."""
        refuse_length(headers, self.settings.max_body_bytes)
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                body = await self.read_chunks(receive, room)
        except TimeoutError:
            raise RequestTimeout(limit=self.settings.body_timeout_s) from None
        self.metrics.observe("http_request_body_bytes", len(body))
        return await self.decode_content(body, headers, room)

    async def read_chunks(self, receive: Receive, room: "BodyReservation") -> bytes:
        parts: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnected
            part = message.get("body", b"")
            room.take(len(part))
            if room.size > self.settings.max_body_bytes:
                raise BodyTooLarge(limit=self.settings.max_body_bytes)
            parts.append(part)
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def decode_content(self, body: bytes, headers: Mapping[bytes, bytes], room: "BodyReservation") -> bytes:
        coding = content_coding(headers)
        if coding is None:
            return body
        limit = self.settings.max_body_bytes
        room.take(limit)
        result = await asyncio.to_thread(inflate, body, coding, limit)
        room.take(len(result) - limit)
        return result

    def reserve(self, size: int) -> None:
        self.reserved_bytes += size
        self.metrics.inc("http_body_memory_bytes", size)


class BodyReservation:
    """What one request holds of the room for bodies, until it is closed."""

    def __init__(self, bodies: BodyReader) -> None:
        self.bodies = bodies
        self.size = 0

    def take(self, size: int) -> None:
        """Raises Overloaded when all requests together would hold too much."""
        if self.bodies.reserved_bytes + size > self.bodies.settings.body_memory_bytes:
            self.bodies.metrics.inc("shed_total", reason="body")
            raise Overloaded(ErrorMessage.BODIES_FULL)
        self.bodies.reserve(size)
        self.size += size

    def close(self) -> None:
        self.bodies.reserve(-self.size)


def content_coding(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The Content-Encoding to undo, None for none. Raises UnsupportedMediaType."""
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding in (b"", b"identity"):
        return None
    if coding not in CODINGS:
        raise UnsupportedMediaType(ErrorMessage.BODY_PACKING)
    return coding


def window_bits(begin: bytes, coding: bytes) -> int:
    """zlib's parameter for a stream that begins so."""
    if coding in GZIP:
        return GZIP_BITS
    begins_as_zlib = begin[:1] and begin[0] & 15 == zlib.DEFLATED and int.from_bytes(begin[:2], "big") % 31 == 0
    return ZLIB_BITS if begins_as_zlib else RAW_BITS


def inflate(body: bytes, coding: bytes, limit: int) -> bytes:
    """What a whole body holds, at most `limit` bytes. Raises BadRequest, ContentTooLarge."""
    inflater = Inflater(coding, limit)
    result = b"".join(inflater.unpack_chunk(body))
    inflater.finish()
    return result


class Inflater:
    """Unpacks a body of Content-Encoding gzip or deflate as it arrives, to at most `limit` bytes.

    gzip may have several members (RFC 1952, 2.2). deflate should have zlib's header, but some clients leave it out (RFC
    9110, 8.4.1.2).
    """

    def __init__(self, coding: bytes, limit: int) -> None:
        self.coding = coding
        self.limit = limit
        self.size = 0  # bytes unpacked so far
        self.members = 0
        self.machine: zlib._Decompress | None = None
        self.begin = b""  # of a deflate body, until it shows what header it has

    def unpack_chunk(self, data: bytes) -> Iterator[bytes]:
        """What the next bytes of the body hold, at most PIECES[1] of it at once. Raises BadRequest, ContentTooLarge."""
        view, at, piece = memoryview(self.begin + data if self.begin else data), 0, PIECES[0]
        self.begin = b""
        try:
            while at < len(view):
                if self.machine is None or self.machine.eof:
                    if len(view) - at < 2 and self.coding not in GZIP:
                        self.begin = bytes(view[at:])
                        return
                    self.machine, piece = self.next_member(view[at : at + 2]), PIECES[0]
                part = view[at : at + piece]
                yield from self.unpack(self.machine, part)
                at, piece = at + len(part) - len(self.machine.unused_data), min(2 * piece, PIECES[1])
        except zlib.error:
            raise BadRequest(ErrorMessage.BODY_INFLATE) from None

    def unpack(self, machine: "zlib._Decompress", part: bytes | memoryview) -> Iterator[bytes]:
        while True:
            most = min(self.limit + 1 - self.size, PIECES[1])
            result = machine.decompress(part, most)
            self.size += len(result)
            if self.size > self.limit:
                raise ContentTooLarge(limit=self.limit)
            yield result
            part = machine.unconsumed_tail
            if machine.eof or (not part and len(result) < most):
                return

    def next_member(self, begin: memoryview) -> "zlib._Decompress":
        self.members += 1
        if self.members > (MAX_MEMBERS if self.coding in GZIP else 1):
            raise BadRequest(ErrorMessage.BODY_INFLATE)
        return zlib.decompressobj(wbits=window_bits(bytes(begin), self.coding))

    def finish(self) -> None:
        """Raises BadRequest for a body that is cut short."""
        if self.machine is None or not self.machine.eof or self.begin:
            raise BadRequest(ErrorMessage.BODY_INFLATE)


def media_type(headers: Mapping[bytes, bytes]) -> bytes:
    """The content type without its parameters, lower case; empty when there is none."""
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


def is_unnamed(kind: bytes) -> bool:
    """Whether a media type says nothing of the content: none, bytes of some kind, or what curl sends unless told."""
    return kind in (b"", b"application/x-www-form-urlencoded", b"application/binary") or kind.endswith(
        (b"/octet-stream", b"/x-octet-stream")
    )


def is_json(kind: bytes) -> bool:
    """Whether a media type is one of JSON's (RFC 8259, RFC 6839; the others are older names of it)."""
    return kind in (b"application/json", b"text/json", b"application/x-json") or kind.endswith(b"+json")


def looks_like_json(body: bytes) -> bool:
    return BEGIN_OF_JSON.match(body) is not None


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def reject_nan(_: str) -> Any:
    raise ValueError("NaN or Infinity")


DECODER: Final = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys, parse_constant=reject_nan)


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, with or without a byte order mark, no NaN, no key twice, no deep nesting.

    Raises BadRequest, ContentTooLarge.
    """
    if text.count(b",") > JSON_ELEMENTS:
        raise ContentTooLarge(ErrorMessage.JSON_TOO_MANY, limit=JSON_ELEMENTS)
    try:
        result = DECODER.decode(text.decode("utf-8-sig"))
    except (
        ValueError,
        RecursionError,
    ):  # also UnicodeDecodeError, JSONDecodeError and whole numbers of over 640 digits
        raise BadRequest(ErrorMessage.JSON_MALFORMED) from None
    if not isinstance(result, dict):
        raise BadRequest(ErrorMessage.JSON_OBJECT)
    return result


async def cancel_on_disconnect(receive: Receive, work: Awaitable[Answer]) -> Answer:
    """Awaits `work`, whose body has been read. A client that hangs up cancels it: ClientGone."""
    me = asyncio.current_task()
    watch = asyncio.ensure_future(wait_for_disconnect(receive))
    watch.add_done_callback(lambda done: None if done.cancelled() or me is None else me.cancel())
    try:
        return await work
    except asyncio.CancelledError:
        if watch.done() and me is not None and me.uncancel() == 0:
            raise ClientDisconnected from None
        raise
    finally:
        watch.cancel()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
