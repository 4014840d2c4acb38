"""The public plane's own protocol: what it answers, how much it says, and every refusal."""

import asyncio
import base64
import gzip
import hashlib
import json
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from model_store.input_spec import CIFAR10_INPUT
from service.errors import (
    BadRequest,
    ContentTooLarge,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    ErrorMessage,
    Overloaded,
    RateLimited,
    ServiceError,
)
from service.observability.metrics import Metrics
from service.web.body import Inflater, inflate
from service.web.routing import ARRIVAL_TIME
from tests.support.planes import DIGEST, Oracle, StandIn, ask, encoded, picture, png, public_app, refused
from tests.support.tickets import CLASSES

PATH: Final = "/v1/classify"


def base64_json(*files: bytes) -> dict[str, Any]:
    return {"images": [base64.b64encode(file).decode() for file in files]}


BASE64_FORMS: Final[dict[str, Callable[[bytes], str]]] = {
    "lines of 76": lambda file: base64.encodebytes(file).decode(),
    "lines of Windows": lambda file: base64.encodebytes(file).decode().replace("\n", "\r\n"),
    "other alphabet": lambda file: base64.urlsafe_b64encode(file).decode(),
    "no padding": lambda file: base64.b64encode(file).decode().rstrip("="),
    "a token": lambda file: base64.urlsafe_b64encode(file).decode().rstrip("="),
    "data URL": lambda file: "data:image/png;base64," + base64.b64encode(file).decode(),
    "data URL without a type": lambda file: "data:;base64," + base64.b64encode(file).decode(),
    "data URL with parameters": lambda file: (
        "DATA:image/png;name=a%20b;Base64,\n" + base64.encodebytes(file).decode().rstrip("=\n")
    ),
    "data URL in percents": lambda file: "data:image/webp;base64," + quote(base64.b64encode(file).decode(), safe=""),
}


def classify(content: bytes = b"", **request: Any) -> httpx.Response:
    return ask(public_app(), "POST", PATH, content=content or png(110), **request)


class TestAnswers:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            "image/png",
            "image/whatever",
            "application/octet-stream",
            "binary/octet-stream",
            "application/x-octet-stream",
            "Application/Octet-Stream; charset=binary",
            "application/binary",
            "application/x-www-form-urlencoded",
        ],
    )
    def test_the_bytes_decide_what_an_image_is(self, kind: str, content_type: str | None) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        response = classify(encoded(picture(110), kind), headers=headers)
        assert response.status_code == 200
        assert response.json()["predictions"][0]["label"] == "deer"

    def test_the_whole_form(self) -> None:
        response = classify(png(110))
        content = response.json()
        assert list(content) == ["request_id", "library", "predictions"]
        assert content["library"] == DIGEST
        assert content["request_id"] == response.headers["x-request-id"]
        (prediction,) = content["predictions"]
        assert list(prediction) == ["label", "index", "probability", "top"]
        assert (prediction["label"], prediction["index"], prediction["probability"]) == ("deer", 4, 0.62)
        assert [sorted(entry) for entry in prediction["top"]] == [["index", "label", "probability"]] * 5
        assert prediction["top"][0] == {"label": "deer", "index": 4, "probability": 0.62}
        shown = [entry["probability"] for entry in prediction["top"]]
        assert shown == sorted(shown, reverse=True)
        assert shown == [round(value, 2) for value in shown]

    def test_json_of_several_images_in_order(self) -> None:
        reds = [235, 10, 60]
        kinds = ("application/json; charset=utf-8", "text/json", "application/vnd.example+json", "binary/octet-stream")
        for headers in ({}, *({"content-type": kind} for kind in kinds)):
            body = json.dumps(base64_json(*map(png, reds))).encode()
            predictions = classify(body, headers=headers).json()["predictions"]
            assert [prediction["index"] for prediction in predictions] == [9, 0, 2]

    @pytest.mark.parametrize("content_type", [None, "application/json"])
    @pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\n "])
    def test_json_may_begin_with_a_byte_order_mark(self, start: bytes, content_type: str | None) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        response = classify(start + json.dumps(base64_json(png(110))).encode(), headers=headers)
        assert response.json()["predictions"][0]["index"] == 4

    @pytest.mark.parametrize("form", BASE64_FORMS)
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_base64_in_its_usual_forms(self, kind: str, form: str) -> None:
        for size in (30, 31, 32):  # so that every number of padding characters occurs
            text = BASE64_FORMS[form](encoded(picture(110, (size, size)), kind))
            response = classify(json.dumps({"images": [text]}).encode())
            assert response.status_code == 200, response.text
            assert response.json()["predictions"][0]["index"] == 4

    def test_every_request_has_an_id_of_its_own_whatever_the_client_sends(self) -> None:
        ids = {classify(headers={"x-request-id": "mine"}).headers["x-request-id"] for _ in range(20)}
        assert len(ids) == 20
        assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in ids)

    def test_nothing_may_be_stored_and_equal_images_are_asked_again(self) -> None:
        manager = StandIn()
        app = public_app(manager)
        for _ in range(3):
            assert ask(app, "POST", PATH, content=png()).headers["cache-control"] == "no-store"
        assert len(manager.scheduler.rows) == 3

    def test_a_request_keeps_the_library_it_began_with(self) -> None:
        class Swapping(StandIn):
            @property
            def current(self) -> StandIn:
                fields = {"classes": CLASSES, "digest": next(digests), "input": CIFAR10_INPUT}
                return StandIn(library=type("Library", (), fields)())

        digests = iter(["first", "second"])
        answer = ask(public_app(Swapping()), "POST", PATH, content=png()).json()
        assert answer["library"] == "first"


