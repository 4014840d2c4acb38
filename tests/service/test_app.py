"""Both planes over a real engine and a tiny library, in process."""

import asyncio
import gc
import http.client
import io
import json
import logging
import os
import shutil
import socket
import sys
import weakref
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import Receive, Scope, Send

from model_store.errors import LibraryRejected, StoreError
from model_store.library import Library
from model_store.ticket import Ticket
from service.admin.audit_jobs import AuditQueue
from service.app import create_admin_app
from service.benchmarks.library_check import figures, lines
from service.cpu import NICE_LOADING
from service.engine.base import FoldedTicket, fold_ticket
from service.engine.errors import EngineRejected
from service.errors import ErrorMessage
from service.library_manager import LibraryManager
from service.observability.logs import JsonLines
from service.observability.metrics import Metrics
from service.outbound import loopback_url
from service.settings import Settings, SettingsRejected
from service.web import server
from service.web.auth import ApiKeyStore
from service.web.http_protocol import WriteCoalescingTransport
from service.web.public_app import create_public_app
from tests.support.planes import behind_a_port
from tests.support.serving import TOKEN, tiny_library
from tests.support.waiting import until_async
from tombola.cli import main
from tombola.sample_image import draw_sample

Answer = TypeVar("Answer")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@dataclass
class Planes:
    manager: LibraryManager
    metrics: Metrics
    public: httpx.AsyncClient
    admin: httpx.AsyncClient

    async def classify(self, body: bytes | None = None) -> httpx.Response:
        return await self.public.post("/v1/classify", content=draw_sample() if body is None else body)


def with_planes(
    test: Callable[[Planes], Awaitable[Answer]], library: Path, state: Path, *, load: bool = True, **knobs: Any
) -> Answer:
    """Runs a coroutine of the test against both planes; the admin client holds the token."""

    async def run() -> Answer:
        settings, metrics = Settings(library=library, state_dir=state, engine="torch", **knobs), Metrics()
        manager = LibraryManager(settings, metrics)
        public = create_public_app(manager, settings, metrics, ApiKeyStore(None, metrics))
        admin = create_admin_app(manager, settings, metrics, TOKEN, AuditQueue(settings, metrics, manager.library))
        if load:
            await manager.start()
        authorised = {"authorization": f"Bearer {TOKEN}"}
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(public), base_url="http://public", timeout=60) as one,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(admin), base_url="http://admin", timeout=60, headers=authorised
            ) as two,
        ):
            try:
                return await test(Planes(manager, metrics, one, two))
            finally:
                if load:
                    manager.workers.stop()

    return asyncio.run(run())


