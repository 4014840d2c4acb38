"""How the bytes of a connection become requests: uvicorn's HTTP/1.1 protocol, strict, and always in HTTP.

One request has one answer, however its bytes are cut into segments. What two parsers could read as different requests
is refused with 400 and the connection is closed, after the answers that are due before that.
"""

import asyncio
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import BadRequest, ErrorMessage, RequestHeaderFieldsTooLarge
from service.web import error_handling
from service.web.routing import ARRIVAL_TIME

log = logging.getLogger(__name__)

HEAD_BYTES: Final = 65536  # request line and headers together; nginx passes on at most half of that
RAW_BYTES: Final = 16 * HEAD_BYTES  # of segments without any progress; one segment has at most a quarter of that
LINGER_S: Final = 1.0  # a refused connection is read and thrown away this long, so that the client can read why
MAPPED: Final = "::ffff:"
VERSIONS: Final = frozenset(("1.0", "1.1"))
SINGLE_VALUED: Final = frozenset(
    (b"host", b"content-length", b"transfer-encoding")
)  # RFC 9112 3.2, 6.3: at most one each
OBEYED: Final = SINGLE_VALUED | {
    b"connection",
    b"expect",
    b"proxy-connection",
    b"upgrade",
}  # by llhttp in trailers, too
USUAL_OPTIONS: Final = frozenset((b"keep-alive", b"close", b"Keep-Alive", b"Close"))
HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(?::[0-9]*)?")
ABSOLUTE: Final = re.compile(rb"(?i:https?)://([^/?#@]+)([^#]*)")
# llhttp also speaks RTSP and Icecast. These methods exist only there.
OTHER_PROTOCOLS: Final = frozenset(
    b"SOURCE DESCRIBE ANNOUNCE SETUP PLAY PAUSE TEARDOWN GET_PARAMETER SET_PARAMETER REDIRECT RECORD FLUSH".split()
)
Headers = list[tuple[bytes, bytes]]