class TestDetail:
    def test_label_says_nothing_else(self) -> None:
        predictions = ask(public_app(output_detail="label"), "POST", PATH, content=png(110)).json()["predictions"]
        assert predictions == [{"label": "deer", "index": 4}]

    def test_full_says_all_digits(self) -> None:
        (prediction,) = ask(public_app(output_detail="full"), "POST", PATH, content=png(110)).json()["predictions"]
        assert abs(prediction["probability"] - 0.6172) < 1e-6

    def test_top_is_as_long_as_set_and_never_longer_than_the_classes(self) -> None:
        for top, expected in ((1, 1), (3, 3), (1000, 10)):
            (prediction,) = ask(public_app(top_k=top), "POST", PATH, content=png(110)).json()["predictions"]
            assert len(prediction["top"]) == expected


class TestHealth:
    def test_live_whatever_happens_and_ready_as_the_holder_says(self) -> None:
        for manager in (StandIn(ready=False), StandIn(ready=False, loaded=False)):
            app = public_app(manager)
            assert ask(app, "GET", "/health/live").json() == {"live": True}
            response = ask(app, "GET", "/health/ready")
            refused(response, 503, ErrorMessage.NOT_READY)
            assert int(response.headers["retry-after"]) >= 1
        assert ask(public_app(), "GET", "/health/ready").json() == {"ready": True}

    def test_before_the_first_library_there_is_no_answer(self) -> None:
        refused(ask(public_app(StandIn(loaded=False)), "POST", PATH, content=png()), 503, ErrorMessage.NOT_READY)


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "content_type", "status", "text"),
        [
            (b"", None, 400, ErrorMessage.EMPTY_BODY),
            (b"hello", None, 415, ErrorMessage.BODY_NEITHER),
            (b"hello", "image/png", 415, ErrorMessage.IMAGE_FORMAT),
            (encoded(picture(), "GIF"), "image/gif", 415, ErrorMessage.IMAGE_FORMAT),
            (png()[:60], "image/png", 400, ErrorMessage.IMAGE_DAMAGED),
            (png(size=(2500, 2500)), "image/png", 413, ErrorMessage.IMAGE_TOO_LARGE),
            (png(), "application/json", 400, ErrorMessage.JSON_MALFORMED),
            (b"{", "application/json", 400, ErrorMessage.JSON_MALFORMED),
            (b'{"images": ["aaaa"', None, 400, ErrorMessage.JSON_MALFORMED),
            (b"[1]", "application/json", 400, ErrorMessage.JSON_OBJECT),
            (b"{}", None, 400, ErrorMessage.JSON_IMAGES),
            (b'{"images": []}', None, 400, ErrorMessage.JSON_IMAGES),
            (b'{"images": "aaaa"}', None, 400, ErrorMessage.JSON_IMAGES),
            (b'{"images": [1]}', None, 400, ErrorMessage.JSON_IMAGES),
            (b'{"images": ["aaaa"], "seed": 1}', None, 400, ErrorMessage.JSON_IMAGES),
            (b'{"images": ["a*a="]}', None, 400, ErrorMessage.BASE64),
            (b'{"images": ["aaaaa"]}', None, 400, ErrorMessage.BASE64),
            (b'{"images": ["aa==aa=="]}', None, 400, ErrorMessage.BASE64),
            (b'{"images": ["data:image/png,aaaa"]}', None, 400, ErrorMessage.BASE64),
            (b'{"images": ["data:image/png;base64,%00aaa"]}', None, 400, ErrorMessage.BASE64),
            (b'{"images": ["data:image/png;base64"]}', None, 400, ErrorMessage.BASE64),
            (b'{"images": ["data:image/png;base64,"]}', None, 400, ErrorMessage.IMAGE_EMPTY),
            ('{"images": ["aaaé"]}'.encode(), None, 400, ErrorMessage.BASE64),
            (b'{"images": [""]}', None, 400, ErrorMessage.IMAGE_EMPTY),
            (b'{"images": ["aGVsbG8="]}', None, 415, ErrorMessage.IMAGE_FORMAT),
            (png(), "text/plain", 415, ErrorMessage.BODY_TYPE),
            (png(), "multipart/form-data; boundary=x", 400, ErrorMessage.MULTIPART),
            (b"hello", "text/plain", 415, ErrorMessage.BODY_TYPE),
            (b'{"images": ["aaaa"]}', "text/plain", 415, ErrorMessage.JSON_TYPE),
            (b'\xef\xbb\xbf {"images": ["aaaa"]}', "text/plain; charset=utf-8", 415, ErrorMessage.JSON_TYPE),
            (b'\r\n[{"b64": "aaaa"}]', "text/html", 415, ErrorMessage.JSON_TYPE),
            (b"[1]", None, 400, ErrorMessage.JSON_OBJECT),
            (b'\xff\xfe{\0"\0', "application/json", 400, ErrorMessage.JSON_MALFORMED),
        ],
    )
    def test_wrong_content(self, content: bytes, content_type: str | None, status: int, text: ErrorMessage) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        refused(ask(public_app(), "POST", PATH, content=content, headers=headers), status, text)

    def test_too_many_images_and_bodies_too_large(self) -> None:
        body = json.dumps(base64_json(*[png()] * 4)).encode()
        refused(ask(public_app(max_images=3), "POST", PATH, content=body), 413, ErrorMessage.IMAGES_TOO_MANY)
        response = ask(public_app(max_body_bytes=1024), "POST", PATH, content=png() + bytes(1024))
        assert "1024 bytes" in refused(response, 413, ErrorMessage.BODY_TOO_LARGE)
        assert response.headers["connection"] == "close"

    def test_a_body_without_length_is_measured_as_it_comes(self) -> None:
        taken = []

        async def endless() -> AsyncIterator[bytes]:
            while True:
                taken.append(1)
                yield bytes(500)

        refused(ask(public_app(max_body_bytes=2000), "POST", PATH, content=endless()), 413, ErrorMessage.BODY_TOO_LARGE)

    def test_a_body_in_pieces_is_put_together(self) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for byte in png(110):
                yield bytes([byte])

        assert ask(public_app(), "POST", PATH, content=pieces()).json()["predictions"][0]["index"] == 4

    def test_no_more_bodies_are_held_than_allowed(self) -> None:
        metrics = Metrics()
        app = public_app(metrics=metrics, max_body_bytes=1024, body_memory_bytes=1024)

        async def two() -> tuple[httpx.Response, httpx.Response]:
            started, go = asyncio.Event(), asyncio.Event()

            async def slow() -> AsyncIterator[bytes]:
                yield png(110)
                yield bytes(800)
                started.set()
                await go.wait()

            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://tombola") as client:
                first = asyncio.ensure_future(client.post(PATH, content=slow()))
                await started.wait()
                second = await client.post(PATH, content=png(110) + bytes(400))
                go.set()
                return await first, second

        first, second = asyncio.run(two())
        assert first.status_code == 200
        refused(second, 503, ErrorMessage.BODIES_FULL)
        assert second.headers["retry-after"] == "1"
        assert metrics.value("shed_total", reason="body") == 1
        assert metrics.value("http_body_memory_bytes") == 0
        assert ask(app, "POST", PATH, content=png(110)).status_code == 200

    def test_a_slow_body(self) -> None:
        async def slow() -> AsyncIterator[bytes]:
            yield png()[:10]
            await asyncio.sleep(30)

        response = ask(public_app(body_timeout_s=0.05), "POST", PATH, content=slow())
        refused(response, 408, ErrorMessage.BODY_SLOW)
        assert response.headers["connection"] == "close"

    def test_paths_and_methods(self) -> None:
        app = public_app()
        refused(ask(app, "GET", "/nothing/here"), 404, ErrorMessage.NOT_FOUND)
        refused(ask(app, "POST", PATH + "/"), 404, ErrorMessage.NOT_FOUND)
        response = ask(app, "GET", PATH)
        refused(response, 405, ErrorMessage.METHOD)
        assert response.headers["allow"] == "POST, PUT"

    def test_admin_calls_are_not_there(self) -> None:
        for method, path in (
            ("GET", "/metrics"),
            ("GET", "/admin/library"),
            ("POST", "/admin/library"),
            ("GET", "/admin/policy"),
            ("POST", "/admin/audits"),
        ):
            refused(ask(public_app(), method, path), 404, ErrorMessage.NOT_FOUND)

    def test_a_key_for_repeating_a_request_is_declined(self) -> None:
        refused(classify(headers={"idempotency-key": "x"}), 400, ErrorMessage.IDEMPOTENCY)

    @pytest.mark.parametrize(
        ("error", "status", "pause"),
        [
            (Overloaded(retry_after=7), 503, "7"),
            (Overloaded(), 503, "1"),
            (Draining(), 503, "1"),
            (RateLimited(retry_after=3), 429, "3"),
            (DeadlineExceeded(), 504, None),
            (EngineFailed(), 500, None),
        ],
    )
    def test_what_the_scheduler_refuses(self, error: ServiceError, status: int, pause: str | None) -> None:
        metrics = Metrics()
        response = ask(public_app(StandIn(Oracle(error)), metrics), "POST", PATH, content=png())
        refused(response, status, error.text)
        assert response.headers.get("retry-after") == pause
        assert metrics.value("inference_requests_total", outcome=error.outcome) == 1

    @pytest.mark.parametrize("body", [png()[:-20], b'{"images": [', b"nothing"])
    def test_what_is_refused_is_not_looked_at_first(self, body: bytes) -> None:
        """The body is damaged, and nobody finds out."""
        metrics = Metrics()
        app = public_app(StandIn(Oracle(full=Overloaded(retry_after=2))), metrics)
        refused(ask(app, "POST", PATH, content=body), 503, Overloaded.text)
        assert metrics.value("inference_requests_total", outcome="shed") == 1

    def test_the_deadline_counts_from_when_the_loop_had_read_the_headers(self) -> None:
        oracle = Oracle()
        app = public_app(StandIn(oracle), deadline_s=10)

        async def late(scope: Scope, receive: Receive, send: Send) -> None:
            scope[ARRIVAL_TIME] = asyncio.get_running_loop().time() - 3
            await app(scope, receive, send)

        assert ask(late, "POST", PATH, content=png()).status_code == 200
        assert 6 < oracle.deadlines[0] <= 7

    def test_an_unexpected_exception_is_a_500_that_says_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        secret = "members (3, 17) of /srv/library/tickets/resnet18-07"
        metrics = Metrics()
        for error in (ValueError(secret), KeyError(secret), MemoryError(secret), ExceptionGroup(secret, [OSError()])):
            response = ask(public_app(StandIn(Oracle(error)), metrics), "POST", PATH, content=png())
            assert refused(response, 500) == ErrorMessage.FAILED
        assert metrics.value("inference_requests_total", outcome="error") == 4
        assert "KeyError" in caplog.text
        assert "17" not in "".join(record.getMessage() for record in caplog.records).replace("line", "")


