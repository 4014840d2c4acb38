"""The last quarter of an hour of traffic: counters sampled in a bounded ring, and the figures made of them.

Of theta it has what the metrics tell: sums over at least 128 images.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from service.admin.schemas import TrafficFigures
from service.observability.metrics import OUTCOMES, PREFIX, SECONDS, Metrics
from service.web import open_inference
from service.web.classify import PATH

INTERVAL_S: Final = 5.0  # between samples
KEEP_S: Final = 900.0
LATEST_S: Final = 60.0  # the present figures are of so long
LEAST_S: Final = 1.0  # a rate over less says nothing
DIGITS: Final = 5
ROUTES: Final = frozenset((PATH, *open_inference.INFER_PATHS))
DURATION: Final = "http_request_duration_seconds"
Counts = dict[tuple[str, str], float]
"""(structure, density) -> members."""


@dataclass(frozen=True)
class Sample:
    """Counters since the process began, and the queue.

    at_s: since the process began.  answered: classifications that took at most SECONDS each; the last is of all.
    drawn, expected: members drawn, and what the sampling policy expects.
    """

    at_s: float
    requests: float
    turned_away: float
    failed: float
    images: float
    queue_depth: float
    answered: tuple[float, ...]
    drawn: Counts
    expected: Counts


class TrafficHistory:
    """A ring of samples. Only the event loop uses it."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics, self.clock, self.began = metrics, clock, clock()
        self.samples: deque[Sample] = deque([self.take()], maxlen=int(KEEP_S / INTERVAL_S) + 1)

    @property
    def uptime_s(self) -> float:
        return self.clock() - self.began

    async def run(self) -> None:
        """Samples until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.sample()

    def sample(self) -> None:
        self.samples.append(self.take())

    def take(self) -> Sample:
        metrics = self.metrics
        outcomes = {name: metrics.value("inference_requests_total", outcome=name) for name in OUTCOMES}
        shed = metrics.value("shed_total", reason="inflight")  # refused before they are counted by outcome
        return Sample(
            at_s=self.uptime_s,
            requests=sum(outcomes.values()) + shed,
            turned_away=outcomes["shed"] + shed,
            failed=outcomes["error"] + outcomes["deadline"],
            images=metrics.value("inference_images_total"),
            queue_depth=metrics.value("queue_depth"),
            answered=answered(metrics),
            drawn=by_ticket(metrics, "draws_total"),
            expected=by_ticket(metrics, "draws_expected_total"),
        )

    def points(self, since_s: float = 0.0) -> list[TrafficFigures]:
        """One point for each interval that ended after `since_s`."""
        pairs = itertools.pairwise(self.samples)
        return [figures(before, after) for before, after in pairs if after.at_s > since_s]

    def latest(self) -> TrafficFigures:
        """Of the last minute, or of less where the process is younger."""
        now = self.take()
        recent = (sample for sample in self.samples if now.at_s - sample.at_s <= LATEST_S)
        return figures(next(recent, self.samples[-1]), now)

    def before(self) -> Sample:
        """The oldest sample."""
        return self.samples[0]


def figures(before: Sample, after: Sample) -> TrafficFigures:
    """What happened between two samples; null where nothing can be said."""
    seconds, requests = after.at_s - before.at_s, after.requests - before.requests
    times = [new - old for new, old in zip(after.answered, before.answered, strict=True)]
    return {
        "at_s": round(after.at_s, 3),
        "seconds": round(seconds, 3),
        "requests_per_s": per_second(requests, seconds),
        "images_per_s": per_second(after.images - before.images, seconds),
        "p50_s": quantile(0.5, times),
        "p99_s": quantile(0.99, times),
        "turned_away": share(after.turned_away - before.turned_away, requests),
        "failed": share(after.failed - before.failed, requests),
        "queue_depth": after.queue_depth,
    }


def per_second(count: float, seconds: float) -> float | None:
    return round(count / seconds, DIGITS) if seconds >= LEAST_S else None


def share(count: float, total: float) -> float | None:
    return round(count / total, DIGITS) if total > 0 else None


def quantile(q: float, counts: list[float]) -> float | None:
    """Of a cumulative histogram over SECONDS, linear inside a bucket as Prometheus has it; at most the last bound."""
    if counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    place = next(index for index, count in enumerate(counts) if count >= rank)
    if place == len(SECONDS):
        return SECONDS[-1]
    count, low = (0.0, 0.0) if place == 0 else (counts[place - 1], SECONDS[place - 1])
    return round(low + (SECONDS[place] - low) * (rank - count) / (counts[place] - count), DIGITS)


def answered(metrics: Metrics) -> tuple[float, ...]:
    """Classifications that were answered, on both protocols: how many took at most so many seconds, then all."""
    bounds = (*SECONDS, float("inf"))
    counts = dict.fromkeys(bounds, 0.0)
    for labels, amount in buckets(metrics):
        if labels["route"] in ROUTES and labels["code"].startswith("2"):
            counts[float(labels["le"])] += amount
    return tuple(counts[bound] for bound in bounds)


def buckets(metrics: Metrics) -> Iterator[tuple[dict[str, str], float]]:
    for name, labels, amount in metrics.samples(DURATION):
        if name == f"{PREFIX}{DURATION}_bucket":
            yield labels, amount


def by_ticket(metrics: Metrics, name: str) -> Counts:
    return {
        (labels["structure"], labels["density"]): amount
        for sample, labels, amount in metrics.samples(name)
        if sample == f"{PREFIX}{name}"
    }
