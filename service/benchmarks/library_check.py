"""tombola check: is a library whole, do its tickets run as they should, what time and memory they take."""

import random
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from model_store.errors import LibraryRejected
from model_store.library import Library, open_library
from model_store.policy import Policy, Theta, draw_theta, expected_size, size_probabilities, states
from service.engine.base import Engine, Images
from service.engine.errors import EngineRejected
from service.engine.factory import open_engine
from service.library_source import local_library
from service.settings import Settings

REPEATS: Final = 30  # answers timed for each size of ensemble
SIZES: Final = range(1, 9)
MOST_DRAWS: Final = 100_000  # of theta, in search of one of a given size


def figures(settings: Settings) -> dict[str, Any]:
    """Raises StoreError, LibraryRejected among them where the engine refuses a ticket."""
    begun = time.perf_counter()
    library = open_library(local_library(settings))
    loaded = time.perf_counter()
    try:
        engine = open_engine(library, settings)
    except EngineRejected as error:
        raise LibraryRejected(f"{library.path}: {error}") from error
    return {
        "library": str(library.path),
        "digest": library.digest,
        "tickets": len(library.tickets),
        "baselines": len(library.baselines),
        "classes": len(library.classes),
        "input": str(library.input),
        "states": states(library.policy),
        "expected_size": round(expected_size(library.policy), 3),
        "verify_s": round(loaded - begun, 3),
        "engine": engine.name,
        "device": engine.device,
        "threads": engine.threads,
        "note": engine.note,
        "warm_up_s": round(engine.warm_up_s, 3),
        "difference": engine.difference,
        "memory_mb": round(peak_memory_mb(), 1),
        "median_ms": {str(n): round(1000 * seconds, 3) for n, seconds in latencies(library, engine).items()},
    }


def peak_memory_mb() -> float:
    """The largest resident set so far; macOS counts in bytes, Linux in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def latencies(library: Library, engine: Engine) -> dict[int, float]:
    """Median seconds of one image's forward passes by size of its ensemble, on the threads the server would use."""
    rng = random.Random(0)
    row = np.random.default_rng(0).integers(0, 256, (1, *engine.input_shape), np.uint8)
    wanted = [n for n in SIZES if n in size_probabilities(library.policy)]
    with ThreadPoolExecutor(engine.threads) as pool:
        return {
            n: statistics.median(answer_s(pool, engine, row, theta.members) for theta in thetas)
            for n in wanted
            if (thetas := some_of_size(library.policy, n, rng))
        }


def some_of_size(policy: Policy, n: int, rng: random.Random) -> list[Theta]:
    """REPEATS draws of n members; fewer, or none, of a size that is very rare."""
    drawn = (draw_theta(policy, rng) for _ in range(MOST_DRAWS))
    thetas: list[Theta] = []
    for theta in drawn:
        if len(theta.members) == n:
            thetas.append(theta)
        if len(thetas) == REPEATS:
            break
    return thetas


def answer_s(pool: ThreadPoolExecutor, engine: Engine, row: Images, members: Sequence[int]) -> float:
    begun = time.perf_counter()
    list(pool.map(lambda member: engine.forward(member, row), members))
    return time.perf_counter() - begun


def lines(figures: dict[str, Any]) -> list[str]:
    """For people; the last line is the one to quote."""
    timed = "  ".join(f"{n}: {ms:.1f}" for n, ms in figures["median_ms"].items())
    memory = f"{figures['memory_mb']:.0f} MB"
    return [
        f"library    {figures['library']}",
        f"digest     {figures['digest']}",
        f"holds      {figures['tickets']} tickets, {figures['baselines']} baselines, {figures['classes']} classes",
        f"input      {figures['input']}",
        f"theta      {figures['states']:,} states, {figures['expected_size']} members on average",
        f"engine     {figures['engine']} on {figures['device']}, {figures['threads']} threads; {figures['note']}",
        f"equality   logits within {figures['difference']:.1e} of torch's, of the largest",
        f"verified   in {figures['verify_s']:.1f} s, warm in {figures['warm_up_s']:.1f} s, " + memory,
        f"median ms  by size of ensemble  {timed}",
        f"Whole: {figures['tickets']} tickets of library {figures['digest'][:12]} run as they were measured.",
    ]
