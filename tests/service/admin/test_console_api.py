"""What the console asks of the admin plane: the state at a glance, a picture tried, an audit's cost."""

import json
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from model_store.library import Library
from model_store.policy import inclusion_probabilities
from service.admin.console_api import DRAWS, summarize_draws
from service.errors import ErrorMessage
from service.observability.metrics import PUBLISH_EVERY
from tests.support.planes import png, refused
from tests.support.real_planes import Plane, with_plane
from tests.support.serving import tiny_library

CLASSES: Final = ("cat", "dog", "ship")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("tiny"))


def test_nothing_is_told_without_the_token(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        for method, path in (
            ("GET", "/admin/overview"),
            ("GET", "/admin/history"),
            ("POST", "/admin/try"),
            ("GET", "/admin/profiles"),
            ("POST", "/admin/audits/cost"),
        ):
            refused(await plane.stranger.request(method, path), 401, ErrorMessage.TOKEN_REQUIRED)

    with_plane(ask, tiny, tmp_path, load=False)


def test_before_the_library_is_there_it_says_why_nothing_is_ready(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        overview = (await plane.admin.get("/admin/overview")).json()
        assert (overview["ready"], overview["reason"]) == (False, "loading")
        assert overview["library"] is overview["engine"] is overview["draws"] is None
        refused(await plane.admin.post("/admin/try", content=png()), 503, ErrorMessage.NOT_READY)
        refused(await plane.admin.post("/admin/audits/cost", json={"profile": "smoke"}), 503, ErrorMessage.NOT_READY)

    with_plane(ask, tiny, tmp_path, load=False)


def test_requests_images_and_latencies_are_counted_and_draws_beside_their_law(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        assert (await plane.public.post("/v1/classify", content=png())).status_code == 200
        assert (await plane.public.post("/v1/classify", content=b"no image")).status_code == 415
        for _ in range(2):
            assert (await plane.admin.post("/admin/try", content=png())).status_code == 200
        overview = (await plane.admin.get("/admin/overview")).json()
        assert (overview["ready"], overview["reason"]) == (True, "")
        picture = {"height": 32, "width": 32, "resize": "squash", "interpolation": "bilinear"}
        counts = {"tickets": 4, "baselines": 0, "classes": 10}
        assert overview["library"] == {"digest": tiny.digest, **counts, "input": picture}
        assert overview["traffic"]["outcomes"]["ok"] == 1
        assert overview["traffic"]["outcomes"]["invalid"] == 1
        assert overview["traffic"]["images"] == 1 + 2 * DRAWS
        assert 0 < overview["now"]["p50_s"] <= overview["now"]["p99_s"]
        assert overview["draws"]["images"] == 0
        assert overview["draws"]["seconds"] is None
        assert [row["probability"] for row in overview["draws"]["tickets"]] == list(
            inclusion_probabilities(tiny.policy)
        )
        assert sum(row["drawn"] for row in overview["draws"]["tickets"]) == 0  # below LOT nothing is published

    with_plane(ask, tiny, tmp_path)


def test_draws_of_late_are_compared_alone_once_there_are_enough(tiny: Library, tmp_path: Path) -> None:
    """Before the oldest sample, one ticket was drawn far too often; since then, exactly as the policy has it."""

    async def ask(plane: Plane) -> None:
        (structure, density), *rest = [(row.structure.name, f"{row.density:g}") for row in tiny.tickets]
        chances = dict(zip([(structure, density), *rest], inclusion_probabilities(tiny.policy), strict=True))

        def draw(images: int, extra: int = 0) -> None:
            for (name, kept), chance in chances.items():
                more = extra if (name, kept) == (structure, density) else 0
                plane.metrics.inc("draws_total", images * chance + more, structure=name, density=kept)
                plane.metrics.inc("draws_expected_total", images * chance, structure=name, density=kept)

        draw(10_000, extra=3000)
        assert (await plane.draws())["tickets"][0]["deviation"] > 6
        plane.history.samples.clear()
        plane.history.sample()
        draw(8 * PUBLISH_EVERY - 1)
        assert (await plane.draws())["seconds"] is None
        draw(1)
        draws = await plane.draws()
        assert draws["images"] == 8 * PUBLISH_EVERY
        assert draws["seconds"] is not None
        assert [row["deviation"] for row in draws["tickets"]] == pytest.approx([0.0] * 4, abs=1e-6)

    with_plane(ask, tiny, tmp_path)


def test_the_last_quarter_of_an_hour_is_shown_from_any_time_on(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        for _ in range(2):
            plane.history.began -= 5  # as if five seconds had passed
            plane.history.sample()
        whole = (await plane.admin.get("/admin/history")).json()
        assert (whole["interval_s"], whole["keep_s"], len(whole["points"])) == (5, 900, 2)
        first, second = whole["points"]
        assert first["at_s"] < second["at_s"] <= whole["uptime_s"]
        assert (await plane.admin.get("/admin/history?since=0")).json()["points"] == whole["points"]
        later = (await plane.admin.get("/admin/history", params={"since": first["at_s"]})).json()["points"]
        assert later[-1] == second
        assert (await plane.admin.get("/admin/history?since=999999999999")).json()["points"] == []

    with_plane(ask, tiny, tmp_path, load=False)


@pytest.mark.parametrize(
    "query",
    [
        "since=",
        "since=-1",
        "since=nan",
        "since=inf",
        "since=1e3",
        "since=1&since=2",
        "since=١",
        "since=" + "9" * 400,
        "since=1%00",
        "since=1;2",
        "since=%27%20or%201",
        "since=[1]",
    ],
)
def test_a_since_that_is_no_number_of_seconds_is_refused(tiny: Library, tmp_path: Path, query: str) -> None:
    async def ask(plane: Plane) -> None:
        refused(await plane.admin.get(f"/admin/history?{query}"), 400, ErrorMessage.SINCE)

    with_plane(ask, tiny, tmp_path, load=False)


def test_no_draw_of_theta_can_be_read_from_the_history(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        plane.history.sample()
        response = await plane.admin.get("/admin/history")
        assert not any(word in response.text for word in ("resnet", "drawn", "theta", "member", "density"))
        assert (await plane.public.get("/admin/history")).status_code == 404

    with_plane(ask, tiny, tmp_path, load=False)


def test_draws_are_published_a_lot_at_a_time(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        for _ in range(-(-PUBLISH_EVERY // DRAWS)):
            assert (await plane.admin.post("/admin/try", content=png())).status_code == 200
        draws = (await plane.admin.get("/admin/overview")).json()["draws"]
        images = draws["sizes"][-1]
        assert images >= PUBLISH_EVERY
        assert sum(row["drawn"] for row in draws["tickets"]) >= images
        assert (draws["images"], draws["seconds"]) == (images, None)
        for row in draws["tickets"]:
            mean, chance = images * row["probability"], row["probability"]
            assert row["expected"] == pytest.approx(mean)
            assert row["deviation"] == pytest.approx((row["drawn"] - mean) / (mean * (1 - chance)) ** 0.5, abs=1e-3)
            assert abs(row["deviation"]) < draws["odd"]

    with_plane(ask, tiny, tmp_path)


def test_a_picture_is_asked_about_twenty_times_and_no_theta_is_told(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        response = await plane.admin.post("/admin/try", content=png())
        answer = response.json()
        assert set(answer) == {"library", "draws", "seconds", "label", "agreement", "classes"}
        assert answer["draws"] == sum(row["votes"] for row in answer["classes"]) == DRAWS
        assert answer["label"] == answer["classes"][0]["label"]
        assert all(row["low"] <= row["mean"] <= row["high"] for row in answer["classes"])
        revealed = json.dumps(answer) + str(response.headers)
        assert not any(word in revealed for word in ("resnet", "theta", "member", "alpha", "density", "seed"))

    with_plane(ask, tiny, tmp_path)


def test_what_is_no_image_is_refused_in_words(tiny: Library, tmp_path: Path) -> None:
    async def ask(plane: Plane) -> None:
        refused(await plane.admin.post("/admin/try", content=b"no image"), 415, ErrorMessage.IMAGE_FORMAT)
        refused(await plane.admin.post("/admin/try", content=b""), 400, ErrorMessage.IMAGE_EMPTY)
        refused(await plane.admin.post("/admin/try", content=png()[:60]), 400, ErrorMessage.IMAGE_DAMAGED)
        refused(await plane.admin.post("/admin/try", content=bytes(1025)), 413, ErrorMessage.BODY_TOO_LARGE)

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
        answer = (await plane.admin.get("/admin/profiles")).json()
        assert [profile["name"] for profile in answer["profiles"]] == ["smoke", "standard", "full", "reference"]
        for norm, sizes in answer["epsilons"].items():
            assert sizes == sorted(sizes)
            assert answer["headline"][norm] in sizes
        for profile in answer["profiles"]:
            assert set(profile["attacks"]) == set(answer["epsilons"])
            assert all(attacks and set(attacks) <= set(answer["attacks"]) for attacks in profile["attacks"].values())

        assert answer["epsilons"] == {"linf": [0, 2, 4, 8, 12, 20], "l2": [0, 32, 64, 128, 192, 320]}

    with_plane(ask, tiny, tmp_path, load=False)


def test_the_spread_of_draws_by_hand() -> None:
    summary = summarize_draws(np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], np.float32), CLASSES)
    assert (summary["label"], summary["agreement"]) == ("cat", 0.6667)
    assert summary["classes"][0] == {"label": "cat", "votes": 2, "mean": 0.4333, "low": 0.2, "high": 0.6}
    assert [row["votes"] for row in summary["classes"]] == [2, 1, 0]
