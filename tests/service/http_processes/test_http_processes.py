"""The public plane in two processes, each law in one place: the real server, and its parts over a stand-in."""

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from model_store.policy import Policy
from service.cpu import process_tree
from service.errors import DeadlineExceeded, ErrorMessage
from service.http_processes import http_process
from service.http_processes.channel import Channel
from service.http_processes.supervisor import HttpProcesses, share_of
from service.observability.metrics import Metrics
from service.settings import Settings, SettingsRejected
from service.web.auth import ApiKeyStore
from service.web.inference import DataPlane
from service.web.server import bind, bind_several, url
from tests.support.planes import Oracle, StandIn, png
from tests.support.serving import TOKEN, Process, serving, tiny_library
from tests.support.tickets import CLASSES
from tests.support.waiting import until, until_async
from tombola.sample_image import draw_sample

pytestmark = pytest.mark.usefixtures("warm_start")

PAIR: Final = ("--http-processes", "2", "--drain-delay-s", "0")
INFER: Final = "/v2/models/tombola/infer"
JSON: Final = {"content-type": "application/json"}


# The real server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every ticket answers every image, so that two servers give the same probabilities."""
    return tiny_library(tmp_path_factory.mktemp("tiny") / "library", policy=Policy.all(4)).path


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with serving(folder, tmp_path_factory.mktemp("pair") / "state", *PAIR, TOMBOLA_ADMIN_TOKEN=TOKEN) as process:
        until(lambda: process.metric("http_processes") == 2)
        yield process
        assert process.end() == 0


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with serving(folder, tmp_path_factory.mktemp("single") / "state", "--drain-delay-s", "0") as process:
        yield process
        assert process.end() == 0


def http_pids(process: Process) -> list[int]:
    """Its HTTP processes."""
    return [pid for pid in process_tree(process.process.pid) if http_process.__name__ in command_line(pid)]


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def exchange(place: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, bytes]:
    """Status, headers and body of an answer on a connection of its own, without what is another each time."""
    parts = urlsplit(place)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    named = [(name.lower(), value) for name, value in response.getheaders() if name.lower() != "x-request-id"]
    if b"request_id" in content:
        content = json.dumps({**json.loads(content), "request_id": ""}).encode()
        named = [field for field in named if field[0] != "content-length"]
    return response.status, named, content


IMAGE: Final = draw_sample()
TENSOR: Final = np.arange(2 * 3 * 32 * 32, dtype=np.uint8).reshape(2, 3, 32, 32)
BINARY_INPUT: Final = {"name": "pixels", "datatype": "UINT8", "shape": [2, 3, 32, 32]}
BINARY_HEAD: Final = json.dumps(
    {"inputs": [{**BINARY_INPUT, "parameters": {"binary_data_size": TENSOR.size}}]}
).encode()
REQUESTS: Final = {
    "an image": ("POST", "/v1/classify", IMAGE, {}),
    "two images": (
        "POST",
        "/v1/classify",
        json.dumps({"images": [base64.b64encode(IMAGE).decode()] * 2}).encode(),
        JSON,
    ),
    "a tensor": (
        "POST",
        INFER,
        json.dumps({"inputs": [{**BINARY_INPUT, "data": TENSOR.ravel().tolist()}]}).encode(),
        {},
    ),
    "a binary tensor": (
        "POST",
        INFER,
        BINARY_HEAD + TENSOR.tobytes(),
        {"inference-header-content-length": str(len(BINARY_HEAD))},
    ),
    "no body": ("POST", "/v1/classify", b"", {}),
    "a damaged image": ("POST", "/v1/classify", IMAGE[:60], {}),
    "no image": ("POST", "/v1/classify", b"hello", {"content-type": "text/plain"}),
    "a bomb": ("POST", "/v1/classify", b"x" * 100, {"content-encoding": "gzip"}),
    "broken JSON": ("POST", INFER, b"{", JSON),
    "a wrong shape": (
        "POST",
        INFER,
        json.dumps({"inputs": [{**BINARY_INPUT, "shape": [1], "data": [1]}]}).encode(),
        JSON,
    ),
    "too many images": ("POST", "/v1/classify", json.dumps({"images": [""] * 2000}).encode(), JSON),
    "another model": ("POST", "/v2/models/other/infer", b"{}", JSON),
    "no such path": ("GET", "/nowhere", b"", {}),
    "another method": ("DELETE", "/v1/classify", b"", {}),
    "a key in the URL": ("POST", "/v1/classify?api_key=1", IMAGE, {}),
    "a time in the past": ("POST", "/v1/classify", IMAGE, {"tombola-timeout-ms": "0"}),
    "ready": ("GET", "/health/ready", b"", {}),
    "metadata": ("GET", "/v2/models/tombola", b"", {}),
    "configuration": ("GET", "/v2/models/tombola/config", b"", {}),
    "the description": ("GET", "/openapi.json", b"", {}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_bytes_come_from_two_processes_as_from_one(name: str, pair: Process, single: Process) -> None:
    expected = exchange(single.public, *REQUESTS[name])
    for _ in range(4):  # the kernel chooses a process for each connection
        assert exchange(pair.public, *REQUESTS[name]) == expected


def test_metrics_are_whole_and_request_ids_are_unique(pair: Process) -> None:
    def count(name: str) -> float:
        return pair.metric(f'{name}{{outcome="ok"}}')

    def one(_: int) -> str:
        status, answer = pair.classify(IMAGE)
        assert status == 200
        return str(answer["request_id"])

    before, images = count("inference_requests_total"), pair.metric("inference_images_total")
    timed = pair.metric('http_request_duration_seconds_count{code="200",route="/v1/classify"}')
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, range(40)))) == 40
    until(lambda: count("inference_requests_total") == before + 40)
    assert pair.metric("inference_images_total") == images + 40
    assert pair.metric('http_request_duration_seconds_count{code="200",route="/v1/classify"}') == timed + 40
    assert pair.metric("http_requests_in_flight") == pair.metric("http_body_memory_bytes") == 0
    assert pair.metric("http_cpu_seconds_total") > 0


