"""The HTTP parser never leaves HTTP: one request has one answer however it is cut, and what is ambiguous is refused."""

import asyncio
import inspect
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.errors import ErrorMessage
from service.web.error_handling import ErrorMiddleware
from service.web.http_protocol import HEAD_BYTES, HttpProtocol
from tests.support.http_wire import (
    Answer,
    Wire,
    answer,
    byte_by_byte,
    chunked,
    converse,
    echo,
    hasty,
    make_protocol,
    post,
    random_cuts,
    read_answers,
    segmentations,
    settle,
    single_cuts,
    with_chunks,
    with_length,
)
from tests.support.planes import TOKEN, admin_app, behind_a_port, one_of_the_catalogue, png, public_app

BODY: Final = b"GET /smuggled HTTP/1.1\r\nhost: y\r\n\r\n"  # a parser that loses its place reads this as a request
NEXT: Final = with_length(b"next", target=b"/next")
UPGRADES: Final = {
    "curl --http2": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQC\r\n",
    "java": b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\nUpgrade: h2c\r\n",
    "websocket": b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n",
    "proxy-connection": b"upgrade: h2c\r\nproxy-connection: upgrade\r\n",
    "keep-alive too": b"connection: keep-alive\r\nconnection: Upgrade\r\nupgrade: TLS/1.0, h2c\r\n",
    "no option": b"upgrade: h2c\r\n",
    "no upgrade": b"connection: upgrade\r\n",
}


def read(wire: Wire) -> list[Answer]:
    """The answers, each of the echo in short: method, target, body."""
    return read_answers(wire.sent)


def short(response: Answer) -> tuple[str, str, str]:
    content = response.json()
    return content["method"], content["target"], content.get("body", "")


class TestUpgrade:
    @pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
    @pytest.mark.parametrize("framed", [with_length, with_chunks])
    def test_one_request_has_one_answer_and_its_whole_body_however_it_is_cut(
        self, upgrade: bytes, framed: Callable[[bytes, bytes], bytes]
    ) -> None:
        for segments in segmentations(framed(BODY, upgrade) + NEXT):
            wire = converse(segments)
            assert [short(response) for response in read(wire)] == [
                ("POST", "/", BODY.decode()),
                ("POST", "/next", "next"),
            ]
            assert not wire.ended

    @pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
    def test_without_a_body(self, upgrade: bytes) -> None:
        for segments in segmentations(b"GET /a HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n" + NEXT):
            assert [short(response)[:2] for response in read(converse(segments))] == [("GET", "/a"), ("POST", "/next")]

    def test_many_in_one_segment(self) -> None:
        upgrade = UPGRADES["websocket"]
        bodies = [b"%d" % number * (number % 7) for number in range(60)]
        sent = b"".join((with_length, with_chunks)[len(body) % 2](body, upgrade) for body in bodies)
        for segments in ([sent], byte_by_byte(sent), random_cuts(sent, random.Random(1), 40)):
            assert [short(response)[2].encode() for response in read(converse(segments))] == bodies

    def test_the_application_sees_every_header_but_upgrade_as_it_came(self) -> None:
        (response,) = read(
            converse([with_length(b"x", b"A: 1 \r\nupgrade: h2c\r\nconnection: upgrade\r\na:\t\xff2\r\n")])
        )
        assert response.json()["headers"] == [
            ["host", "x"],
            ["a", "1"],
            ["connection", "upgrade"],
            ["a", "\xff2"],
            ["content-length", "1"],
        ]

    def test_close_beside_upgrade_closes_and_what_follows_is_not_read(self) -> None:
        for segments in single_cuts(with_length(b"x", b"connection: upgrade, close\r\nupgrade: h2c\r\n") + NEXT):
            wire = converse(segments)
            assert [short(response)[1] for response in read(wire)] == ["/"]
            assert wire.closed


