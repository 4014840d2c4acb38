"""What the console asks of the admin plane: the state at a glance, a picture tried, an audit's cost."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import numpy as np
import pytest

from model_store.library import Library
from model_store.policy import inclusion_probabilities
from service.admin.audit_jobs import AuditQueue
from service.admin.console_api import DRAWS, latency, summarize_draws
from service.app import create_admin_app, create_public_app
from service.errors import ErrorMessage
from service.library_manager import LibraryManager
from service.observability.metrics import PUBLISH_EVERY, Metrics
from service.settings import Settings
from service.web.auth import ApiKeyStore
from tests.support.planes import TOKEN, png, refused
from tests.support.serving import tiny_library

Answer = TypeVar("Answer")
CLASSES: Final = ("cat", "dog", "ship")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("tiny"))


class Plane:
    """Both planes in process, as they are served."""

    def __init__(self, library: Path, state: Path, **knobs: Any) -> None:
        settings = Settings(library=library, state_dir=state, engine="torch", **knobs)
        self.metrics = Metrics()
        self.manager = LibraryManager(settings, self.metrics)
        jobs = AuditQueue(settings, self.metrics, self.manager.library)
        admin = create_admin_app(self.manager, settings, self.metrics, TOKEN, jobs)
        public = create_public_app(self.manager, settings, self.metrics, ApiKeyStore(None, self.metrics))
        self.admin = client(admin, authorization=f"Bearer {TOKEN}")
        self.stranger = client(admin)
        self.public = client(public)


def client(app: Any, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://tombola", timeout=60, headers=headers)


def with_plane(
    test: Callable[[Plane], Awaitable[Answer]], library: Library, state: Path, *, load: bool = True, **knobs: Any
) -> Answer:
    async def run() -> Answer:
        plane = Plane(library.path, state, **knobs)
        if load:
            await plane.manager.start()
        try:
            return await test(plane)
        finally:
            if load:
                plane.manager.workers.stop()

    return asyncio.run(run())


def test_nothing_is_told_without_the_token(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        for method, path in (
            ("GET", "/admin/overview"),
            ("POST", "/admin/try"),
            ("GET", "/admin/profiles"),
            ("POST", "/admin/audits/cost"),
        ):
            refused(await plane.stranger.request(method, path), 401, ErrorMessage.TOKEN_REQUIRED)

    with_plane(ask, tiny, tmp_path, load=False)


def test_before_the_library_is_there_it_says_why_nothing_is_ready(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        found = (await plane.admin.get("/admin/overview")).json()
        assert (found["ready"], found["reason"]) == (False, "loading")
        assert found["library"] is found["engine"] is found["draws"] is None
        refused(await plane.admin.post("/admin/try", content=png()), 503, ErrorMessage.NOT_READY)
        refused(await plane.admin.post("/admin/audits/cost", json={"profile": "smoke"}), 503, ErrorMessage.NOT_READY)

    with_plane(ask, tiny, tmp_path, load=False)


def test_requests_images_and_latencies_are_counted_and_draws_beside_their_law(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        assert (await plane.public.post("/v1/classify", content=png())).status_code == 200
        assert (await plane.public.post("/v1/classify", content=b"no image")).status_code == 415
        for _ in range(2):
            assert (await plane.admin.post("/admin/try", content=png())).status_code == 200
        found = (await plane.admin.get("/admin/overview")).json()
        assert (found["ready"], found["reason"]) == (True, "")
        assert found["library"] == {"digest": tiny.digest, "tickets": 4, "baselines": 0, "classes": 10}
        assert found["traffic"]["outcomes"]["ok"] == 1
        assert found["traffic"]["outcomes"]["invalid"] == 1
        assert found["traffic"]["images"] == 1 + 2 * DRAWS
        assert found["traffic"]["latency"]["counts"][-1] == 1
        assert [row["probability"] for row in found["draws"]["tickets"]] == list(inclusion_probabilities(tiny.policy))
        assert sum(row["drawn"] for row in found["draws"]["tickets"]) == 0  # below LOT nothing is published

    with_plane(ask, tiny, tmp_path)


def test_draws_are_published_a_lot_at_a_time(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        for _ in range(-(-PUBLISH_EVERY // DRAWS)):
            assert (await plane.admin.post("/admin/try", content=png())).status_code == 200
        draws = (await plane.admin.get("/admin/overview")).json()["draws"]
        images = draws["sizes"][-1]
        assert images >= PUBLISH_EVERY
        assert sum(row["drawn"] for row in draws["tickets"]) >= images
        for row in draws["tickets"]:
            assert row["expected"] == pytest.approx(images * row["probability"])

    with_plane(ask, tiny, tmp_path)


def test_a_picture_is_asked_about_twenty_times_and_no_theta_is_told(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        response = await plane.admin.post("/admin/try", content=png())
        answer = response.json()
        assert set(answer) == {"library", "draws", "seconds", "label", "agreement", "classes"}
        assert answer["draws"] == sum(row["votes"] for row in answer["classes"]) == DRAWS
        assert answer["label"] == answer["classes"][0]["label"]
        assert all(row["low"] <= row["mean"] <= row["high"] for row in answer["classes"])
        said = json.dumps(answer) + str(response.headers)
        assert not any(word in said for word in ("resnet", "theta", "member", "alpha", "density", "seed"))

    with_plane(ask, tiny, tmp_path)


def test_what_is_no_image_is_refused_in_words(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        refused(await plane.admin.post("/admin/try", content=b"no image"), 415, ErrorMessage.IMAGE_FORMAT)
        refused(await plane.admin.post("/admin/try", content=b""), 400, ErrorMessage.IMAGE_EMPTY)
        refused(await plane.admin.post("/admin/try", content=png()[:60]), 400, ErrorMessage.IMAGE_DAMAGED)
        assert "larger than 1024 bytes" in refused(await plane.admin.post("/admin/try", content=bytes(1025)), 400)

    with_plane(ask, tiny, tmp_path, max_body_bytes=1024)


def test_the_cost_of_an_audit_is_told_before_it_starts_and_nothing_starts(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        small, large = [
            (await plane.admin.post("/admin/audits/cost", json={"profile": "smoke", "images": n})).json()
            for n in (4, 40)
        ]
        assert 0 < small["giga_multiply_adds"] < large["giga_multiply_adds"]
        assert small["attacks"] == large["attacks"]
        for wrong in ({"profile": "smoke", "images": -1}, {"profile": "standard"}, {}):
            refused(await plane.admin.post("/admin/audits/cost", json=wrong), 400)
        refused(await plane.admin.post("/admin/audits/cost", json={"profile": "smoke", "data": "x"}), 404)

    with_plane(ask, tiny, tmp_path)
    assert not (tmp_path / "audits").exists()


def test_every_profile_names_its_attacks(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        found = (await plane.admin.get("/admin/profiles")).json()
        assert [profile["name"] for profile in found["profiles"]] == ["smoke", "standard", "full", "reference"]
        for norm, sizes in found["epsilons"].items():
            assert sizes == sorted(sizes)
            assert found["headline"][norm] in sizes
        for profile in found["profiles"]:
            assert set(profile["attacks"]) == set(found["epsilons"])
            assert all(attacks and set(attacks) <= set(found["attacks"]) for attacks in profile["attacks"].values())

    with_plane(ask, tiny, tmp_path, load=False)


def test_latency_counts_answered_classifications_alone() -> None:
    metrics = Metrics()
    for route, code, seconds in (
        ("/v1/classify", "200", 0.003),
        ("/v1/classify", "200", 0.3),
        ("/v2/models/{model}/infer", "200", 0.003),
        ("/v1/classify", "503", 0.0001),
        ("/health/ready", "200", 0.0001),
    ):
        metrics.observe("http_request_duration_seconds", seconds, route=route, code=code)
    found = dict(zip((*latency(metrics)["bounds"], "all"), latency(metrics)["counts"], strict=True))
    assert (found[0.0025], found[0.005], found[0.25], found[0.5], found["all"]) == (0, 2, 2, 3, 3)


def test_the_spread_of_draws_by_hand() -> None:
    found = summarize_draws(np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], np.float32), CLASSES)
    assert (found["label"], found["agreement"]) == ("cat", 0.6667)
    assert found["classes"][0] == {"label": "cat", "votes": 2, "mean": 0.4333, "low": 0.2, "high": 0.6}
    assert [row["votes"] for row in found["classes"]] == [2, 1, 0]