class TestPacking:
    @pytest.mark.parametrize(
        ("coding", "pack"), [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)]
    )
    def test_packed_bodies(self, coding: str, pack: Any) -> None:
        assert classify(pack(png(110)), headers={"content-encoding": coding}).json()["predictions"][0]["index"] == 4

    @pytest.mark.parametrize("pieces", [2, 7, 60])
    def test_gzip_of_several_members_is_one_body(self, pieces: int) -> None:
        """RFC 1952, 2.2. Empty members, and members with names of files, are members too."""
        file = png(110)
        cuts = [file[place : place + len(file) // pieces + 1] for place in range(0, len(file), len(file) // pieces + 1)]
        packed = gzip.compress(b"") + b"".join(gzip.compress(cut) for cut in cuts) + gzip.compress(b"")
        response = classify(packed, headers={"content-encoding": "gzip"})
        assert response.json()["predictions"][0]["index"] == 4

    def test_members_share_one_limit(self) -> None:
        body = gzip.compress(bytes(600)) + gzip.compress(bytes(600))
        app = public_app(max_body_bytes=1024)
        response = ask(app, "POST", PATH, content=body, headers={"content-encoding": "gzip"})
        refused(response, 413, ErrorMessage.BODY_TOO_LARGE)
        for sizes in ([1 << 16] * 64, [100_000, 1, 3_000_000, 0]):
            members = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
            packed = b"".join(map(gzip.compress, members))
            assert inflate(packed, b"gzip", sum(sizes)) == b"".join(members)
            with pytest.raises(ContentTooLarge):
                inflate(packed, b"gzip", sum(sizes) - 1)

    @pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
    def test_a_body_is_unpacked_alike_however_it_arrives(self, coding: bytes) -> None:
        """In one piece, byte by byte, and with much output from few bytes."""
        content = png(110) + bytes(300_000)
        packer = zlib.compressobj(wbits=-15)
        whole = gzip.compress(content) if coding == b"gzip" else packer.compress(content) + packer.flush()
        for size in (1, 2, 7, 1000, len(whole)):
            inflater = Inflater(coding, len(content))
            pieces = [
                part for at in range(0, len(whole), size) for part in inflater.unpack_chunk(whole[at : at + size])
            ]
            inflater.finish()
            assert b"".join(pieces) == content
            assert max(map(len, pieces)) <= 65536
        for end in (1, 20, len(whole) - 1):
            inflater = Inflater(coding, len(content))
            list(inflater.unpack_chunk(whole[:end]))
            with pytest.raises(BadRequest):
                inflater.finish()

    def test_deflate_is_read_without_zlib_s_header_too(self) -> None:
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(png(110)) + packer.flush()
        assert classify(packed, headers={"content-encoding": "deflate"}).json()["predictions"][0]["index"] == 4
        for damaged in (packed[:-3], packed + b"x", packed + packed):
            refused(classify(damaged, headers={"content-encoding": "deflate"}), 400, ErrorMessage.BODY_INFLATE)

    def test_identity_is_no_packing(self) -> None:
        assert classify(headers={"content-encoding": "identity"}).status_code == 200

    @pytest.mark.parametrize("coding", ["br", "gzip, gzip", "zstd", "pickle"])
    def test_others_are_refused(self, coding: str) -> None:
        refused(classify(headers={"content-encoding": coding}), 415, ErrorMessage.BODY_PACKING)

    @pytest.mark.parametrize(
        "body",
        [
            b"no gzip",
            gzip.compress(png())[:-5],
            gzip.compress(png()) + b"more",
            gzip.compress(png()[:50]) + gzip.compress(png()[50:])[:-5],
            gzip.compress(png()) + gzip.compress(b"") * 4096,
            b"",
        ],
        ids=["not packed", "cut short", "more behind it", "second cut short", "too many members", "nothing"],
    )
    def test_damaged_packing(self, body: bytes) -> None:
        refused(classify(body, headers={"content-encoding": "gzip"}), 400, ErrorMessage.BODY_INFLATE)

    def test_a_bomb_stops_at_the_limit(self) -> None:
        bomb = gzip.compress(bytes(100_000_000), 9)
        assert len(bomb) < 100_000
        refused(classify(bomb, headers={"content-encoding": "gzip"}), 413, ErrorMessage.BODY_TOO_LARGE)


class TestDeadlines:
    def test_the_servers_own_and_the_clients_if_it_is_shorter(self) -> None:
        oracle = Oracle()
        app = public_app(StandIn(oracle), deadline_s=10)
        for value in ("250", "60000", None):
            headers = {} if value is None else {"tombola-timeout-ms": value}
            assert ask(app, "POST", PATH, content=png(), headers=headers).status_code == 200
        shortest, longest, default = oracle.deadlines
        assert 0 < shortest <= 0.25
        assert 1 < longest <= 10
        assert 1 < default <= 10

    @pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "9" * 30])
    def test_nonsense_is_refused(self, value: str) -> None:
        refused(classify(headers={"tombola-timeout-ms": value}), 400, ErrorMessage.TIMEOUT_HEADER)

    def test_two_different_ones_are_refused(self) -> None:
        response = classify(headers=[("tombola-timeout-ms", "1"), ("tombola-timeout-ms", "2")])
        refused(response, 400, ErrorMessage.HEADER_TWICE)


