"""The real process: from `tombola serve` to its exit code. Every wait is for a condition."""

import http.client
import io
import json
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.support.serving import ROOT, Process, serving, tiny_library
from tests.support.waiting import until
from tombola.sample_image import draw_sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_library(tmp_path_factory.mktemp("tiny") / "library").path


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Caller(threading.Thread):
    """One client that asks without a pause, on a connection it keeps, until the port is closed.

    lost: requests that were sent and got no answer. A connection that is refused is no request.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.place = urlsplit(url)
        self.answers: list[int] = []
        self.digests: set[str] = set()
        self.lost: list[str] = []
        self.enough = False
        self.start()

    def run(self) -> None:
        connection = self.connect()
        while connection is not None and not self.enough:
            try:
                connection.request("POST", "/v1/classify", draw_sample(), {"content-type": "image/png"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                return
            self.answers.append(response.status)
            self.digests.add(answer.get("library", ""))
            if response.getheader("connection") == "close":
                connection = self.connect()

    def connect(self) -> http.client.HTTPConnection | None:
        """None once nobody listens."""
        connection = http.client.HTTPConnection(self.place.hostname or "", self.place.port, timeout=60)
        try:
            connection.connect()
        except ConnectionRefusedError:
            return None
        return connection


@pytest.fixture
def callers() -> Iterator[Callable[[str, int], list[Caller]]]:
    made: list[Caller] = []

    def call(url: str, count: int) -> list[Caller]:
        made.extend(Caller(url) for _ in range(count))
        return made

    yield call
    for caller in made:
        caller.enough = True
        caller.join(timeout=60)


@pytest.mark.parametrize("http_processes", ["1", "2"])
def test_it_starts_and_answers_the_line_it_prints_and_swaps_and_ends_without_losing_a_request(
    http_processes: str, tmp_path: Path, callers: Callable[[str, int], list[Caller]]
) -> None:
    folder = tmp_path / "library"
    first = tiny_library(folder)
    flags = ("--drain-delay-s", "1.5", "--http-processes", http_processes)
    with serving(folder, tmp_path / "state", *flags) as process:
        printed = next(line for line in process.output if line.startswith("try"))
        curl = shlex.split(printed.removeprefix("try"))
        answer = json.loads(subprocess.run([*curl, "--silent"], capture_output=True, check=True).stdout)
        assert answer["library"] == first.digest
        assert process.output[-1].startswith("Ready: every image gets one of ")

        clients = callers(process.public, 6)
        until(lambda: all(len(client.answers) > 5 for client in clients))

        second = tiny_library(folder, seed=50)
        process.process.send_signal(signal.SIGHUP)
        until(lambda: all(second.digest in client.digests for client in clients))

        (folder / "manifest.json").write_text("{}")
        process.process.send_signal(signal.SIGHUP)
        until(lambda: process.metric('library_swaps_total{outcome="refused"}') == 1)
        assert process.ready()
        assert process.classify(draw_sample())[1]["library"] == second.digest

        process.process.send_signal(signal.SIGTERM)
        until(lambda: not process.ready())
        answered = [len(client.answers) for client in clients]
        until(lambda: all(len(client.answers) > before for client, before in zip(clients, answered, strict=True)))
        assert process.process.wait(timeout=60) == 0
    for client in clients:
        client.join(timeout=60)
        assert client.lost == []
        assert set(client.answers) == {200}
        assert client.digests == {first.digest, second.digest}


def test_overload_is_refused_with_a_time_to_come_back_and_then_forgotten(folder: Path, tmp_path: Path) -> None:
    flags = ("--max-queue-size", "8", "--max-images", "8")
    with serving(folder, tmp_path / "state", *flags) as process:
        with ThreadPoolExecutor(32) as pool:
            responses = list(pool.map(lambda _: status_and_pause(process), range(400)))
        assert {status for status, _ in responses} == {200, 503}
        assert all((pause is not None and int(pause) >= 1) == (status == 503) for status, pause in responses)
        assert process.classify(draw_sample())[0] == 200
        assert process.metric("queue_depth") == 0
        assert process.metric('shed_total{reason="queue"}') == sum(status == 503 for status, _ in responses)
        assert process.end() == 0


def status_and_pause(process: Process) -> tuple[int, str | None]:
    place = urlsplit(process.public)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    connection.request("POST", "/v1/classify", draw_sample(), {"content-type": "image/png"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, response.getheader("retry-after")


def test_an_engine_that_dies_in_a_request_fails_that_request_and_the_process_when_it_cannot_be_revived(
    folder: Path, tmp_path: Path
) -> None:
    flags = ("--engine-restarts", "1", "--threads", "1")
    program = (str(ROOT / "tests" / "support" / "sabotaged.py"),)
    with serving(folder, tmp_path / "state", *flags, program=program) as process:
        status, answer = process.classify(png("white"))
        assert status == 500
        assert set(answer) == {"error"}
        assert process.classify(png("black"))[0] == 200
        assert process.ready()
        assert process.metric("engine_restarts_total") == 1
        assert process.classify(png("white"))[0] == 500
        assert process.process.wait(timeout=60) == 1


def test_slow_clients_are_let_go_and_a_storm_of_hang_ups_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    """200 connections that send a little and then nothing, and 200 that ask and leave. Interrupted, it ends at once."""
    flags = ("--header-timeout-s", "1", "--body-timeout-s", "1", "--drain-delay-s", "3600")
    with serving(folder, tmp_path / "state", *flags) as process:
        place = urlsplit(process.public)
        head = b"POST /v1/classify HTTP/1.1\r\nHost: tombola\r\nContent-Type: image/png\r\n"
        beginnings = (b"", b"POST /v1", head, head + b"Content-Length: 5000\r\n\r\nslow")
        slow = [connection_with(place, data) for data in beginnings for _ in range(50)]
        whole = head + f"Content-Length: {len(draw_sample())}\r\n\r\n".encode() + draw_sample()
        for _ in range(200):
            connection_with(place, whole).close()
        assert process.classify(draw_sample())[0] == 200
        ends = [until_closed(connection) for connection in slow]
        assert all(b"408" in end for end in ends[150:])
        until(lambda: process.metric("http_requests_in_flight") == 0)
        assert process.metric("http_body_memory_bytes") == 0
        assert process.metric("queue_depth") == 0
        assert process.classify(draw_sample())[0] == 200
        assert process.end(signal.SIGINT) == 0


def connection_with(place: Any, data: bytes) -> socket.socket:
    connection = socket.create_connection((place.hostname, place.port), timeout=60)
    connection.sendall(data)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """What the server said before it closed the connection."""
    output = b""
    with connection:
        while data := connection.recv(4096):
            output += data
    return output