def test_a_process_for_http_gets_no_secret(pair: Process) -> None:
    processes = http_pids(pair)
    assert len(processes) == 2
    for pid in processes:
        assert "TOMBOLA" not in Path(f"/proc/{pid}/environ").read_text()
        assert TOKEN not in Path(f"/proc/{pid}/environ").read_text() + command_line(pid)
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in libraries
        assert "openvino" not in libraries


def test_a_process_for_http_holds_no_code_that_draws_or_schedules() -> None:
    code = f"import sys, {http_process.__name__}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert http_process.__name__ in loaded
    drawing = {"model_store.policy", "model_store.library", "service.scheduling.batch", "service.scheduling.scheduler"}
    assert not ({"torch", "service.engine"} | drawing) & loaded


def test_a_killed_process_loses_its_own_connections_alone_and_is_replaced_until_the_service_is_killed(
    folder: Path, tmp_path: Path
) -> None:
    with serving(folder, tmp_path / "state", *PAIR) as process:
        until(lambda: process.metric("http_processes") == 2)
        parts = urlsplit(process.public)
        clients = [http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60) for _ in range(16)]
        for client in clients:
            client.connect()
        with ThreadPoolExecutor(len(clients)) as pool:
            assert set(pool.map(status_or_loss, clients)) == {200}  # so each has been accepted
            victim, other = http_pids(process)
            ports = [client.sock.getsockname()[1] for client in clients]
            owned = server_ports(victim)
            assert server_ports(other).isdisjoint(owned)
            running = [pool.submit(until_lost_or, client, 30) for client in clients]
            os.kill(victim, signal.SIGKILL)
            ends = [each.result() for each in running]
        for port, end in zip(ports, ends, strict=True):
            assert end == ("lost" if port in owned else 200)
        assert process.metric("http_process_restarts_total") <= 1
        until(lambda: process.metric("http_process_restarts_total") == 1 and process.metric("http_processes") == 2)
        assert {exchange(process.public, "POST", "/v1/classify", IMAGE, {})[0] for _ in range(12)} == {200}
        until(lambda: process.metric("http_requests_in_flight") == 0)
        assert process.metric("http_body_memory_bytes") == process.metric("queue_depth") == 0
        processes = http_pids(process)
        assert len(processes) == 2
        process.process.kill()  # they end with the service
        process.process.wait()
        until(lambda: not any(command_line(pid) for pid in processes))


def status_or_loss(client: http.client.HTTPConnection) -> int | str:
    try:
        client.request("POST", "/v1/classify", IMAGE)
        response = client.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        return "lost"
    return response.status


def until_lost_or(client: http.client.HTTPConnection, requests: int) -> int | str:
    """Sends so many requests, one after the other, until one gets no answer or another one than 200."""
    client.auto_open = 0
    result: int | str = 200
    for _ in range(requests):
        result = status_or_loss(client)
        if result != 200:
            break
    client.close()
    return result