class TestHangUps:
    def test_a_client_that_hangs_up_cancels_its_work_and_is_counted(self) -> None:
        metrics, sent = Metrics(), []

        async def story() -> Oracle:
            oracle = Oracle(hold=asyncio.Event())
            app = public_app(StandIn(oracle), metrics)
            gone = asyncio.Event()
            messages = iter([{"type": "http.request", "body": png(), "more_body": False}])

            async def receive() -> Any:
                for message in messages:
                    return message
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            running = asyncio.ensure_future(app(scope(), receive, send))
            await oracle.submitted.wait()
            gone.set()
            await running
            return oracle

        assert asyncio.run(story()).cancelled == 1
        assert sent == []
        assert metrics.value("inference_requests_total", outcome="cancelled") == 1
        assert metrics.value("http_body_memory_bytes") == 0

    def test_hanging_up_amid_the_body(self) -> None:
        metrics = Metrics()

        async def story() -> None:
            messages: Iterable[Any] = iter(
                [{"type": "http.request", "body": b"\x89PNG", "more_body": True}, {"type": "http.disconnect"}]
            )

            async def receive() -> Any:
                return next(iter(messages))

            async def send(message: Any) -> None:
                raise AssertionError(message)

            await public_app(metrics=metrics)(scope(), receive, send)

        asyncio.run(story())
        assert metrics.value("inference_requests_total", outcome="cancelled") == 1
        assert metrics.value("http_body_memory_bytes") == 0

    def test_being_cancelled_from_outside_is_no_hang_up(self) -> None:
        async def story() -> Oracle:
            oracle = Oracle(hold=asyncio.Event())

            async def receive() -> Any:
                if oracle.rows:
                    await asyncio.Event().wait()
                return {"type": "http.request", "body": png(), "more_body": False}

            async def send(message: Any) -> None:
                raise AssertionError(message)

            running = asyncio.ensure_future(public_app(StandIn(oracle))(scope(), receive, send))
            await oracle.submitted.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            return oracle

        assert asyncio.run(story()).cancelled == 1


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"tombola")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


