"""Draws of the served library against the sampling policy, lately or since the process began.

Counts are sums over at least 128 images; no draw of theta can be read from them.
"""

import math
from typing import Final

from model_store.policy import inclusion_probabilities, size_probabilities
from service.admin.schemas import Draws, TicketDraws
from service.admin.traffic_history import Counts, Sample, by_ticket
from service.library_manager import LoadedLibrary
from service.observability.metrics import PREFIX, PUBLISH_EVERY, Metrics

ODD: Final = 6.0  # standard deviations, as the alert TombolaDrawsDeviate has it
LEAST_LOTS: Final = 8  # published lately; with fewer, all since the process began are compared
SIZES: Final = "ensemble_size"


def compare_draws(serving: LoadedLibrary, metrics: Metrics, before: Sample, now_s: float) -> Draws:
    """Members drawn, against what the policy expects. before: an older sample.  now_s: since the process began."""
    library = serving.library
    probabilities = inclusion_probabilities(library.policy)
    drawn, expected = by_ticket(metrics, "draws_total"), by_ticket(metrics, "draws_expected_total")
    chances: dict[tuple[str, str], list[float]] = {}
    for ticket, probability in zip(library.tickets, probabilities, strict=True):
        chances.setdefault((ticket.structure.name, f"{ticket.density:g}"), []).append(probability)
    recent = {key: expected.get(key, 0.0) - before.expected.get(key, 0.0) for key in chances}
    seconds: float | None = None
    if sum(recent.values()) >= LEAST_LOTS * PUBLISH_EVERY * sum(probabilities):
        drawn = {key: drawn.get(key, 0.0) - before.drawn.get(key, 0.0) for key in chances}
        expected, seconds = recent, round(now_s - before.at_s, 1)
    images = sum(expected.get(key, 0.0) for key in chances) / sum(probabilities)
    return {
        "lot": PUBLISH_EVERY,
        "images": round(images),
        "seconds": seconds,
        "odd": ODD,
        "tickets": [ticket_draws(key, some, drawn, expected, images) for key, some in chances.items()],
        "size_law": {str(n): probability for n, probability in size_probabilities(library.policy).items()},
        "sizes": drawn_sizes(metrics),
    }


def ticket_draws(
    key: tuple[str, str], chances: list[float], drawn: Counts, expected: Counts, images: float
) -> TicketDraws:
    """chances: of each ticket of this structure and density, to be in an image's ensemble."""
    spread = math.sqrt(images * sum(chance * (1 - chance) for chance in chances))
    count, mean = drawn.get(key, 0.0), expected.get(key, 0.0)
    return {
        "structure": key[0],
        "density": key[1],
        "probability": sum(chances),
        "drawn": count,
        "expected": mean,
        "deviation": round((count - mean) / spread, 3) if spread > 0 else None,
    }


def drawn_sizes(metrics: Metrics) -> list[float]:
    """Images whose ensemble had at most 1, 2, ... members, since the process began."""
    counts = {
        labels["le"]: value for name, labels, value in metrics.samples(SIZES) if name == f"{PREFIX}{SIZES}_bucket"
    }
    return [counts.get(f"{float(bound)}", 0.0) for bound in metrics.rows[SIZES].buckets]
