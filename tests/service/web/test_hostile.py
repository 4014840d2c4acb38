"""Hostile clients: every probe is answered with a 4xx of the catalogue, and the next client notices nothing."""

import asyncio
import base64
import hmac
import http.client
import json
import logging
import math
import os
import pickle
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from fastapi import FastAPI
from hypothesis import example, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from model_store.images import Pixels
from model_store.library import Library
from service.admin.audit_jobs import AuditQueue
from service.app import create_admin_app
from service.errors import ErrorMessage
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.outbound import http_client
from service.scheduling.answers import Probabilities
from service.settings import Settings
from service.web.auth import ApiKeyStore
from service.web.public_app import create_public_app
from tests.support.planes import (
    TOKEN,
    Oracle,
    StandIn,
    admin_app,
    ask,
    behind_a_port,
    encoded,
    one_of_the_catalogue,
    picture,
    png,
    probabilities,
    public_app,
    refused,
)
from tests.support.serving import tiny_library

CLASSIFY: Final = "/v1/classify"
INFER: Final = "/v2/models/tombola/infer"
LENGTH: Final = "inference-header-content-length"
MEGABYTE: Final = 1_000_000


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return public_app()


@pytest.fixture(scope="module")
def server(app: FastAPI) -> Iterator[str]:
    with behind_a_port(app) as address:
        yield address


def eventually_closed(connection: socket.socket, rest: bytes) -> bytes:
    """What was answered; then these bytes one by one, until the other end closes."""
    answer, late = b"", time.monotonic() + 30
    while time.monotonic() < late:
        try:
            if rest and answer:
                connection.sendall(rest[:1])
                rest = rest[1:]
            chunk = connection.recv(4096)
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
        if not chunk:
            return answer
        answer += chunk
    raise AssertionError("the connection is still open")


