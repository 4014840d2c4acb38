"""The admin plane: who gets in, what it shows, and how a library is swapped."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from prometheus_client import parser as text
from prometheus_client.openmetrics import parser as openmetrics

from model_store.errors import LibraryRejected
from model_store.library import Library, open_library
from model_store.policy import states
from service.admin.audit_jobs import AuditQueue
from service.app import create_admin_app
from service.errors import ErrorMessage, RateLimited
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings, SettingsRejected
from service.web.auth import FAILURES, PAUSE_S, ApiKeyStore, FailedLoginLimiter, read_keys
from tests.support.planes import TOKEN, StandIn, admin_app, ask, refused
from tests.support.serving import tiny_library

BEARER: Final = {"authorization": f"Bearer {TOKEN}"}
PATHS: Final = (
    ("GET", "/admin/library"),
    ("POST", "/admin/library"),
    ("POST", "/admin/library/diff"),
    ("GET", "/admin/policy"),
    ("GET", "/admin/audits"),
)


class TestMetrics:
    OPEN: Final = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"

    def test_a_scraper_gets_openmetrics_and_everybody_else_text(self) -> None:
        app = admin_app()
        for accept, kind, parse in (
            (self.OPEN, "application/openmetrics-text; version=1.0.0", openmetrics.text_string_to_metric_families),
            ("*/*", "text/plain; version=", text.text_string_to_metric_families),
            ("text/html", "text/plain; version=", text.text_string_to_metric_families),
            ("text/plain;version=0.0.4", "text/plain; version=0.0.4", text.text_string_to_metric_families),
        ):
            response = ask(app, "GET", "/metrics", headers={"accept": accept, "accept-encoding": "identity"})
            assert response.headers["content-type"].startswith(kind)
            assert set(response.headers["vary"].split(", ")) == {"Accept", "Accept-Encoding"}
            families = {family.name for family in parse(response.text)}
            assert {"tombola_ready", "tombola_http_request_duration_seconds", "process_cpu_seconds"} <= families
            assert response.text.endswith("# EOF\n") == (accept == self.OPEN)

    @pytest.mark.parametrize(
        ("accepted", "coding"),
        [
            ("gzip", "gzip"),
            ("deflate, GZIP;q=0.5", "gzip"),
            ("br, gzip ; q=1.0", "gzip"),
            ("identity", None),
            ("", None),
            ("gzip;q=0", None),
            ("gzip; q=0.000, deflate", None),
        ],
    )
    def test_the_metrics_are_compressed_for_whom_that_suits(self, accepted: str, coding: str | None) -> None:
        response = ask(admin_app(), "GET", "/metrics", headers={"accept-encoding": accepted})
        assert response.headers.get("content-encoding") == coding
        assert "tombola_ready" in response.text  # unpacked by the client
        length = int(response.headers["content-length"])
        assert length < len(response.content) if coding else length == len(response.content)


class TestTheToken:
    @pytest.mark.parametrize(("method", "path"), PATHS)
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": "Bearer "},
            {"authorization": f"Bearer {TOKEN}x"},
            {"authorization": f"Bearer {TOKEN[:-1]}"},
            {"authorization": f"Basic {TOKEN}"},
            {"authorization": TOKEN},
            {"x-api-key": TOKEN},
            {"cookie": f"token={TOKEN}"},
        ],
    )
    def test_nothing_passes_without_the_token(self, method: str, path: str, headers: dict[str, str]) -> None:
        metrics = Metrics()
        response = ask(admin_app(metrics=metrics), method, path, headers=headers)
        refused(response, 401, ErrorMessage.TOKEN_REQUIRED)
        assert response.headers["www-authenticate"] == "Bearer"
        assert metrics.value("auth_failures_total", plane="admin") == 1

    def test_paths_that_do_not_exist_are_behind_it_too(self) -> None:
        refused(ask(admin_app(), "GET", "/secret"), 401, ErrorMessage.TOKEN_REQUIRED)
        refused(ask(admin_app(), "GET", "/secret", headers=BEARER), 404, ErrorMessage.NOT_FOUND)
        refused(ask(admin_app(), "GET", "/consoles"), 401, ErrorMessage.TOKEN_REQUIRED)
        refused(ask(admin_app(), "GET", "//admin/library"), 401, ErrorMessage.TOKEN_REQUIRED)

    def test_health_is_open(self) -> None:
        for path in ("/health/live", "/health/ready"):
            assert ask(admin_app(), "GET", path).status_code == 200
        refused(ask(admin_app(StandIn(ready=False)), "GET", "/health/ready"), 503, ErrorMessage.NOT_READY)

    def test_metrics_are_open_unless_the_settings_close_them(self) -> None:
        assert "tombola_ready" in ask(admin_app(), "GET", "/metrics").text
        closed = admin_app(metrics_open=False)
        refused(ask(closed, "GET", "/metrics"), 401, ErrorMessage.TOKEN_REQUIRED)
        response = ask(closed, "GET", "/metrics", headers=BEARER)
        assert response.headers["content-type"].startswith("text/plain")

    def test_a_token_in_the_url_is_refused_even_beside_the_right_one(self) -> None:
        for name in ("token", "access_token", "Authorization"):
            refused(
                ask(admin_app(), "GET", f"/admin/policy?{name}={TOKEN}", headers=BEARER), 400, ErrorMessage.TOKEN_IN_URL
            )
            refused(ask(admin_app(), "GET", f"/metrics?{name}={TOKEN}"), 400, ErrorMessage.TOKEN_IN_URL)

    def test_two_different_tokens_are_refused(self) -> None:
        headers = [("authorization", "Bearer x"), ("authorization", f"Bearer {TOKEN}")]
        refused(ask(admin_app(), "GET", "/admin/policy", headers=headers), 400, ErrorMessage.HEADER_TWICE)

    def test_after_many_failures_the_address_has_to_wait(self) -> None:
        async def attempts() -> list[httpx.Response]:
            transport = httpx.ASGITransport(admin_app())
            async with httpx.AsyncClient(transport=transport, base_url="http://tombola") as client:
                wrong = [await client.get("/admin/policy") for _ in range(FAILURES + 1)]
                return [*wrong, await client.get("/admin/policy", headers=BEARER)]

        *wrong, right = asyncio.run(attempts())
        assert [response.status_code for response in wrong] == [401] * FAILURES + [429]
        refused(right, 429, ErrorMessage.FAILURES)
        assert 1 <= int(right.headers["retry-after"]) <= PAUSE_S + 1

    def test_the_token_is_never_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        for headers in (BEARER, {"authorization": f"Bearer {TOKEN}x"}):
            ask(admin_app(), "GET", "/admin/policy", headers=headers)
            ask(admin_app(), "GET", f"/admin/policy?token={TOKEN}", headers=headers)
        ours = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]
        assert ours
        assert TOKEN not in "".join(ours)


class TestFailures:
    def test_one_more_after_each_pause(self) -> None:
        now = [0.0]
        failures = FailedLoginLimiter(lambda: now[0])
        for _ in range(FAILURES):
            failures.check("a")
            failures.note("a")
        with pytest.raises(RateLimited) as caught:
            failures.check("a")
        assert caught.value.retry_after == PAUSE_S + 1
        failures.check("b")
        now[0] = PAUSE_S + 0.01
        failures.check("a")
        failures.note("a")
        with pytest.raises(RateLimited):
            failures.check("a")

    def test_memory_is_bounded_whatever_the_number_of_addresses(self) -> None:
        failures = FailedLoginLimiter(lambda: 0.0)
        for number in range(5000):
            failures.note(str(number))
        assert len(failures.until) <= 1024


class TestKeyFiles:
    def test_reloading_takes_new_keys_and_keeps_the_old_ones_when_the_file_is_bad(self, tmp_path: Any) -> None:
        path = tmp_path / "keys"
        path.write_text(f"alice {'a' * 64}\n")
        keys = ApiKeyStore(path, Metrics())
        path.write_text(f"bob {'b' * 64}\ncarol {'c' * 64}\n")
        keys.reload()
        assert sorted(keys.owners.values()) == ["bob", "carol"]
        path.write_text("bob plaintext\n")
        keys.reload()
        path.unlink()
        keys.reload()
        assert sorted(keys.owners.values()) == ["bob", "carol"]

    @pytest.mark.parametrize(
        "line", ["alice", "alice secret", f"two words {'a' * 64}", f"alice {'A' * 64}", f"alice {'a' * 63}"]
    )
    def test_a_bad_line_is_named_but_not_quoted(self, tmp_path: Any, line: str) -> None:
        path = tmp_path / "keys"
        path.write_text(f"# comment\n{line}\n")
        with pytest.raises(SettingsRejected, match="line 2") as caught:
            read_keys(path)
        assert line not in str(caught.value)

    def test_a_missing_file(self, tmp_path: Any) -> None:
        with pytest.raises(SettingsRejected, match="cannot be read"):
            read_keys(tmp_path / "none")


class TestLibrary:
    @pytest.fixture
    def manager(self, small_library: Library) -> StandIn:
        return StandIn(library=small_library)

    def test_it_is_shown_with_digests_claims_and_provenance(self, manager: StandIn, small_library: Library) -> None:
        shown = ask(admin_app(manager), "GET", "/admin/library", headers=BEARER).json()
        assert (shown["digest"], shown["tickets"]) == (small_library.digest, 8)
        entry = shown["entries"][0]
        assert entry["sha256"] == small_library.entries[0].sha256
        assert {"provenance", "claims", "density", "structure", "kind"} <= set(entry)
        assert shown["version"] == 1
        assert (shown["input"]["height"], shown["input"]["width"], shown["input"]["resize"]) == (32, 32, "squash")

    def test_the_law_of_theta_is_exact(self, manager: StandIn, small_library: Library) -> None:
        answer = ask(admin_app(manager), "GET", "/admin/policy", headers=BEARER).json()
        assert answer["library"] == small_library.digest
        assert answer["states"] == states(small_library.policy)
        assert abs(sum(answer["size_probabilities"].values()) - 1) < 1e-12
        assert set(answer["inclusion_probabilities"]) == {entry.name for entry in small_library.entries}
        assert abs(sum(answer["inclusion_probabilities"].values()) - answer["expected_size"]) < 1e-12

    def test_swapping_answers_with_both_digests(self, manager: StandIn) -> None:
        def swap() -> None:
            manager.library = type("Library", (), {"digest": "new"})()

        before = manager.library.digest
        manager.on_reload = swap
        response = ask(admin_app(manager), "POST", "/admin/library", headers=BEARER, json={"path": "/etc/passwd"})
        assert response.json() == {"digest": "new", "before": before}

    def test_a_bad_library_is_refused_without_a_word_of_why_on_the_wire(
        self, manager: StandIn, caplog: pytest.LogCaptureFixture
    ) -> None:
        def bad() -> None:
            raise LibraryRejected("/srv/library/tickets/x.safetensors: damaged")

        manager.on_reload = bad
        refused(ask(admin_app(manager), "POST", "/admin/library", headers=BEARER), 422, ErrorMessage.LIBRARY_REFUSED)
        assert "damaged" in caplog.text

    def test_one_swap_at_a_time(self, manager: StandIn) -> None:
        async def both() -> list[int]:
            go, begun = asyncio.Event(), asyncio.Event()

            class Slow(StandIn):
                async def reload(self, digest: str | None = None) -> StandIn:
                    begun.set()
                    await go.wait()
                    return self

            transport = httpx.ASGITransport(admin_app(Slow(library=manager.library)))
            async with httpx.AsyncClient(transport=transport, base_url="http://tombola", headers=BEARER) as client:
                first = asyncio.ensure_future(client.post("/admin/library"))
                await begun.wait()
                second = await client.post("/admin/library")
                go.set()
                refused(second, 409, ErrorMessage.SWAP_RUNNING)
                return [(await first).status_code, second.status_code]

        assert asyncio.run(both()) == [200, 409]

    def test_before_the_first_library(self) -> None:
        for method, path in PATHS[:4]:
            refused(ask(admin_app(StandIn(loaded=False)), method, path, headers=BEARER), 503, ErrorMessage.NOT_READY)


class TestDryRun:
    """Over the real manager, with the library behind a link that a test points elsewhere."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        tiny_library(tmp_path / "first")
        tiny_library(tmp_path / "second", structures=("resnet18",))
        link(tmp_path, "first")
        return tmp_path

    def run(self, place: Path, test: Callable[[LibraryManager, httpx.AsyncClient], Awaitable[None]]) -> None:
        async def serve() -> None:
            settings, metrics = Settings(library=place / "served", state_dir=place, engine="torch"), Metrics()
            manager = LibraryManager(settings, metrics)
            queue = AuditQueue(settings, metrics, manager.library)
            app = create_admin_app(manager, settings, metrics, TOKEN, queue)
            await manager.start()
            transport = httpx.ASGITransport(app)
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=BEARER) as client:
                    await test(manager, client)
            finally:
                manager.workers.stop()

        asyncio.run(serve())

    def test_it_shows_what_would_change_and_changes_nothing(self, place: Path) -> None:
        async def test(manager: LibraryManager, client: httpx.AsyncClient) -> None:
            before = manager.library().digest
            same = (await client.post("/admin/library/diff")).json()
            assert (same["before"], same["after"], same["tickets"]) == (before, before, [])
            link(place, "second")
            second = open_library(place / "second")
            difference = (await client.post("/admin/library/diff")).json()
            assert (difference["before"], difference["after"]) == (before, second.digest)
            assert difference["source"] == str(place / "served")
            assert difference["shared"] == ["policy"]
            assert [(row["name"], row["difference"]) for row in difference["tickets"]] == [
                ("resnet34-20", "removed"),
                ("resnet34-50", "removed"),
            ]
            assert difference["unchanged"] == 2
            assert manager.library().digest == before

        self.run(place, test)

    def test_the_library_that_was_shown_is_served_and_no_other(self, place: Path) -> None:
        async def test(manager: LibraryManager, client: httpx.AsyncClient) -> None:
            before = manager.library().digest
            link(place, "second")
            shown = (await client.post("/admin/library/diff")).json()["after"]
            link(place, "first")
            refused(await client.post(f"/admin/library?digest={shown}"), 409, ErrorMessage.LIBRARY_CHANGED)
            assert manager.library().digest == before
            assert manager.metrics.value("library_swaps_total", outcome="refused") == 1
            link(place, "second")
            answer = await client.post(f"/admin/library?digest={shown}")
            assert answer.json() == {"digest": shown, "before": before}
            assert manager.library().digest == shown

        self.run(place, test)

    def test_a_damaged_library_is_refused_without_a_word_of_why_on_the_wire(
        self, place: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (place / "second" / "manifest.json").write_text("{}")

        async def test(manager: LibraryManager, client: httpx.AsyncClient) -> None:
            before = manager.library().digest
            link(place, "second")
            refused(await client.post("/admin/library/diff"), 422, ErrorMessage.LIBRARY_REFUSED)
            assert manager.library().digest == before

        self.run(place, test)
        assert "manifest.json" in caplog.text

    @pytest.mark.parametrize(
        "query",
        [
            "digest=",
            "digest=ab",
            "digest=" + "A" * 64,
            "digest=" + "a" * 65,
            "digest=" + "a" * 64 + "%0a",
            "&".join(["digest=" + "a" * 64] * 2),
            "digest=../../etc/passwd",
            "digest=" + "%F0%9F%98%80" * 64,
        ],
    )
    def test_a_digest_that_is_none_is_refused_before_anything_is_opened(self, query: str) -> None:
        def opened() -> None:
            raise AssertionError

        manager = StandIn(on_reload=opened)
        refused(ask(admin_app(manager), "POST", f"/admin/library?{query}", headers=BEARER), 400, ErrorMessage.DIGEST)


def link(place: Path, name: str) -> None:
    """What is configured from now on."""
    new = place / "new"
    new.symlink_to(place / name)
    new.rename(place / "served")