class TestKeys:
    @pytest.fixture
    def keys(self, tmp_path: Path) -> Path:
        path = tmp_path / "keys"
        path.write_text(f"# name, SHA-256\n\nalice {sha('first')}\nbob   {sha('second')}\n")
        return path

    def test_a_key_is_needed_in_a_header_and_its_owner_is_the_client(self, keys: Path) -> None:
        manager = StandIn()
        app = public_app(manager, api_keys_file=keys)
        for headers in (
            {"authorization": "Bearer first"},
            {"x-api-key": "second"},
            {"authorization": "bearer  second"},
        ):
            assert ask(app, "POST", PATH, content=png(), headers=headers).status_code == 200
        assert manager.scheduler.clients == ["key:alice", "key:bob", "key:bob"]

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": "Bearer third"},
            {"authorization": "Basic first"},
            {"x-api-key": hashlib.sha256(b"first").hexdigest()},
            {"x-api-key": "é"},
        ],
    )
    def test_others_are_refused_and_counted(self, keys: Path, headers: dict[str, str]) -> None:
        metrics = Metrics()
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        response = ask(public_app(None, metrics, api_keys_file=keys), "POST", PATH, content=png(), headers=raw)
        refused(response, 401, ErrorMessage.KEY_REQUIRED)
        assert response.headers["www-authenticate"] == "Bearer"
        assert metrics.value("auth_failures_total", plane="public") == 1

    def test_both_protocols_ask_for_it_and_health_and_metadata_do_not(self, keys: Path) -> None:
        app = public_app(api_keys_file=keys)
        refused(ask(app, "POST", "/v2/models/tombola/infer", content=png()), 401, ErrorMessage.KEY_REQUIRED)
        for path in (
            "/health/live",
            "/health/ready",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/tombola/ready",
        ):
            assert ask(app, "GET", path).status_code == 200

    def test_a_key_in_the_url_is_refused_even_where_none_is_needed(self) -> None:
        for name in ("key", "token", "api_key", "ACCESS_TOKEN"):
            refused(ask(public_app(), "POST", f"{PATH}?{name}=first", content=png()), 400, ErrorMessage.TOKEN_IN_URL)

    def test_without_keys_the_address_is_the_client(self) -> None:
        manager = StandIn()
        ask(public_app(manager), "POST", PATH, content=png())
        assert manager.scheduler.clients == ["127.0.0.1"]


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_the_document_describes_every_public_route() -> None:
    paths = ask(public_app(), "GET", "/openapi.json").json()["paths"]
    assert {"/v1/classify", "/health/live", "/health/ready", "/v2", "/v2/models/{model}/infer"} <= set(paths)
    assert "image/png" in paths[PATH]["post"]["requestBody"]["content"]