AMBIGUOUS: Final = {
    "connect": b"CONNECT x:80 HTTP/1.1\r\nhost: x:80\r\n\r\n",
    "connect with a body": b"CONNECT x:80 HTTP/1.1\r\nhost: x:80\r\ncontent-length: 3\r\n\r\nabc",
    "connect that asks for an upgrade": b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n" + UPGRADES["java"] + b"\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 in the request line": b"GET / HTTP/2.0\r\nhost: x\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nhost: x\r\n\r\n",
    "HTTP/0.9": b"GET /\r\nhost: x\r\n\r\n",
    "HTTP/0.9, said": b"GET / HTTP/0.9\r\nhost: x\r\n\r\n",
    "RTSP": b"DESCRIBE / RTSP/1.0\r\nhost: x\r\n\r\n",
    "Icecast": b"SOURCE / ICE/1.0\r\nhost: x\r\n\r\n",
    "both lengths": post(b"content-length: 3\r\ntransfer-encoding: chunked\r\n", chunked(b"abc")),
    "both lengths, turned": post(b"transfer-encoding: chunked\r\ncontent-length: 3\r\n", chunked(b"abc")),
    "unequal lengths": post(b"content-length: 3\r\ncontent-length: 4\r\n", b"abcd"),
    "equal lengths": post(b"content-length: 3\r\ncontent-length: 3\r\n", b"abc"),
    "a list of lengths": post(b"content-length: 3, 3\r\n", b"abc"),
    "a signed length": post(b"content-length: +3\r\n", b"abc"),
    "a negative length": post(b"content-length: -3\r\n", b"abc"),
    "a hexadecimal length": post(b"content-length: 0x3\r\n", b"abc"),
    "an empty length": post(b"content-length: \r\n", b"abc"),
    "a length over 64 bits": post(b"content-length: 18446744073709551619\r\n", b"abc"),
    "a length with a space before the colon": post(b"content-length : 3\r\n", b"abc"),
    "gzip, chunked": post(b"transfer-encoding: gzip, chunked\r\n", chunked(b"abc")),
    "chunked, gzip": post(b"transfer-encoding: chunked, gzip\r\n", chunked(b"abc")),
    "identity": post(b"transfer-encoding: identity\r\n", chunked(b"abc")),
    "chunked twice": post(b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", chunked(b"abc")),
    "chunked, chunked": post(b"transfer-encoding: chunked, chunked\r\n", chunked(b"abc")),
    "another coding before": post(b"transfer-encoding: x\r\ntransfer-encoding: chunked\r\n", chunked(b"abc")),
    "an empty coding before": post(b"transfer-encoding: , chunked\r\n", chunked(b"abc")),
    "no coding": post(b"transfer-encoding:\r\n", chunked(b"abc")),
    "xchunked": post(b"transfer-encoding: xchunked\r\n", chunked(b"abc")),
    "chunked in quotes": post(b'transfer-encoding: "chunked"\r\n', chunked(b"abc")),
    "chunked after a vertical tab": post(b"transfer-encoding: \x0bchunked\r\n", chunked(b"abc")),
    "chunks in HTTP/1.0": post(b"transfer-encoding: chunked\r\n", chunked(b"abc"), version=b"1.0"),
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n",
    "two hosts in one": b"GET / HTTP/1.1\r\nhost: x, y\r\n\r\n",
    "a host with a path": b"GET / HTTP/1.1\r\nhost: x/y\r\n\r\n",
    "another host in the target": b"GET http://y/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "a user in the target": b"GET http://y@x/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "a target of another scheme": b"GET ftp://x/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "a target without a slash": b"GET a HTTP/1.1\r\nhost: x\r\n\r\n",
    "a fragment": b"GET /a#b HTTP/1.1\r\nhost: x\r\n\r\n",
    "an asterisk that is not for OPTIONS": b"GET * HTTP/1.1\r\nhost: x\r\n\r\n",
    "a control byte in the target": b"GET /\x01 HTTP/1.1\r\nhost: x\r\n\r\n",
    "a byte over 127 in the target": b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    "a tab in the request line": b"GET\t/ HTTP/1.1\r\nhost: x\r\n\r\n",
    "a folded header": post(b"a: b\r\n c\r\n"),
    "a folded length": post(b"content-length:\r\n 3\r\n", b"abc"),
    "a folded coding": post(b"transfer-encoding:\r\n chunked\r\n", chunked(b"abc")),
    "a space before the first header": b"GET / HTTP/1.1\r\n host: x\r\n\r\n",
    "a bare LF after the request line": b"GET / HTTP/1.1\nhost: x\r\n\r\n",
    "a bare LF after a header": post(b"a: b\ncontent-length: 3\r\n", b"abc"),
    "a bare CR in a header": post(b"a: b\rcontent-length: 3\r\n", b"abc"),
    "a bare CR at the end of the headers": post(b"a: b\r\n\rX"),
    "a bare LF at the end of the headers": b"GET / HTTP/1.1\r\nhost: x\r\n\n",
    "a NUL in a value": post(b"a: b\0c\r\n"),
    "a NUL in a name": post(b"a\0: b\r\n"),
    "a control byte in a value": post(b"a: b\x7fc\r\n"),
    "a header without a colon": post(b"a\r\n"),
    "a header without a name": post(b": a\r\n"),
    "content-length as a connection option": post(b"connection: content-length\r\ncontent-length: 3\r\n", b"abc"),
    "transfer-encoding as a connection option": post(b"connection: close, Transfer-Encoding\r\n", b""),
    "host as a connection option": post(b"connection: host\r\n"),
}
"""Heads that two parsers have been known to read differently, or in a mode that is not HTTP/1.1."""

BROKEN_CHUNKS: Final = {
    "a bare LF after the size": b"3\nabc\r\n0\r\n\r\n",
    "a bare LF in an extension": b"3;a\nabc\r\n0\r\n\r\n",
    "a bare CR in a quoted extension": b'3;a="b\rc"\r\nabc\r\n0\r\n\r\n',
    "a NUL in an extension": b"3;a\0\r\nabc\r\n0\r\n\r\n",
    "a space after the size": b"3 \r\nabc\r\n0\r\n\r\n",
    "a signed size": b"+3\r\nabc\r\n0\r\n\r\n",
    "a size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a size over 64 bits": b"10000000000000003\r\nabc\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "more than the size": b"3\r\nabcd\r\n0\r\n\r\n",
    "less than the size": b"3\r\nab\r\n0\r\n\r\n",
    "no line end after a chunk": b"3\r\nabc0\r\n\r\n",
    "a bare LF after a chunk": b"3\r\nabc\n0\r\n\r\n",
    "a bare LF at the end": b"3\r\nabc\r\n0\r\n\n",
    "a length in the trailers": b"3\r\nabc\r\n0\r\ncontent-length: 3\r\n\r\n",
    "a coding in the trailers": b"3\r\nabc\r\n0\r\ntransfer-encoding: chunked\r\n\r\n",
    "close in the trailers": b"3\r\nabc\r\n0\r\na: b\r\nConnection: close\r\n\r\n",
    "an upgrade in the trailers": b"3\r\nabc\r\n0\r\nUpgrade: h2c\r\n\r\n",
    "a host in the trailers": b"3\r\nabc\r\n0\r\nhost: y\r\na: b\r\n\r\n",
    "a folded trailer": b"3\r\nabc\r\n0\r\na: b\r\n c\r\n\r\n",
}


def refused_once(wire: Wire, before: int = 0) -> Answer:
    """Checks that the last of before + 1 answers is a 400 in the error form that ends the connection."""
    answers = read(wire)
    assert [each.status for each in answers] == [200] * before + [400]
    assert set(answers[-1].json()) == {"error"}
    assert one_of_the_catalogue(answers[-1].json()["error"])
    assert answers[-1].headers["connection"] == "close"
    assert answers[-1].headers["content-type"] == "application/json"
    assert wire.ended
    return answers[-1]


class TestAmbiguity:
    @pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS)
    def test_it_is_refused_and_nothing_after_it_is_read(self, head: bytes) -> None:
        sent = head + NEXT
        cuts = [[sent], byte_by_byte(sent), *(random_cuts(sent, random.Random(seed)) for seed in range(10))]
        assert len({refused_once(converse(segments)).body for segments in cuts}) == 1

    @pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS)
    def test_it_is_refused_in_the_same_words_when_it_asks_for_an_upgrade(self, head: bytes) -> None:
        line, end, rest = head.partition(b"\r\n")
        for segments in (
            [line + end + UPGRADES["java"] + rest + NEXT],
            byte_by_byte(line + end + UPGRADES["java"] + rest),
        ):
            assert refused_once(converse(segments)).body == refused_once(converse([head])).body

    @pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS)
    def test_after_another_request_it_is_refused_after_that_one_s_answer(self, head: bytes) -> None:
        for segments in ([NEXT + head + NEXT], byte_by_byte(NEXT + head + NEXT)):
            refused_once(converse(segments), before=1)

    @pytest.mark.parametrize("body", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
    @pytest.mark.parametrize("upgrade", [b"", UPGRADES["websocket"]], ids=["", "upgrade"])
    def test_a_broken_body_is_refused_instead_of_answered(self, body: bytes, upgrade: bytes) -> None:
        sent = post(b"transfer-encoding: chunked\r\n" + upgrade, body + NEXT)
        for segments in ([sent], byte_by_byte(sent), *(random_cuts(sent, random.Random(seed)) for seed in range(10))):
            refused_once(converse(segments))
            refused_once(converse([NEXT + segments[0], *segments[1:]]), before=1)

    @pytest.mark.parametrize("body", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
    def test_a_broken_body_of_a_request_that_has_its_answer_gets_no_second_one(self, body: bytes) -> None:
        head = post(b"transfer-encoding: chunked\r\n")
        wire = converse([head, body + NEXT], hasty)
        assert [response.status for response in read(wire)] == [200]
        assert wire.ended

    def test_a_broken_body_that_comes_uninvited_is_not_invited_after_its_refusal(self) -> None:
        """The application asks for the body only after all of the segment has been read."""
        sent = post(b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n", b"3\r\nabcX")
        wire = converse([sent])
        refused_once(wire)
        assert b"100 Continue" not in wire.sent

    def test_a_broken_body_of_a_request_that_waits_for_its_turn_is_refused_in_turn(self) -> None:
        async def run() -> Wire:
            release, wire = asyncio.Event(), Wire()

            async def slow(scope: Scope, receive: Receive, send: Send) -> None:
                await release.wait()
                await echo(scope, receive, send)

            protocol = make_protocol(slow, wire)
            protocol.data_received(NEXT + post(b"transfer-encoding: chunked\r\n", b"3\r\nab"))
            await settle(protocol)
            protocol.data_received(b"cX" + NEXT)
            await settle(protocol)
            assert wire.sent == b""
            release.set()
            await settle(protocol)
            protocol.connection_lost(None)
            return wire

        refused_once(asyncio.run(run()), before=1)

    def test_an_answer_that_has_begun_when_its_body_breaks_is_cut_off(self) -> None:
        async def early(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            while (await receive())["type"] == "http.request":
                pass

        wire = converse([post(b"transfer-encoding: chunked\r\n"), b"3\r\nabcX"], early)
        assert wire.sent.count(b"HTTP/1.1 ") == 1
        assert wire.sent.endswith(b"half")
        assert wire.closed

    def test_the_application_of_a_broken_request_is_told_that_nobody_waits(self) -> None:
        heard: list[str] = []

        async def listening(scope: Scope, receive: Receive, send: Send) -> None:
            while not heard or heard[-1] == "http.request":
                heard.append((await receive())["type"])
            await answer(send, "too late")

        refused_once(converse([post(b"transfer-encoding: chunked\r\n"), b"3\r\nabc\r\n", b"X"], listening))
        assert heard[-1] == "http.disconnect"


class TestHttp:
    """What must go on working, read as RFC 9112 has it."""

    @pytest.mark.parametrize(
        ("sent", "expected"),
        [
            (b"GET http://x/a?b HTTP/1.1\r\nhost: X\r\n\r\n", ("GET", "/a?b", "")),
            (b"GET HTTP://x HTTP/1.1\r\nhost: x\r\n\r\n", ("GET", "/", "")),
            (b"GET http://x?b HTTP/1.1\r\nhost: x\r\n\r\n", ("GET", "/?b", "")),
            (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", ("OPTIONS", "*", "")),
            (b"GET /a HTTP/1.1\r\nhost:\r\n\r\n", ("GET", "/a", "")),
            (b"GET /a HTTP/1.1\r\nhost: [::1]:8000\r\n\r\n", ("GET", "/a", "")),
            (b"\r\n\r\nGET /a HTTP/1.1\r\nhost: x\r\n\r\n", ("GET", "/a", "")),
            (post(b"content-length: \t3 \t\r\n", b"abc"), ("POST", "/", "abc")),
            (post(b"content-length: 0003\r\n", b"abc"), ("POST", "/", "abc")),
            (post(b"Transfer-Encoding: Chunked \r\n", chunked(b"abc")), ("POST", "/", "abc")),
            (post(b"transfer-encoding: chunked\r\n", chunked(b"abc", None, b';a=b;c="d"')), ("POST", "/", "abc")),
            (post(b"transfer-encoding: chunked\r\n", b"0003\r\nabc\r\n000\r\n\r\n"), ("POST", "/", "abc")),
        ],
    )
    def test_unusual_requests_are_read(self, sent: bytes, expected: tuple[str, str, str]) -> None:
        for segments in segmentations(sent + NEXT):
            assert [short(response) for response in read(converse(segments))] == [expected, ("POST", "/next", "next")]

    def test_optional_space_is_no_part_of_a_value(self) -> None:
        """Content-Length: "3 " is a number."""
        (response,) = read(converse([post(b"content-length: 3 \t\r\nx:  y z  \r\n", b"abc")]))
        assert response.json()["headers"][1:] == [["content-length", "3"], ["x", "y z"]]

    def test_trailers_are_no_headers(self) -> None:
        """RFC 9110 6.5.1. A trailer named like a header that a proxy sets would stand beside the proxy's own."""
        trailers = b"x-api-key: stolen\r\nauthorization: Bearer stolen\r\nx-forwarded-for: 127.0.0.1\r\n"
        sent = post(b"transfer-encoding: chunked\r\n", chunked(b"abc", trailers=trailers)) + NEXT
        for segments in segmentations(sent):
            wire = converse(segments)
            first, second = read(wire)
            assert [name for name, _ in first.json()["headers"]] == ["host", "transfer-encoding"]
            assert (short(first)[2], short(second)[2]) == ("abc", "next")
            assert not wire.ended

    def test_http_1_0_closes_after_one_answer_without_interim_ones(self) -> None:
        sent = post(b"content-length: 3\r\nexpect: 100-continue\r\nconnection: keep-alive\r\n", b"abc", version=b"1.0")
        for segments in single_cuts(sent + NEXT):
            wire = converse(segments)
            assert wire.sent.startswith(b"HTTP/1.1 200 ")
            assert [short(response)[2] for response in read(wire)] == ["abc"]
            assert wire.closed

    def test_http_1_0_needs_no_host(self) -> None:
        assert [response.status for response in read(converse([b"GET / HTTP/1.0\r\n\r\n"]))] == [200]

    @pytest.mark.parametrize("after", [NEXT, b"nonsense\r\n\r\n", b"\r\n", BODY])
    def test_after_the_last_request_nothing_is_read(self, after: bytes) -> None:
        for segments in single_cuts(with_length(b"last", b"connection: close\r\n") + after):
            wire = converse(segments)
            assert [short(response)[2] for response in read(wire)] == ["last"]
            assert wire.closed

    def test_a_body_that_was_invited_keeps_the_connection(self) -> None:
        head, body = with_length(b"abc", b"expect: 100-continue\r\n")[:-3], b"abc"
        wire = converse([head, body, NEXT])
        assert wire.sent.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert [short(response)[2] for response in read(wire)] == ["abc", "next"]
        assert not wire.ended
        wire = converse([head + body + NEXT])
        assert [short(response)[2] for response in read(wire)] == ["abc", "next"]

    def test_a_body_that_was_not_invited_may_never_come_so_the_answer_ends_the_connection(self) -> None:
        """The client need not send the body after a final answer; what it sends next could be either."""
        wire = converse([with_length(b"abc", b"expect: 100-continue\r\n")[:-3], NEXT], hasty)
        (response,) = read(wire)
        assert response.headers["connection"] == "close"
        assert wire.closed

    @pytest.mark.parametrize("piece", [b"a" * 1000, b"a: b\r\n" * 100], ids=["one header", "many"])
    def test_a_head_without_end_is_refused(self, piece: bytes) -> None:
        start = b"GET / HTTP/1.1\r\nhost: x\r\n" + (b"b: " if b":" not in piece else b"")
        wire = converse([start, *[piece] * 2000])
        (response,) = read(wire)
        assert response.status == 431
        assert str(HEAD_BYTES) in response.json()["error"]
        assert wire.ended

    def test_a_head_at_the_limit_is_read_and_one_byte_more_refused_however_it_is_cut(self) -> None:
        for size, status in ((HEAD_BYTES - len("host") - 2, 200), (HEAD_BYTES - len("host") - 1, 431)):
            sent = b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * size + b"\r\n\r\n"
            for segments in ([sent], [sent[:100], sent[100:]], [sent[i : i + 999] for i in range(0, len(sent), 999)]):
                assert [response.status for response in read(converse(segments))] == [status]

    @pytest.mark.parametrize("start", [b"0\r\na: ", b"3;a="], ids=["trailers", "a chunk's extension"])
    def test_neither_trailers_nor_extensions_may_go_on_for_good(self, start: bytes) -> None:
        wire = converse([post(b"transfer-encoding: chunked\r\n", start), *[b"a" * 1000] * 2000])
        assert [response.status for response in read(wire)] == [431]

    def test_a_large_body_is_no_large_head(self) -> None:
        body = b"a" * (8 * HEAD_BYTES)
        sent = with_length(body)
        (response,) = read(converse([sent[i : i + 50_000] for i in range(0, len(sent), 50_000)]))
        assert short(response)[2] == body.decode()


def test_who_hangs_up_is_noticed_by_the_request_being_answered_though_another_waits() -> None:
    heard: list[str] = []

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        while not heard or heard[-1] == "http.request":
            heard.append((await receive())["type"])

    converse([with_length(b"a") + NEXT], listening)
    assert heard[-1] == "http.disconnect"


def test_an_exception_of_our_own_in_a_callback_is_a_500_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("missing")

    monkeypatch.setattr("service.web.http_protocol.check_framing", fail)
    (response,) = read(converse([NEXT]))
    assert response.status == 500
    assert response.json() == {"error": ErrorMessage.FAILED}
    assert any("KeyError" in record.getMessage() for record in caplog.records)


# uvicorn's private parts: each is used by service/web/http_protocol.py, and pyproject.toml bounds uvicorn for them

CONNECTION: Final = ("cycle", "flow", "headers", "loop", "parser", "pipeline", "scope", "tasks", "transport", "url")
CYCLE: Final = (
    "disconnected",
    "keep_alive",
    "message_event",
    "response_complete",
    "response_started",
    "waiting_for_100_continue",
)


@contextmanager
def a_connection_in_use() -> Iterator[HttpProtocol]:
    protocols: list[HttpProtocol] = []

    async def run() -> None:
        protocol = make_protocol(echo, Wire())
        protocol.data_received(NEXT)
        await settle(protocol)
        protocols.append(protocol)

    asyncio.run(run())
    yield protocols[0]


@pytest.mark.parametrize("name", [*CONNECTION, "expect_100_continue", "timeout_keep_alive_task"])
def test_uvicorn_s_connection_has_what_ours_relies_on(name: str) -> None:
    with a_connection_in_use() as protocol:
        assert vars(protocol)[name] is not None


@pytest.mark.parametrize("name", CYCLE)
def test_uvicorn_s_request_has_what_ours_relies_on(name: str) -> None:
    with a_connection_in_use() as protocol:
        assert isinstance(protocol.cycle, RequestResponseCycle)
        assert vars(protocol.cycle)[name] is not None


@pytest.mark.parametrize("name", ["_unset_keepalive_if_required", "on_response_complete", "on_message_complete"])
def test_uvicorn_s_connection_does_what_ours_relies_on(name: str) -> None:
    method = getattr(HttpProtocol.__mro__[1], name)
    assert list(inspect.signature(method).parameters) == ["self"]


def test_a_pipelined_request_waits_in_uvicorn_s_pipeline_with_its_application() -> None:
    async def run() -> None:
        release = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await echo(scope, receive, send)

        protocol = make_protocol(slow, Wire())
        protocol.data_received(NEXT * 3)
        await settle(protocol)
        assert [entry[0].scope["path"] for entry in protocol.pipeline] == ["/next", "/next"]
        assert protocol.pipeline[0][0] is protocol.cycle
        assert protocol.running not in [entry[0] for entry in protocol.pipeline]
        release.set()
        await settle(protocol)

    asyncio.run(run())


# Both planes, over real sockets


@pytest.fixture(scope="module", params=["public", "admin"])
def plane(request: pytest.FixtureRequest) -> Iterator[tuple[str, bytes, bytes, list[bytes]]]:
    """Address, target, headers that let one in, and bodies."""
    if request.param == "public":
        with behind_a_port(public_app()) as address:
            yield address, b"/v1/classify", b"", [png(12 + 25 * index) for index in range(10)]
    else:
        with behind_a_port(admin_app()) as address:
            yield address, b"/admin/library", b"authorization: Bearer %s\r\n" % TOKEN.encode(), [BODY] * 10


def dialogue(address: str, segments: list[bytes], answers: int, pause_s: float = 0.0) -> list[Answer]:
    """Sends each segment as a packet of its own, and reads until that many answers are there or the other end closes;
    then for a moment longer, for an answer too many."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for segment in segments:
            connection.sendall(segment)
            time.sleep(pause_s)
        received = b""
        while received.count(b"HTTP/1.1 ") < answers and (part := connection.recv(65536)):
            received += part
        connection.settimeout(0.2)
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
    return read_answers(received)


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("framed", [with_length, with_chunks])
def test_both_planes_ignore_upgrades(
    plane: tuple[str, bytes, bytes, list[bytes]], upgrade: bytes, framed: Callable[..., bytes]
) -> None:
    address, target, access, bodies = plane
    requests = [framed(body, access + upgrade, target) for body in bodies]
    together, first = b"".join(requests), requests[0]
    head = first.index(b"\r\n\r\n") + 4
    for segments, answers, pause_s in (
        ([together], 10, 0.0),
        ([first[:head], first[head:]], 1, 0.02),
        (random_cuts(together, random.Random(0), 20), 10, 0.003),
        (byte_by_byte(first), 1, 0.0003),
    ):
        responses = dialogue(address, segments, answers, pause_s)
        assert [each.status for each in responses] == [200] * answers
        if target == b"/v1/classify":
            assert [each.json()["predictions"][0]["index"] for each in responses] == list(range(answers))


@pytest.mark.parametrize("head", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_both_planes_refuse_what_is_ambiguous(plane: tuple[str, bytes, bytes, list[bytes]], head: bytes) -> None:
    address, target, access, bodies = plane
    good = with_length(bodies[0], access, target)
    assert [response.status for response in dialogue(address, [good + head + good], 2)] == [200, 400]


def test_a_refusal_can_be_read_by_a_client_that_is_still_sending(
    plane: tuple[str, bytes, bytes, list[bytes]],
) -> None:
    """Closing at once would reset the connection, and with it the refusal."""
    for _ in range(5):
        sent = [AMBIGUOUS["both lengths"], *[bytes(100_000)] * 20]
        assert [response.status for response in dialogue(plane[0], sent, 1)] == [400]


@pytest.mark.parametrize("framed", [with_length, with_chunks])
def test_an_error_about_a_body_can_be_read_by_a_client_that_is_still_sending_it(framed: Callable[..., bytes]) -> None:
    """The error middleware reads on for a moment after such an answer, and no request may follow on the connection."""
    public, admin = public_app(max_body_bytes=2048), admin_app()
    token = b"authorization: Bearer %s\r\n" % TOKEN.encode()
    for app, target, access in ((public, b"/v1/classify", b""), (admin, b"/admin/audits", token)):
        with behind_a_port(app) as address:
            for _ in range(5):
                (response,) = dialogue(address, [framed(bytes(4_000_000), access, target)], 1)
                assert (response.status, response.headers["connection"]) == (413, "close")


def test_every_other_exception_leaves_the_connection_to_the_next_request() -> None:
    """Errors of others do not say whether a connection can be used again: it can."""

    async def failing(_: Scope, __: Receive, ___: Send) -> None:
        raise KeyError("anything")

    wire = converse([NEXT, NEXT], ErrorMiddleware(failing))
    assert [response.status for response in read_answers(wire.sent)] == [500, 500]
    assert not wire.closed