def server_ports(pid: int) -> set[int]:
    """The clients' ports of the TCP connections that a process holds."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").rstrip("]"))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(fields[2].split(":")[1], 16) for fields in lines if fields[9] in inodes} - {0}


def test_a_client_has_one_rate_over_both_processes(folder: Path, tmp_path: Path) -> None:
    limits = ("--rate-images-per-s", "0.001", "--rate-burst-images", "3")
    with serving(folder, tmp_path / "state", *PAIR, *limits) as process:
        until(lambda: process.metric("http_processes") == 2)
        answers = [exchange(process.public, "POST", "/v1/classify", IMAGE, {}) for _ in range(12)]
        assert [status for status, _, _ in answers] == [200] * 3 + [429] * 9
        assert all("retry-after" in dict(headers) for status, headers, _ in answers if status == 429)
        assert process.end(signal.SIGINT) == 0


# Its parts over a stand-in for the library manager


def with_processes(
    test: Callable[[HttpProcesses, StandIn, str], Awaitable[None]], oracle: Oracle | None = None, **overrides: Any
) -> None:
    """Two real HTTP processes, answered by a stand-in in this one."""

    async def run() -> None:
        settings = Settings(http_processes=2, drain_timeout_s=20, **overrides)
        metrics, manager = Metrics(), StandIn(oracle or Oracle())
        owner: Any = manager
        data_plane = DataPlane(owner, settings, metrics, ApiKeyStore(settings.api_keys_file, metrics))
        listeners = bind_several("127.0.0.1", 0, "PORT", 2)
        processes = HttpProcesses(settings, listeners, data_plane, owner, metrics)
        serving = asyncio.ensure_future(processes.serve_forever())
        try:
            place = url(listeners[0])
            await until_async(lambda: len(processes.processes) == 2)
            await test(processes, manager, place)
        finally:
            processes.should_exit = True
            await serving
        assert data_plane.pixel_bytes == 0
        assert metrics.value("http_requests_in_flight") == 0

    asyncio.run(run())


async def classify(place: str, image: bytes = IMAGE, **headers: str) -> httpx.Response:
    """On a connection of its own."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        return await client.post(f"{place}/v1/classify", content=image, headers=headers)


def test_only_probabilities_and_refusals_leave_the_service() -> None:
    sent: list[list[Any]] = []

    def record(channel: Channel) -> None:
        send = channel.send

        def recorded(*message: Any) -> None:
            sent.append(list(message))
            send(*message)

        channel.send = recorded  # type: ignore[method-assign]

    async def test(processes: HttpProcesses, manager: StandIn, place: str) -> None:
        for process in processes.processes:
            record(process.channel)
        assert (await classify(place, png(200))).json()["predictions"][0]["label"] == CLASSES[8]
        manager.scheduler.error = DeadlineExceeded()
        late = await classify(place)
        assert (late.status_code, late.json()) == (504, {"error": ErrorMessage.DEADLINE})

    with_processes(test)
    assert {message[0] for message in sent} == {"granted", "answered", "refused", "stop"}
    assert all(len(message) <= 2 for message in sent if message[0] != "refused")
    assert [message[2:] for message in sent if message[0] == "refused"] == [["DeadlineExceeded", None]]


def test_the_memory_for_pixels_is_counted_over_all_processes_and_freed_when_a_client_leaves() -> None:
    """Room for 1,024 pictures, and requests of 300."""
    oracle = Oracle()

    async def test(processes: HttpProcesses, manager: StandIn, place: str) -> None:
        oracle.hold = asyncio.Event()
        body = json.dumps({"images": [base64.b64encode(png()).decode()] * 300}).encode()
        waiting = [asyncio.ensure_future(classify(place, body, **JSON)) for _ in range(3)]
        await until_async(lambda: len(oracle.rows) == 3)
        for _ in range(6):  # both processes refuse
            refused = await classify(place, body, **JSON)
            assert (refused.status_code, refused.json()) == (503, {"error": ErrorMessage.FULL})
        assert len(oracle.rows) == 3
        waiting.pop().cancel()
        await until_async(lambda: oracle.cancelled == 1)
        waiting.append(asyncio.ensure_future(classify(place, body, **JSON)))
        await until_async(lambda: len(oracle.rows) == 4)
        oracle.hold.set()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}

    with_processes(test, oracle, pixel_memory_bytes=1024 * 3072, max_images=512)


