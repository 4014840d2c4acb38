"""python -m benchmarks.forwards STATE [LIBRARY]: what a draw's members cost in the engine, one image and one thread.

Prints JSON: the median over draws of the sum of its members' forward times, each the median of a ticket's own.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np

from model_store.library import open_library
from model_store.policy import draw_theta
from service.engine.base import Engine, Images
from service.engine.factory import open_engine
from service.settings import Settings

DRAWS: Final = 1000
ROUNDS: Final = 20


def forward_ms(engine: Engine, tickets: int, image: Images) -> list[float]:
    """Ticket after ticket, round after round, so that each finds the cache as a server would leave it."""
    seconds: list[list[float]] = [[] for _ in range(tickets)]
    for _ in range(ROUNDS):
        for member in range(tickets):
            started_at = time.perf_counter()
            engine.forward(member, image)
            seconds[member].append(time.perf_counter() - started_at)
    return [1000 * statistics.median(times) for times in seconds]


def main(state: Path, path: Path | None) -> None:
    library, rng = open_library(path), random.Random(0)
    engine = open_engine(library, Settings(state_dir=state))
    image = np.random.default_rng(0).integers(0, 256, (1, *library.input.shape), np.uint8)
    times = forward_ms(engine, len(library.tickets), image)
    sums = [sum(times[member] for member in draw_theta(library.policy, rng).members) for _ in range(DRAWS)]
    figures = {"draws": DRAWS, "median_sum_ms": statistics.median(sums), "mean_forward_ms": statistics.mean(times)}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