class WriteCoalescingTransport:
    """A transport whose writes of one turn of the event loop leave as one. uvicorn writes an answer's head and its body
    apart; each would be a system call that wakes the client while this thread holds the interpreter."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.transport = transport
        self.loop = loop
        self.parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.parts:
            self.loop.call_soon(self.flush)
        self.parts.append(data)

    def flush(self) -> None:
        parts, self.parts = self.parts, []
        if parts and not self.transport.is_closing():
            self.transport.write(b"".join(parts))

    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def write_eof(self) -> None:
        self.flush()
        self.transport.write_eof()

    def close(self) -> None:
        self.flush()
        self.transport.close()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol without the modes of its parser that nobody handles.

    llhttp leaves HTTP at a request that asks for another protocol, and uvicorn then loses the rest of the bytes.
    RFC 9110 7.8 lets a server ignore the wish: such a request is read again without it, by a new parser.

    The time until a request's headers are there is limited. The limit runs from the connection, and again from the
    first byte after an answer: any such byte ends uvicorn's own limit on idle connections for good.
    """

    header_timeout_s: float = 10.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parser = httptools.HttpRequestParser(self)  # uvicorn's own is lenient about what follows the last request
        self.timer: asyncio.TimerHandle | None = None
        self.running: RequestResponseCycle | None = None  # the request being answered; self.cycle is the latest one
        self.in_body = False  # of self.cycle, whose headers are complete
        self.keeps_alive = True  # as self.cycle's headers say
        self.segment_bytes = 0
        self.raw_bytes = 0  # of the segments since the one in which the message began, or a piece of its body came
        self.ended = False  # nothing more of this connection is read
        self.refusal: bytes | None = None  # to be sent after the answers that are due

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", WriteCoalescingTransport(transport, self.loop)))
        if self.client is not None:
            self.client = (unmapped(self.client[0]), self.client[1])
        self.start_timer(self.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        self._unset_keepalive_if_required()
        self.segment_bytes = len(data)
        self.raw_bytes += self.segment_bytes
        try:
            self.parse(data)
        except (httptools.HttpParserError, RequestHeaderFieldsTooLarge) as error:
            if not self.ended:
                self.refuse(error)
            return
        answered = getattr(self.cycle, "response_complete", True)  # before the first request uvicorn has None there
        if answered and self.timer is None and self.timeout_keep_alive_task is None:
            self.start_timer(self.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.cancel_timer()
        if self.running is not None:  # uvicorn tells only the latest request
            hang_up(self.running)
        super().connection_lost(exc)

    def parse(self, data: bytes | memoryview) -> None:
        while data:
            data = self.parse_part(data)
        if self.raw_bytes > RAW_BYTES:
            raise RequestHeaderFieldsTooLarge(limit=HEAD_BYTES)

    def parse_part(self, data: bytes | memoryview) -> bytes | memoryview:
        """Gives the parser these bytes; what it returns is still to be given."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as pause:
            rest = memoryview(data)[pause.args[0] :]
        else:
            return b""
        # Not inside of the handler: an error of this parser would have the pause as its context instead of its cause.
        head = head_without_upgrade(self.parser, self.url, self.headers)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(head)
        return rest

    # From the parser. What is raised here comes out of feed_data as the context of a HttpParserCallbackError.

    def on_message_begin(self) -> None:
        if self.ended:
            raise BadRequest
        self.raw_bytes = self.segment_bytes
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if not self.in_body:
            self.headers.append((name, value.rstrip()))  # llhttp refuses all spaces but OWS
        elif name in OBEYED:
            raise BadRequest(ErrorMessage.FRAMING)
        # RFC 9110 6.5.1: trailers are not merged into the headers

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise BadRequest(ErrorMessage.CONNECT)
        version = self.parser.get_http_version()
        if version not in VERSIONS or method in OTHER_PROTOCOLS:
            raise BadRequest(ErrorMessage.VERSION)
        if self.parser.should_upgrade():  # these headers will be read again
            return
        if self.raw_bytes > HEAD_BYTES:
            check_size(self.headers)
        fields = by_name(self.headers)
        check_framing(fields, version)
        self.url = origin_form(self.url, method, fields.get(b"host", b""))
        self.expect_100_continue = version == "1.1" and fields.get(b"expect", b"").lower() == b"100-continue"
        self.begin_request()

    def begin_request(self) -> None:
        self.cancel_timer()
        self.scope[ARRIVAL_TIME] = self.loop.time()  # type: ignore[typeddict-unknown-key]
        waiting = len(self.pipeline)
        super().on_headers_complete()
        if len(self.pipeline) == waiting:
            self.running = self.cycle
        self.in_body = True
        self.keeps_alive = self.cycle.keep_alive
        if self.expect_100_continue:  # answered before its body: nobody knows whether that will come
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self.raw_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self.in_body = False
        if self.expect_100_continue and not self.cycle.response_started:
            self.cycle.keep_alive = self.keeps_alive
        self.ended = not self.cycle.keep_alive

    # To the client

    def on_response_complete(self) -> None:
        following = self.pipeline[-1][0] if self.pipeline else self.running
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self.running = following
        if self.refusal is not None and not self.is_answering():
            self.end()

    def is_answering(self) -> bool:
        return self.running is not None and not self.running.response_complete

    def refuse(self, error: Exception) -> None:
        """Nothing more is read. A request that is broken off in its body gets the refusal as its answer, unless it has
        one already."""
        self.ended = True
        self.refusal = refusal(error)
        if self.in_body:
            self.give_up(self.cycle)
        if not self.is_answering():
            self.end()

    def give_up(self, cycle: RequestResponseCycle) -> None:
        if cycle.response_complete:
            self.refusal = b""
        elif cycle.response_started:
            self.transport.close()
        else:
            hang_up(cycle)
            self.pipeline = type(self.pipeline)(entry for entry in self.pipeline if entry[0] is not cycle)
            self.running = None if self.running is cycle else self.running

    def end(self) -> None:
        """Sends the refusal and closes this side; the other side is read on for a moment.

        A close with unread bytes would reset the connection before the client has read the refusal.
        """
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.cancel_timer()
        if self.refusal:
            self.transport.write(self.refusal)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.start_timer(LINGER_S)

    def start_timer(self, limit_s: float) -> None:
        self.timer = self.loop.call_later(limit_s, self.transport.close)

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def unmapped(address: str) -> str:
    """An IPv4 client's own address, which a socket of both families shows as ::ffff:192.0.2.1 (RFC 4291, 2.5.5.2)."""
    own = address.removeprefix(MAPPED)
    return own if own is not address and "." in own else address


def hang_up(cycle: RequestResponseCycle) -> None:
    """Tells a request's application that nobody waits for its answer."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()


def refusal(error: Exception) -> bytes:
    """The answer to bytes that are no request, in the error form. What is raised in a callback by anything but the two
    parsers and the checks below is a fault of the server: 500, and logged."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    if not isinstance(cause, Exception) or isinstance(cause, httptools.HttpParserError | UnicodeDecodeError):
        cause = BadRequest()
    response = error_handling.answer(cause)
    log.info("connection refused with %d: %s", response.status_code, error)
    lines = [*response.raw_headers, (b"cache-control", b"no-store"), (b"connection", b"close")]
    head = b"".join(b"%s: %s\r\n" % line for line in lines)
    phrase = HTTPStatus(response.status_code).phrase.encode()
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (response.status_code, phrase, head, bytes(response.body))


def head_without_upgrade(parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> bytes:
    """The head that a strict parser has just read, but for Upgrade. No field of it can hold a line break."""
    line = b"%s %s HTTP/%s\r\n" % (parser.get_method(), url, parser.get_http_version().encode())
    fields = (b"%s: %s\r\n" % field for field in headers if field[0] != b"upgrade")
    return line + b"".join(fields) + b"\r\n"


def by_name(headers: Headers) -> dict[bytes, bytes]:
    """The headers by name, equal ones joined as a list. Raises BadRequest if one that is no list comes twice."""
    fields = dict(headers)
    if len(fields) == len(headers):
        return fields
    fields.clear()
    for name, value in headers:
        if name in SINGLE_VALUED and name in fields:
            raise BadRequest(ErrorMessage.HEADER_TWICE)
        fields[name] = b"%s,%s" % (fields[name], value) if name in fields else value
    return fields


def check_size(headers: Headers) -> None:
    """Raises RequestHeaderFieldsTooLarge."""
    if sum(len(name) + len(value) for name, value in headers) > HEAD_BYTES:
        raise RequestHeaderFieldsTooLarge(limit=HEAD_BYTES)


def check_framing(fields: Mapping[bytes, bytes], version: str) -> None:
    """Raises BadRequest where two parsers could differ about whom a request is for, or where it ends."""
    coding = fields.get(b"transfer-encoding")
    if coding is not None and (coding.lower() != b"chunked" or b"content-length" in fields or version == "1.0"):
        raise BadRequest(ErrorMessage.FRAMING)
    host = fields.get(b"host", b"" if version == "1.0" else None)
    if host is None or not is_host(host):
        raise BadRequest(ErrorMessage.HOST)
    options = fields.get(b"connection", b"close")
    if options not in USUAL_OPTIONS and not SINGLE_VALUED.isdisjoint(
        option.strip() for option in options.lower().split(b",")
    ):
        raise BadRequest(ErrorMessage.FRAMING)


@lru_cache(maxsize=256)
def is_host(value: bytes) -> bool:
    return HOST.fullmatch(value) is not None


def origin_form(target: bytes, method: bytes, host: bytes) -> bytes:
    """The target's path and query. Raises BadRequest if it is for another host than the Host header says."""
    if target.startswith(b"/") and b"#" not in target:
        return target
    if target == b"*" and method == b"OPTIONS":
        return target
    absolute = ABSOLUTE.fullmatch(target)
    if absolute is None or absolute[1].lower() != host.lower():
        raise BadRequest(ErrorMessage.TARGET)
    rest = absolute[2]
    return rest if rest.startswith(b"/") else b"/" + rest