def wire(server: str, sent: bytes) -> bytes:
    """Everything the server answers to these bytes, until it closes or falls silent."""
    host, port = server.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestDeserialisation:
    """Nothing a client sends is ever unpickled, run or fetched."""

    @pytest.mark.parametrize("path", [CLASSIFY, INFER])
    @pytest.mark.parametrize(
        "kind", ["application/x-pickle", "application/vnd.bentoml+pickle", "application/octet-stream", None]
    )
    def test_pickles_leave_no_canary(self, app: FastAPI, tmp_path: Path, path: str, kind: str | None) -> None:
        canary = tmp_path / "canary"

        class Bomb:
            def __reduce__(self) -> Any:
                return (canary.touch, ())

        payload = pickle.dumps(Bomb())
        headers = {"payload-container": "DefaultContainer", "args-number": "1"} | (
            {"content-type": kind} if kind else {}
        )
        assert ask(app, "POST", path, content=payload, headers=headers).status_code in (400, 415)
        element = struct.pack("<I", len(payload)) + payload
        head = {"inputs": [bytes_tensor(1, len(element))]}
        assert binary(app, head, element).status_code == 415
        assert not canary.exists()

    def test_numpy_files_with_objects(self, app: FastAPI, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        data = (tmp_path / "x.npy").read_bytes()
        for path in (CLASSIFY, INFER):
            assert ask(app, "POST", path, content=data).status_code in (400, 415)

    def test_nothing_is_ever_fetched(self, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
        def connect(*_: Any) -> None:
            raise AssertionError("the server opened a connection")

        monkeypatch.setattr(socket.socket, "connect", connect)
        url = "http://169.254.169.254/latest/meta-data"
        element = struct.pack("<I", len(url)) + url.encode()
        refused(ask(app, "POST", CLASSIFY, json={"url": url}), 400, ErrorMessage.JSON_IMAGES)
        refused(ask(app, "POST", CLASSIFY, json={"images": [url]}), 400, ErrorMessage.BASE64)
        refused(ask(app, "POST", CLASSIFY, json={"images": [base64.b64encode(url.encode()).decode()]}), 415)
        refused(ask(app, "POST", CLASSIFY, content=url.encode()), 415, ErrorMessage.BODY_NEITHER)
        refused(binary(app, {"inputs": [bytes_tensor(1, len(element))]}, element), 415, ErrorMessage.IMAGE_FORMAT)
        load = {"parameters": {"config": "{}", "file:1/model.py": "aW1wb3J0IG9z"}}
        refused(ask(app, "POST", "/v2/repository/models/tombola/load", json=load), 501, ErrorMessage.NOT_OFFERED)


def bytes_tensor(count: int, size: Any) -> dict[str, Any]:
    return {"name": "image", "shape": [count], "datatype": "BYTES", "parameters": {"binary_data_size": size}}


def binary(app: FastAPI, head: Any, tail: bytes) -> httpx.Response:
    text = json.dumps(head).encode()
    return ask(app, "POST", INFER, content=text + tail, headers={LENGTH: str(len(text))})


class TestSizes:
    def test_three_megabytes_of_six_byte_elements(self, app: FastAPI) -> None:
        data = struct.pack("<I2s", 2, b"xx") * 500_000
        before = resident_bytes()
        refused(binary(app, {"inputs": [bytes_tensor(500_000, len(data))]}, data), 413, ErrorMessage.IMAGES_TOO_MANY)
        refused(binary(app, {"inputs": [bytes_tensor(512, len(data))]}, data), 400, ErrorMessage.V2_BINARY_BYTES)
        assert resident_bytes() - before < 64 * MEGABYTE

    @pytest.mark.parametrize(
        ("what", "text"), [("inputs", ErrorMessage.V2_INPUTS), ("outputs", ErrorMessage.V2_OUTPUTS)]
    )
    def test_ten_thousand_inputs_or_outputs(self, app: FastAPI, what: str, text: ErrorMessage) -> None:
        size = len(png())
        content = {"inputs": [bytes_tensor(1, size + 4)], what: [{"name": f"{what} {i}"} for i in range(10_000)]}
        before = resident_bytes()
        refused(binary(app, content, struct.pack("<I", size) + png()), 400, text)
        assert resident_bytes() - before < 64 * MEGABYTE

    def test_three_megabytes_in_chunks_of_one_byte(self, server: str) -> None:
        head = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        before = resident_bytes()
        answer = wire(server, head + b"1\r\nx\r\n" * 500_000 + b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 415 ")
        assert resident_bytes() - before < 64 * MEGABYTE

    def test_a_length_that_never_comes_reserves_no_memory(self, server: str) -> None:
        before = resident_bytes()
        for _ in range(20):
            wire(server, b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 16000000\r\n\r\n")
        assert resident_bytes() - before < 32 * MEGABYTE

    def test_two_hundred_clients_that_promise_much_and_send_nothing_take_no_room(self, server: str) -> None:
        host, port = server.split(":")
        slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
        for connection in slow:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 16000000\r\n\r\nx")
        with http_client(timeout_s=30, base_url=f"http://{server}") as client:
            assert [client.post(CLASSIFY, content=png(110)).status_code for _ in range(10)] == [200] * 10
        for connection in slow:
            connection.close()

    def test_a_body_of_thirty_megabytes_is_refused_and_the_client_can_read_why(self, server: str) -> None:
        with http_client(timeout_s=30, base_url=f"http://{server}") as client:
            for _ in range(10):
                refused(client.post(CLASSIFY, content=bytes(30 * MEGABYTE)), 413, ErrorMessage.BODY_TOO_LARGE)
                assert client.post(CLASSIFY, content=png()).status_code == 200

    @pytest.mark.parametrize(
        ("size", "after"),
        [(2, b"x"), (1 << 30, b"x" * 1000), (0, b"\r\n"), (0, b"GET / HT")],
        ids=["a body that is whole soon", "a body without end", "an empty line", "half a request"],
    )
    def test_no_byte_after_an_answer_keeps_a_connection_for_good(self, app: FastAPI, size: int, after: bytes) -> None:
        """Each byte ends the limit on idle connections."""
        request = b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + b"x" * min(size, 1)
        with behind_a_port(app, header_timeout_s=0.5, keep_alive_s=3600.0) as address:
            host, port = address.split(":")
            with socket.create_connection((host, int(port)), timeout=0.05) as connection:
                connection.sendall(request)
                assert eventually_closed(connection, after).startswith(b"HTTP/1.1 404 ")

    def test_the_same_with_tritonclient(self, server: str) -> None:
        client = triton.InferenceServerClient(server)
        tensor = triton.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([bytes(30 * MEGABYTE)], dtype=object))
        for _ in range(10):
            with pytest.raises(InferenceServerException, match="larger than 16777216 bytes"):
                client.infer("tombola", [tensor])
            assert client.is_server_live()
        client.close()


class TestParsers:
    @pytest.mark.parametrize("path", [CLASSIFY, INFER])
    @pytest.mark.parametrize(
        "text",
        [
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"images": ' + b"[" * 100_000,
            b'{"inputs": NaN}',
            b'{"inputs": -Infinity}',
            b'{"inputs": ' + b"9" * 5000 + b"}",
            b'{"inputs": [], "inputs": []}',
            b'{"inputs": [{"name": "image", "name": "pixels"}]}',
            b'{"images": ["\xff\xfe"]}',
            b'{"images": ["\\ud800"',
            b"\xef\xbb\xbf{}",
            b'{"a": 1} {"a": 1}',
            b"{'images': []}",
            b'{"images": [' + b"0," * 300_000 + b"0]}",
            b"{" + b'"a":{},' * 300_000 + b'"b":1}',
        ],
        ids=range(15),
    )
    def test_json(self, app: FastAPI, path: str, text: bytes) -> None:
        response = ask(app, "POST", path, content=text, headers={"content-type": "application/json"})
        assert response.status_code in (400, 413)
        assert one_of_the_catalogue(refused(response, response.status_code))

    def test_whole_numbers_of_four_hundred_digits(self, app: FastAPI) -> None:
        for shape, text in (([10**400], ErrorMessage.IMAGES_TOO_MANY), ([1, 10**400], ErrorMessage.V2_SHAPE_IMAGE)):
            tensor = {"name": "image", "shape": shape, "datatype": "BYTES", "data": [""]}
            refused(
                ask(app, "POST", INFER, json={"inputs": [tensor]}),
                413 if text == ErrorMessage.IMAGES_TOO_MANY else 400,
                text,
            )

    @pytest.mark.parametrize(("path", "empty", "many"), [(CLASSIFY, 400, 413), (INFER, 415, 415)])
    def test_a_form_without_pictures_is_refused(self, app: FastAPI, path: str, empty: int, many: int) -> None:
        """Forms are read on /v1/classify alone: a boundary of a megabyte and 100,000 parts are refused there, too."""
        boundary = "b" * MEGABYTE
        kind = f"multipart/form-data; boundary={boundary}"
        assert ask(app, "POST", path, content=b"--x", headers={"content-type": kind}).status_code == empty
        parts = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n' * 100_000
        kind = "multipart/form-data; boundary=x"
        assert ask(app, "POST", path, content=parts, headers={"content-type": kind}).status_code == many

    @pytest.mark.parametrize(
        "request_line_and_headers",
        [
            b"NONSENSE\r\n",
            b"POST /v1/classify HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n",
            b"POST /v1/classify HTTP/1.1\r\ncontent-length: -1\r\n",
            b"POST /v1/classify HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n",
            b"POST /v1/classify HTTP/1.1\r\nno colon\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
        ],
    )
    def test_what_is_no_http_gets_the_error_form(self, server: str, request_line_and_headers: bytes) -> None:
        answer = wire(server, request_line_and_headers + b"\r\nabc")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body) == {"error": ErrorMessage.BAD_REQUEST}

    @pytest.mark.parametrize("host", [b"evil/..", b"", b"[::1", b"a" * 10_000, b"x\x7fy"])
    def test_hosts_of_any_kind_change_nothing(self, server: str, host: bytes) -> None:
        answer = wire(server, b"GET /nothing HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n")
        assert answer.split(b" ")[1] in (b"404", b"400")
        assert b"evil" not in answer

    def test_paths_of_any_kind(self, server: str) -> None:
        for path in (
            b"/..%2f..%2fetc/passwd",
            b"//evil/..",
            b"/v2/models/%00",
            b"/%ff%fe",
            b"/" + b"a" * 20_000,
            b"/v1/classify%20",
        ):
            answer = wire(server, b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answer.split(b" ")[1] in (b"404", b"400"), path


class TestKeepAlive:
    """An error must not cost the connection: pooled clients would lose their next request."""

    def test_sixty_calls_on_one_connection_every_second_one_an_unexpected_failure(self) -> None:
        class Moody(Oracle):
            async def submit(self, rows: Pixels, *, client: str, deadline: float | None) -> Probabilities:
                if rows[0, 0, 0, 0] == 0:
                    raise RuntimeError("unexpected")
                return probabilities(rows)

        with behind_a_port(public_app(StandIn(Moody()))) as address:
            connection = http.client.HTTPConnection(address, timeout=30)
            connection.connect()
            ours, statuses = connection.sock, []
            for turn in range(60):
                connection.request("POST", CLASSIFY, png(turn % 2 * 100))
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
                assert connection.sock is ours
            connection.close()
        assert statuses == [500, 200] * 30

    def test_refusals_of_every_kind_leave_the_connection_alone(self, server: str) -> None:
        connection = http.client.HTTPConnection(server, timeout=30)
        connection.connect()
        ours = connection.sock
        for method, path, body, status in (
            ("POST", CLASSIFY, b"", 400),
            ("POST", CLASSIFY, b"x" * 100_000, 415),
            ("POST", "/nothing", b"x" * 100_000, 404),
            ("PUT", CLASSIFY, b"x" * 100_000, 415),
            ("PATCH", CLASSIFY, b"x" * 100_000, 405),
            ("POST", INFER, b"{", 400),
            ("POST", "/v2/repository/models/tombola/load", b"{}", 501),
            ("POST", CLASSIFY, png(), 200),
        ):
            connection.request(method, path, body)
            response = connection.getresponse()
            response.read()
            assert response.status == status
            assert connection.sock is ours
        connection.close()

    def test_an_answer_that_breaks_off_closes_the_connection(self) -> None:
        app = public_app()

        async def broken(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            raise RuntimeError("amid the answer")

        app.mount("/broken", broken)
        with (
            behind_a_port(app) as address,
            http_client(timeout_s=5) as client,
            pytest.raises(httpx.RemoteProtocolError),
        ):
            client.get(f"http://{address}/broken/")


class TestCredentials:
    def test_tokens_and_keys_are_compared_in_constant_time_all_of_them(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        compared = []

        def compare(first: str, second: str) -> bool:
            compared.append((len(first), len(second)))
            return hmac_compare(first, second)

        hmac_compare = hmac.compare_digest
        monkeypatch.setattr(hmac, "compare_digest", compare)
        ask(admin_app(), "GET", "/admin/policy", headers={"authorization": "Bearer x"})
        assert compared == [(64, 64)]
        path = tmp_path / "keys"
        path.write_text("".join(f"owner{number} {number:064x}\n" for number in range(5)))
        ask(public_app(api_keys_file=path), "POST", CLASSIFY, content=png(), headers={"x-api-key": "x"})
        assert compared == [(64, 64)] * 6


# Fuzzing: whatever is sent, the outcome is a 4xx of the catalogue or a right answer

JSON_VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KINDS: Final = st.sampled_from(
    [
        "",
        "application/json",
        "application/octet-stream",
        "image/png",
        "text/plain",
        "application/x-pickle",
        "é;=",
        "a" * 300,
    ]
)
CODINGS: Final = st.sampled_from(["identity", "", "gzip", "deflate", "br", "gzip, gzip"])


def valid(red: int = 110) -> dict[str, Any]:
    """A small request with every key there is."""
    data = [base64.b64encode(png(red)).decode()]
    return {
        "id": "1",
        "parameters": {"timeout": 9_000_000, "binary_data_output": False},
        "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {}, "data": data}],
        "outputs": [{"name": "index", "parameters": {"binary_data": False}}],
    }


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


def judged(response: httpx.Response) -> None:
    if response.status_code == 200:
        right(answered(response))
    else:
        assert 400 <= response.status_code < 500
        assert one_of_the_catalogue(refused(response, response.status_code))


def answered(response: httpx.Response) -> Any:
    """The answer's JSON; where a client asked for binary tensors, with the numbers that follow it in their places."""
    if LENGTH not in response.headers:
        return response.json()
    end = int(response.headers[LENGTH])
    content, tail = json.loads(response.content[:end]), response.content[end:]
    for output in content["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            assert len(tail) >= size
            assert "data" not in output
            output["data"], tail = unpacked(output["datatype"], tail[:size]), tail[size:]
    assert tail == b""
    return content


def unpacked(datatype: str, data: bytes) -> list[Any]:
    """A tensor's binary form as a list: little-endian numbers, or elements after their lengths."""
    if datatype != "BYTES":
        return list(np.frombuffer(data, {"FP32": "<f4", "INT64": "<i8"}[datatype]))
    texts = []
    while data:
        size = 4 + struct.unpack_from("<I", data)[0]
        assert len(data) >= size
        texts.append(data[4:size].decode())
        data = data[size:]
    return texts


def right(content: Any) -> None:
    """An answer to one image of the class deer, in either protocol."""
    if "predictions" in content:
        assert [prediction["index"] for prediction in content["predictions"]] == [4]
        return
    for output in content["outputs"]:
        assert output["shape"][0] == 1
        assert len(output["data"]) == math.prod(output["shape"])
        if output["name"] == "index":
            assert output["data"] == [4]


@pytest.fixture(scope="module")
def post(app: FastAPI) -> Iterator[Any]:
    """Posts through one event loop and client for all examples."""
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tombola", timeout=30)
        yield lambda path, **request: runner.run(client.post(path, **request))
        runner.run(client.aclose())


class TestFuzz:
    @given(path=st.sampled_from([CLASSIFY, INFER]), body=st.binary(max_size=400), kind=KINDS, coding=CODINGS)
    def test_bytes(self, post: Any, path: str, body: bytes, kind: str, coding: str) -> None:
        judged(post(path, content=body, headers={"content-type": kind.encode(), "content-encoding": coding}))

    @given(path=st.sampled_from([CLASSIFY, INFER]), content=JSON_VALUES)
    def test_json(self, post: Any, path: str, content: Any) -> None:
        judged(post(path, content=json.dumps(content).encode(), headers={"content-type": "application/json"}))

    @example_settings(max_examples=300)
    @given(place=st.sampled_from(sorted(places(valid()), key=str)), value=JSON_VALUES)
    @example(place=("outputs", 0, "parameters", "binary_data"), value=True)
    @example(place=("outputs", 0), value={"name": "label", "parameters": {"binary_data": True}})
    def test_a_valid_request_with_any_part_replaced(self, post: Any, place: tuple[Any, ...], value: Any) -> None:
        judged(post(INFER, content=json.dumps(replaced(valid(), place, value)).encode()))

    @given(images=st.lists(JSON_VALUES | st.just(valid()["inputs"][0]["data"][0]), max_size=1))
    def test_lists_of_images(self, post: Any, images: list[Any]) -> None:
        judged(post(CLASSIFY, json={"images": images}))

    @given(
        size=st.integers() | st.sampled_from([3072, 3073, 0, -1]),
        tail=st.binary(max_size=50) | st.just(b"\x6e" * 3072),
        length=st.none() | st.integers(-5, 4000),
        shape=st.lists(st.integers(), max_size=5) | st.just([1, 3, 32, 32]),
    )
    def test_binary_tensors(self, post: Any, size: int, tail: bytes, length: int | None, shape: list[int]) -> None:
        tensor = {"name": "pixels", "shape": shape, "datatype": "UINT8", "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {LENGTH: str(len(head) if length is None else length)}
        judged(post(INFER, content=head + tail, headers=headers))

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @given(
        kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
        flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
        raw=st.booleans(),
    )
    def test_images_with_bytes_changed(self, post: Any, kind: str, flips: list[tuple[float, int]], raw: bool) -> None:
        data = bytearray(encoded(picture(110), kind))
        for place, value in flips:
            data[int(place * len(data))] = value
        response = (
            post(INFER, content=bytes(data), headers={LENGTH: "0"}) if raw else post(CLASSIFY, content=bytes(data))
        )
        if response.status_code != 200:  # a changed pixel is a picture, too
            judged(response)

    @given(
        name=st.sampled_from(
            ["tombola-timeout-ms", LENGTH, "content-length", "accept-encoding", "authorization", "x-api-key"]
        ),
        value=st.binary(max_size=30),
    )
    def test_headers(self, post: Any, name: str, value: bytes) -> None:
        response = post(INFER, content=json.dumps(valid()).encode(), headers=[(name.encode(), value)])
        judged(response)


# The secret


class Story:
    """A real library behind both planes; what left the service while many images were classified."""

    def __init__(self, library: Library, tmp_path: Path, **knobs: Any) -> None:
        self.settings = Settings(library=library.path, engine="torch", threads=1, state_dir=tmp_path, **knobs)
        self.metrics = Metrics()
        self.answers: list[httpx.Response] = []

    async def run(self) -> str:
        """Asks the same image over both protocols; returns the metrics."""
        manager = LibraryManager(self.settings, self.metrics)
        await manager.start()
        try:
            app = create_public_app(manager, self.settings, self.metrics, ApiKeyStore(None, self.metrics))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://tombola", timeout=60) as client:
                await self.ask(client)
            jobs = AuditQueue(self.settings, self.metrics, manager.library)
            admin = httpx.ASGITransport(create_admin_app(manager, self.settings, self.metrics, TOKEN, jobs))
            async with httpx.AsyncClient(transport=admin, base_url="http://admin") as client:
                return (await client.get("/metrics")).text
        finally:
            manager.workers.stop()

    async def ask(self, client: httpx.AsyncClient) -> None:
        for turn in range(20):
            self.answers.append(await client.post(CLASSIFY, content=png(turn)))
            self.answers.append(await client.post(INFER, content=png(turn), headers={LENGTH: "0"}))
            self.answers.append(await client.post(INFER, json=valid(turn)))
            self.answers.append(await client.post(CLASSIFY, content=png(turn)[: 10 + turn]))
        for path in ("/v2", "/v2/models/tombola", "/v2/models/tombola/config", "/v2/models/stats", "/openapi.json"):
            self.answers.append(await client.get(path))


ALLOWED_HEADERS: Final = {"content-type", "content-length", "x-request-id", "cache-control", LENGTH, "connection"}
ALLOWED_KEYS: Final = {"request_id", "library", "predictions", "label", "index", "probability", "top"}


def test_nothing_of_theta_leaves_the_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names of members, structures and densities, sizes of ensembles and seeds are sought in all that was sent, logged
    and measured. Metrics may count draws, many at a time, but no series may belong to one request."""
    caplog.set_level(logging.DEBUG)
    library = tiny_library(tmp_path / "library")
    story = Story(library, tmp_path / "state", output_detail="full")
    metrics = asyncio.run(story.run())
    secrets = {entry.name for entry in library.entries} | {entry.sha256 for entry in library.entries}
    secrets |= {entry.structure.name for entry in library.entries} | {"theta", "member", "ensemble", "alpha"}
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "asyncio"))]
    for response in story.answers:
        assert set(response.headers) <= ALLOWED_HEADERS
        for secret in secrets:
            assert secret.encode() not in response.content
    for line in logged:
        assert not any(secret in line for secret in secrets - {"ensemble"}), line
    ok = [response for response in story.answers if response.status_code == 200 and CLASSIFY in str(response.url)]
    assert len(ok) == 20
    assert all(keys_of(response.json()) <= ALLOWED_KEYS for response in ok)
    assert not re.findall(r'\b(member|theta|seed|client|request_id|n|size)="', metrics)


def keys_of(content: Any) -> set[str]:
    if isinstance(content, dict):
        return set(content).union(*map(keys_of, content.values()))
    return set().union(*map(keys_of, content)) if isinstance(content, list) else set()


def test_equal_answers_of_the_scheduler_are_equal_on_the_wire_but_for_the_id(app: FastAPI) -> None:
    """The public plane knows only probabilities: whatever drew them, what it sends is a function of them."""
    for path, headers in ((CLASSIFY, {}), (INFER, {LENGTH: "0"})):
        answers = [ask(app, "POST", path, content=png(), headers=headers) for _ in range(10)]
        blank = [answer.content.replace(answer.headers["x-request-id"].encode(), b"") for answer in answers]
        assert len(set(blank)) == 1
        assert len({answer.headers["x-request-id"] for answer in answers}) == 10
