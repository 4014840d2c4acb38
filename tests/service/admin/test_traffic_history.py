"""The ring of traffic: bounded, and its rates and quantiles against figures worked by hand and against Prometheus's."""

import asyncio

import pytest

from service.admin.traffic_history import INTERVAL_S, KEEP_S, LATEST_S, TrafficHistory, answered, quantile
from service.observability.metrics import SECONDS, Metrics
from tests.support.waiting import until_async

ROUTE = "/v1/classify"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def history(metrics: Metrics, clock: Clock) -> TrafficHistory:
    return TrafficHistory(metrics, clock)


def serve(metrics: Metrics, count: int, seconds: float = 0.004, outcome: str = "ok") -> None:
    for _ in range(count):
        metrics.inc("inference_requests_total", outcome=outcome)
        metrics.inc("inference_images_total", 2 if outcome == "ok" else 0)
        if outcome == "ok":
            metrics.observe("http_request_duration_seconds", seconds, route=ROUTE, code="200")


def test_a_point_has_the_rates_of_its_interval_alone(history: TrafficHistory, metrics: Metrics, clock: Clock) -> None:
    serve(metrics, 30)
    clock.now += 5
    history.sample()
    serve(metrics, 5)
    serve(metrics, 3, outcome="shed")
    serve(metrics, 1, outcome="error")
    metrics.inc("shed_total", reason="inflight")
    metrics.set("queue_depth", 7)
    clock.now += 5
    history.sample()
    first, second = history.points()
    assert (first["at_s"], first["requests_per_s"], first["images_per_s"], first["turned_away"]) == (5, 6, 12, 0)
    assert (second["at_s"], second["seconds"], second["requests_per_s"], second["images_per_s"]) == (10, 5, 2, 2)
    assert (second["turned_away"], second["failed"], second["queue_depth"]) == (0.4, 0.1, 7)
    assert history.points(since_s=5) == [second]
    assert history.points(since_s=10) == []


def test_nothing_is_said_of_a_time_without_requests(history: TrafficHistory, clock: Clock) -> None:
    clock.now += 5
    history.sample()
    (point,) = history.points()
    assert (point["requests_per_s"], point["p50_s"], point["p99_s"]) == (0, None, None)
    assert point["turned_away"] is point["failed"] is None


def test_the_latest_figures_are_of_the_last_minute(history: TrafficHistory, metrics: Metrics, clock: Clock) -> None:
    assert history.latest()["requests_per_s"] is None  # no time has passed
    for _ in range(30):
        serve(metrics, 10)
        clock.now += INTERVAL_S
        history.sample()
    clock.now += 2
    latest = history.latest()
    assert LATEST_S - INTERVAL_S < latest["seconds"] <= LATEST_S
    assert latest["requests_per_s"] == round(110 / 57, 5)  # eleven whole intervals and two seconds
    clock.now += 1000  # an event loop that was stopped: the last sample is all there is
    assert history.latest()["requests_per_s"] == 0


def test_it_keeps_a_quarter_of_an_hour_and_no_more(history: TrafficHistory, clock: Clock) -> None:
    for _ in range(1000):
        clock.now += INTERVAL_S
        history.sample()
    points = history.points()
    assert len(points) == KEEP_S / INTERVAL_S
    assert points[-1]["at_s"] - points[0]["at_s"] + points[0]["seconds"] == KEEP_S


def test_only_answered_classifications_count_for_latency(metrics: Metrics) -> None:
    for route, code, seconds in (
        (ROUTE, "200", 0.003),
        (ROUTE, "200", 0.3),
        ("/v2/models/{model}/infer", "200", 0.003),
        (ROUTE, "503", 0.0001),
        ("/health/ready", "200", 0.0001),
    ):
        metrics.observe("http_request_duration_seconds", seconds, route=route, code=code)
    counts = dict(zip((*SECONDS, "all"), answered(metrics), strict=True))
    assert (counts[0.0025], counts[0.005], counts[0.25], counts[0.5], counts["all"]) == (0, 2, 2, 3, 3)


def test_quantiles_by_hand() -> None:
    """Four answers within 5 ms, six within 10: the fifth of ten is a sixth of the way from 5 to 10 ms."""
    counts = [4.0 if bound == 0.005 else 10.0 if bound > 0.005 else 0.0 for bound in SECONDS] + [10.0]
    assert quantile(0.4, counts) == 0.005
    assert quantile(0.5, counts) == round(0.005 + 0.005 / 6, 5)
    slow = [0.0] * len(SECONDS) + [3.0]
    assert quantile(0.5, slow) == SECONDS[-1]
    assert quantile(0.5, [0.0] * (len(SECONDS) + 1)) is None


def test_it_samples_by_itself_until_it_is_cancelled(history: TrafficHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.admin.traffic_history.INTERVAL_S", 0.001)

    async def run() -> None:
        task = asyncio.ensure_future(history.run())
        await until_async(lambda: len(history.samples) >= 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
