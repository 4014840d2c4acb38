"""tombola bench latency: what the time to an answer tells of its ensemble's size, by quantum.

The server is idle and asked one image after the other, inside its process: the attacker's best case, with no network
and no other client in the way.
"""

import asyncio
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from model_store.library import Library
from service.engine.base import Engine
from service.library_manager import niceness
from service.observability.metrics import Metrics
from service.scheduling.batch import Batch
from service.scheduling.scheduler import AdmissionController, Scheduler
from service.scheduling.worker_pool import WorkerPool
from service.settings import Settings

Kind = TypeVar("Kind", bound=Scheduler)
BINS: Final = 16  # of equally many latencies each
SHUFFLES: Final = 20


class RecordingScheduler(Scheduler):
    """A scheduler that notes the size of every ensemble it draws."""

    sizes: list[int]

    def observe(self, batch: Batch) -> None:
        self.sizes += [len(theta.members) for theta in batch.thetas]


def leak(
    library: Library, engine: Engine, settings: Settings, images: int, quanta_ms: Sequence[float]
) -> dict[str, Any]:
    """For each quantum (0: none) the bits that latency tells of n, and how often it names n right."""
    rows = []
    for quantum_ms in quanta_ms:
        quantised = settings.model_copy(update={"latency_quantum_ms": quantum_ms})
        seconds, sizes = asyncio.run(latencies(library, engine, quantised, images))
        bits, chance = mutual_information(seconds, sizes)
        rows.append(
            {
                "quantum_ms": quantum_ms,
                "bits": round(bits, 4),
                "bits_by_chance": round(chance, 4),
                "entropy_of_n_bits": round(entropy(Counter(sizes).values()), 4),
                "names_n": round(guess_accuracy(seconds, sizes), 4),
                "commonest_n": round(max(Counter(sizes).values()) / len(sizes), 4),
                "p50_ms": round(1000 * statistics.median(seconds), 3),
                "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 3),
            }
        )
    return {"images": images, "quanta": rows}


async def latencies(library: Library, engine: Engine, settings: Settings, images: int) -> tuple[list[float], list[int]]:
    rows = np.random.default_rng(0).integers(0, 256, (1, *engine.input_shape), np.uint8)
    seconds = []
    async with scheduling(RecordingScheduler, library, engine, settings) as spy:
        spy.sizes = []
        for _ in range(images):
            begun = time.perf_counter()
            await spy.submit(rows, client="bench")
            seconds.append(time.perf_counter() - begun)
    return seconds, spy.sizes


@asynccontextmanager
async def scheduling(kind: type[Kind], library: Library, engine: Engine, settings: Settings) -> AsyncIterator[Kind]:
    """A scheduler with threads of its own, as a server would have them."""
    metrics = Metrics()
    workers = WorkerPool(settings, metrics, lambda: None)
    workers.start(engine.threads, niceness=niceness(engine))
    try:
        yield kind(library, engine, workers, AdmissionController(settings, metrics), settings, metrics)
    finally:
        workers.stop()


def mutual_information(seconds: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """(bits, bits that shuffled pairs show): plug-in estimate over BINS quantiles of the time, less what chance gives.

    The plug-in estimate of few pairs is too high; its mean over shuffled pairs is that excess.
    """
    bins, n = binned(seconds, seconds), np.array(sizes)
    generator = np.random.default_rng(0)
    chance = statistics.mean(plug_in(bins, generator.permutation(n)) for _ in range(SHUFFLES))
    return max(0.0, plug_in(bins, n) - chance), chance


def guess_accuracy(seconds: Sequence[float], sizes: Sequence[int]) -> float:
    """How often n is named right from the time: each bin's commonest n in the first half, judged on the second."""
    half = len(seconds) // 2
    bins = binned(seconds[:half], seconds).tolist()
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for n, place in zip(sizes[:half], bins[:half], strict=True):
        counts[place][n] += 1
    every = Counter(sizes[:half])  # for a bin that was empty
    named = [(counts[place] or every).most_common(1)[0][0] for place in bins[half:]]
    return statistics.mean(guess == n for guess, n in zip(named, sizes[half:], strict=True))


def binned(known: Sequence[float], seconds: Sequence[float]) -> NDArray[np.int64]:
    edges = np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, seconds)


def plug_in(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    pairs = Counter(zip(first.tolist(), second.tolist(), strict=True))
    return (
        entropy(Counter(first.tolist()).values()) + entropy(Counter(second.tolist()).values()) - entropy(pairs.values())
    )


def entropy(counts: Iterable[int]) -> float:
    """Bits of the distribution with these counts."""
    values = list(counts)
    total = sum(values)
    return -math.fsum(count / total * math.log2(count / total) for count in values)


def table(figures: dict[str, Any]) -> str:
    """Markdown: one row for each quantum."""
    lines = [
        "<!-- tombola bench latency -->",
        "| answers on multiples of | bits of n | names n | median | 99 % within |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in figures["quanta"]:
        name = f"{row['quantum_ms']:g} ms" if row["quantum_ms"] else "nothing"
        shown = f"{row['bits']:.2f} | {100 * row['names_n']:.0f} % | {row['p50_ms']:.1f} ms | {row['p99_ms']:.1f} ms"
        lines.append(f"| {name} | {shown} |")
    first = figures["quanta"][0]
    about = (
        f"n has {first['entropy_of_n_bits']:.2f} bits; the commonest is right in {100 * first['commonest_n']:.0f} %. "
        f"One image at a time, {figures['images']:,} of them for each row, in the server's process; library "
        f"{figures['library'][:12]}, {figures['machine']['cpu']}, {figures['engine']['threads']} threads, "
        f"load {figures['machine']['load_before']} before."
    )
    return "\n".join([*lines, "", about])