def test_a_picture_is_answered_and_nothing_of_theta_with_it(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        response = await planes.classify()
        assert response.status_code == 200
        answer = response.json()
        assert set(answer) == {"request_id", "library", "predictions"}
        assert answer["library"] == tiny.digest
        assert answer["request_id"] == response.headers["x-request-id"]
        assert answer["predictions"][0]["label"] in tiny.classes
        revealed = json.dumps(answer) + str(response.headers)
        assert not any(word in revealed for word in ("resnet", "theta", "member", "alpha", "density", "seed"))
        assert response.headers["cache-control"] == "no-store"

    with_planes(ask, tiny.path, state)


def test_ready_only_once_the_library_is_there(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        assert (await planes.public.get("/health/live")).status_code == 200
        refused = await planes.public.get("/health/ready")
        assert refused.status_code == 503
        assert planes.manager.reason == "loading"
        assert (await planes.classify()).status_code == 503
        await planes.manager.start()
        assert (await planes.public.get("/health/ready")).status_code == 200
        assert planes.metrics.value("ready") == 1
        planes.manager.workers.broken = True
        assert (await planes.public.get("/health/ready")).status_code == 503
        assert planes.manager.reason == "engine"
        planes.manager.workers.stop()

    with_planes(ask, tiny.path, state, load=False)


def test_while_draining_work_is_answered_and_connections_end(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        assert "connection" not in (await planes.classify()).headers
        planes.manager.drain()
        assert (await planes.public.get("/health/ready")).status_code == 503
        assert (await planes.public.get("/health/live")).status_code == 200
        answered = await planes.classify()
        assert answered.status_code == 200
        assert answered.headers["connection"] == "close"
        assert planes.metrics.value("draining") == 1

    with_planes(ask, tiny.path, state)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops what comes to one port")
def test_who_comes_while_the_port_is_being_closed_is_neither_served_nor_reset() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname(), timeout=5) as before:
        before.sendall(b"before")
        server.drop_new_connections(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.2)
        (accepted,) = server.drain_accept_backlog(listener)
        with accepted:
            accepted.settimeout(5)
            assert accepted.recv(6) == b"before"


def test_the_admin_plane_wants_its_token_but_for_metrics_and_health(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        bare = httpx.AsyncClient(transport=planes.admin._transport, base_url="http://admin")
        for path in ("/admin/library", "/admin/policy"):
            assert (await bare.get(path)).status_code == 401
            assert (await planes.admin.get(path)).status_code == 200
        assert (await bare.get("/metrics")).status_code == 200
        assert (await bare.get("/health/ready")).status_code == 200
        for path in ("/metrics", "/admin/library", "/admin/policy"):
            assert (await planes.public.get(path, headers=dict(planes.admin.headers))).status_code == 404

    with_planes(ask, tiny.path, state)


def test_metrics_tell_requests_by_route_and_a_flood_of_paths_adds_no_lines(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        await planes.classify()
        await planes.public.get("/nowhere")
        lines_before = len((await planes.admin.get("/metrics")).text.splitlines())
        for number in range(50):
            await planes.public.get(f"/path/{number}")
            await planes.public.post(f"/v2/models/model-{number}/infer", content=b"{}")
        await planes.public.post("/v2/models/another/versions/7/infer", content=b"{}")
        text = (await planes.admin.get("/metrics")).text
        assert 'tombola_http_requests_total{code="200",method="POST",route="/v1/classify"} 1.0' in text
        assert 'tombola_http_requests_total{code="404",method="GET",route="unmatched"} 51.0' in text
        assert "model-7" not in text
        assert len(text.splitlines()) - lines_before < 60  # two routes' series, whatever was asked

    with_planes(ask, tiny.path, state)


def test_draws_and_ensemble_sizes_appear_in_lots(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        rows = np.zeros((100, 3, 32, 32), np.uint8)
        serving = planes.manager.current
        assert serving is not None
        await serving.scheduler.submit(rows, client="someone")
        assert planes.metrics.value("ensemble_size_count") == 0
        await serving.scheduler.submit(rows, client="someone")
        assert planes.metrics.value("ensemble_size_count") >= 128
        densities = {f"{ticket.density:g}" for ticket in tiny.tickets}
        assert densities == {"0.2", "0.5"}
        drawn = [
            planes.metrics.value("draws_total", structure=structure, density=density)
            for structure in ("resnet18", "resnet34")
            for density in densities
        ]
        assert all(drawn)

    with_planes(ask, tiny.path, state)


def test_a_crowd_is_turned_away_while_health_is_answered(tiny: Library, state: Path) -> None:
    async def ask(planes: Planes) -> None:
        hold = asyncio.Event()

        async def slow_body() -> Any:
            yield draw_sample()[:100]
            await hold.wait()
            yield draw_sample()[100:]

        waiting = asyncio.ensure_future(planes.public.post("/v1/classify", content=slow_body()))
        await until_async(lambda: planes.metrics.value("http_requests_in_flight") == 1)
        refused = await planes.classify()
        assert refused.status_code == 503
        assert refused.json() == {"error": ErrorMessage.FULL}
        assert int(refused.headers["retry-after"]) >= 1
        assert (await planes.public.get("/health/ready")).status_code == 200
        hold.set()
        assert (await waiting).status_code == 200
        assert planes.metrics.value("shed_total", reason="inflight") == 1
        assert planes.metrics.value("http_requests_in_flight") == 0

    with_planes(ask, tiny.path, state, max_requests=1)


# Swapping the library


def test_a_swap_serves_the_new_library_and_a_bad_one_changes_nothing(state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    first = tiny_library(folder)

    async def swap(planes: Planes) -> None:
        second = tiny_library(folder, seed=50)
        assert second.digest != first.digest
        assert (await planes.classify()).json()["library"] == first.digest
        swapped = await planes.admin.post("/admin/library")
        assert swapped.json() == {"digest": second.digest, "before": first.digest}
        assert (await planes.classify()).json()["library"] == second.digest
        ticket = next((folder / "tickets").iterdir())
        ticket.write_bytes(ticket.read_bytes()[:-1])
        refused = await planes.admin.post("/admin/library")
        assert refused.status_code == 422
        assert str(folder) not in refused.text
        assert (await planes.classify()).json()["library"] == second.digest
        assert (await planes.public.get("/health/ready")).status_code == 200
        assert planes.metrics.value("library_swaps_total", outcome="ok") == 1
        assert planes.metrics.value("library_swaps_total", outcome="refused") == 1
        assert planes.metrics.value("library_info", digest=second.digest) == 1
        assert planes.metrics.value("library_info", digest=first.digest) == 0

    with_planes(swap, folder, state)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_only_a_library_that_follows_another_is_opened_by_threads_that_stand_back(
    tiny: Library, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    priorities: list[int] = []

    def fold(ticket: Ticket) -> FoldedTicket:
        priorities.append(os.getpriority(os.PRIO_PROCESS, 0))
        return fold_ticket(ticket)

    async def ask(planes: Planes) -> None:
        assert set(priorities) == {usual}
        priorities.clear()
        await planes.manager.reload()
        assert set(priorities) == {min(19, usual + NICE_LOADING)}
        assert (await planes.classify()).status_code == 200

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr("service.engine.factory.fold_ticket", fold)
    with_planes(ask, tiny.path, state)


def test_a_replaced_library_goes_though_something_dead_still_holds_it(tiny: Library, state: Path) -> None:
    async def swap(planes: Planes) -> None:
        assert planes.manager.current is not None
        engine = weakref.ref(planes.manager.current.engine)
        circle: list[Any] = [planes.manager.current]
        circle.append(circle)
        del circle
        gc.disable()  # a server at rest allocates nothing that would start a collection
        try:
            await planes.manager.reload()
            await until_async(lambda: engine() is None)
        finally:
            gc.enable()
        assert (await planes.classify()).status_code == 200

    with_planes(swap, tiny.path, state)


def test_a_request_keeps_the_library_it_began_with(state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    first = tiny_library(folder)

    async def swap(planes: Planes) -> None:
        hold = asyncio.Event()

        async def slow_body() -> Any:
            yield draw_sample()[:100]
            await hold.wait()
            yield draw_sample()[100:]

        begun = asyncio.ensure_future(planes.public.post("/v1/classify", content=slow_body()))
        await until_async(lambda: planes.metrics.value("http_requests_in_flight") == 1)
        second = tiny_library(folder, seed=50)
        await planes.manager.reload()
        assert (await planes.classify()).json()["library"] == second.digest
        hold.set()
        assert (await begun).json()["library"] == first.digest

    with_planes(swap, folder, state)


def test_an_engine_that_refuses_a_library_is_a_library_refused(
    tiny: Library, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise EngineRejected("no such device")

    async def swap(planes: Planes) -> None:
        before = planes.manager.current
        monkeypatch.setattr("service.library_manager.open_for_serving", refuse)
        with pytest.raises(StoreError, match="no such device"):
            await planes.manager.reload()
        assert planes.manager.current is before

    with_planes(swap, tiny.path, state)


# Starting


def test_an_altered_library_is_never_served(tiny: Library, state: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.path, tmp_path / "library"))
    ticket = min((folder / "tickets").iterdir())
    data = bytearray(ticket.read_bytes())
    data[-1] ^= 1
    ticket.write_bytes(data)

    async def start(planes: Planes) -> None:
        with pytest.raises(StoreError, match=ticket.name):
            await planes.manager.start()
        assert planes.manager.current is None
        assert (await planes.public.get("/health/ready")).status_code == 503
        planes.manager.workers.stop()

    with_planes(start, folder, state, load=False)


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsRejected, match=rf"TOMBOLA_PORT 127\.0\.0\.1:{port}: cannot listen there"):
            server.bind("127.0.0.1", port, "PORT")


NEEDS_IPV6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6 beside IPv4")


def get(address: str, port: int) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(address, port, timeout=30)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read()


async def who_asks(scope: Scope, _: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["client"][0].encode()})


@NEEDS_IPV6
@pytest.mark.parametrize("host", ["::", "[::]", "0:0:0:0:0:0:0:0"])
def test_a_port_of_all_addresses_takes_both_families_and_an_ipv4_client_keeps_its_address(host: str) -> None:
    """Limits, logs and trusted proxies go by that address: ::ffff:127.0.0.1 would be somebody else."""
    listener = server.bind(host, 0, "PORT")
    port = listener.getsockname()[1]
    assert loopback_url(server.url(listener)) == f"http://[::1]:{port}"
    with behind_a_port(cast("Any", who_asks), listener):
        assert get("127.0.0.1", port) == (200, b"127.0.0.1")
        assert get("::1", port) == (200, b"::1")


@NEEDS_IPV6
@pytest.mark.parametrize(("host", "other"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1"), ("0.0.0.0", "::1")])
def test_a_port_of_one_family_takes_no_other(host: str, other: str) -> None:
    with server.bind(host, 0, "PORT") as listener, pytest.raises(OSError, match="refused"):
        socket.create_connection((other, listener.getsockname()[1]), timeout=30).close()


def test_a_name_that_leads_nowhere_is_said_in_one_line() -> None:
    with pytest.raises(SettingsRejected, match=r"TOMBOLA_PORT nowhere\.invalid:0: cannot listen there \("):
        server.bind("nowhere.invalid", 0, "PORT")


def test_check_measures_a_library(tiny: Library, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny.path), "--state-dir", str(state), "--engine", "torch", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["digest"] == tiny.digest
    assert checked["tickets"] == 4
    assert set(checked["median_ms"]) == {"1", "2", "3", "4"}
    assert checked["difference"] <= 1e-4
    assert lines(checked)[-1].startswith("Whole: 4 tickets")


def test_check_refuses_a_library_the_engine_cannot_run(tiny: Library, state: Path) -> None:
    with pytest.raises(LibraryRejected, match="toaster"):
        figures(Settings(library=tiny.path, state_dir=state, device="toaster"))


def test_the_sample_is_a_picture_and_the_same_each_time(tmp_path: Path) -> None:
    assert main(["sample", str(tmp_path / "ship.png")]) == 0
    with Image.open(io.BytesIO((tmp_path / "ship.png").read_bytes())) as image:
        assert image.size == (256, 256)
    assert (tmp_path / "ship.png").read_bytes() == draw_sample()


# One answer, one write


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def test_what_is_written_in_one_turn_of_the_loop_leaves_as_one_and_before_the_end() -> None:
    async def write() -> list[bytes]:
        wire = Wire()
        together = WriteCoalescingTransport(wire, asyncio.get_running_loop())
        together.write(b"head ")
        together.write(b"body")
        assert wire.sent == []
        await asyncio.sleep(0)
        together.write(b"last")
        together.close()
        assert together.is_closing()
        together.write(b"too late")
        await asyncio.sleep(0)
        return wire.sent

    assert asyncio.run(write()) == [b"head body", b"last"]


# Logs


def test_failures_are_logged_one_by_one_and_refusals_only_counted(
    tiny: Library, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.web.middleware")

    def statuses() -> list[int]:
        return [
            record.__dict__["fields"]["status"] for record in caplog.records if record.name == "service.web.middleware"
        ]

    async def ask(planes: Planes) -> None:
        planes.manager.drain()
        planes.manager.workers.stop()
        assert (await planes.classify()).status_code == 503
        assert not statuses()
        planes.manager.workers.closing = False
        for kind in ("submit", "check"):
            setattr(planes.manager.current.scheduler, kind, None)  # type: ignore[union-attr]
        assert (await planes.classify()).status_code == 500
        assert statuses() == [500]

    with_planes(ask, tiny.path, state)


def test_log_lines_are_json_and_never_quote_an_exception() -> None:
    with pytest.raises(ValueError, match="somebody") as raised:
        int("the-body-or-token-of-somebody")
    record = logging.LogRecord("service", logging.ERROR, __file__, 1, "failed", (), raised._excinfo)
    record.fields = {"request_id": "ab12"}
    line = JsonLines().format(record)
    entry = json.loads(line)
    assert (entry["level"], entry["message"], entry["request_id"]) == ("error", "failed", "ab12")
    assert entry["error"].startswith("ValueError at ")
    assert "somebody" not in line