def test_statistics_are_those_of_all_processes_whichever_is_asked() -> None:
    """Eight requests of two images, one that fails, each on a connection of its own."""

    async def exchange_in_thread(place: str, name: str) -> tuple[int, Any, bytes]:
        return await asyncio.to_thread(exchange, place, *REQUESTS[name])

    async def test(processes: HttpProcesses, manager: StandIn, place: str) -> None:
        statuses = [(await exchange_in_thread(place, "a binary tensor"))[0] for _ in range(8)]
        statuses.append((await exchange_in_thread(place, "broken JSON"))[0])
        assert statuses == [200] * 8 + [400]
        counted = processes.data_plane.statistics
        await until_async(lambda: counted.counts == {"success": 8, "fail": 1})
        for _ in range(8):
            answer = await asyncio.to_thread(exchange, place, "GET", "/v2/models/stats", b"", {})
            (statistics,) = json.loads(answer[2])["model_stats"]
            assert (statistics["inference_count"], statistics["execution_count"]) == (16, 8)
            ends = statistics["inference_stats"]
            assert (ends["success"]["count"], ends["fail"]["count"]) == (8, 1)
            assert statistics["last_inference"] == counted.last_ms > 0

    with_processes(test)


def test_what_a_killed_process_had_reserved_is_freed() -> None:
    oracle = Oracle()

    async def test(processes: HttpProcesses, manager: StandIn, place: str) -> None:
        oracle.hold = asyncio.Event()
        waiting = [asyncio.ensure_future(classify(place)) for _ in range(12)]
        await until_async(lambda: len(oracle.rows) == 12)
        victim, survivor = processes.processes
        lost = len(victim.reservations)
        assert lost + len(survivor.reservations) == 12
        victim.popen.kill()
        await until_async(lambda: oracle.cancelled == lost and victim.ended)
        assert not victim.reservations
        assert processes.data_plane.pixel_bytes == (12 - lost) * manager.library.input.numel
        oracle.hold.set()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(isinstance(end, httpx.Response) and end.status_code == 200 for end in ends) == 12 - lost
        assert sum(isinstance(end, httpx.HTTPError) for end in ends) == lost

    with_processes(test, oracle)


def test_a_request_is_answered_by_the_library_that_it_began_with() -> None:
    """It is in the engine while another library takes the place; the old one is then let go."""
    oracle = Oracle()

    async def test(processes: HttpProcesses, manager: StandIn, place: str) -> None:
        oracle.hold = asyncio.Event()
        early = asyncio.ensure_future(classify(place))
        await until_async(lambda: len(oracle.rows) == 1)
        old, manager.library = manager.library, type(manager.library)(**vars(manager.library) | {"digest": "cd" * 32})
        successor = StandIn(Oracle(), library=manager.library)
        manager.library = old
        processes.manager = type("Manager", (), {"current": successor, "ready": True, "draining": False})()
        processes.publish()
        assert (await classify(place)).json()["library"] == "cd" * 32
        oracle.hold.set()
        assert (await early).json()["library"] == old.digest
        await until_async(lambda: all(list(each.libraries) == [processes.serial] for each in processes.processes))

    with_processes(test, oracle)


# Settings and the port


def test_a_port_in_use_is_refused_although_several_sockets_share_it() -> None:
    with bind("127.0.0.1", 0, "PORT") as other, pytest.raises(SettingsRejected, match="cannot listen there"):
        bind_several("127.0.0.1", other.getsockname()[1], "PORT", 2)
    shared = bind_several("127.0.0.1", 0, "PORT", 3)
    port = shared[0].getsockname()[1]
    assert {listener.getsockname()[1] for listener in shared} == {port}
    with pytest.raises(SettingsRejected, match="cannot listen there"):
        bind_several("127.0.0.1", port, "PORT", 2)
    for listener in shared:
        assert isinstance(listener, socket.socket)
        listener.close()


def test_shares_add_up_to_the_limits_and_hold_no_token() -> None:
    settings = Settings(http_processes=3, max_requests=100, body_memory_bytes=90 << 20, admin_token=SecretStr(TOKEN))
    share = share_of(settings)
    assert 3 * share["max_requests"] <= 100
    assert 3 * share["body_memory_bytes"] == 90 << 20
    assert not any("token" in name for name in share)
    assert Settings(**json.loads(json.dumps(share))).pixel_memory_bytes == settings.pixel_memory_bytes


@pytest.mark.parametrize(
    "limits", [{"max_requests": 1}, {"body_memory_bytes": 10 << 20, "max_body_bytes": 8 << 20}, {"http_processes": 0}]
)
def test_limits_that_cannot_be_shared_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?i)http_processes|body_memory"):
        Settings(**{"http_processes": 2, **limits})
