"""Which preset and how many epochs some hours allow, from what steps were measured to take.

The rules are what the lab book (LOG.md) shows. Width raises both accuracies where more epochs of a narrow network do
not. So the widest preset whose own epochs fit is taken, and hours that are left go to epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from training.recipes import CIFAR10_SEARCH, PRESETS, Preset

RECOMMENDED: Final = (PRESETS["wide"], PRESETS["compact"])  # the best first
BUDGETS: Final = (2.0, 8.0, 24.0, 72.0)  # hours
MOST_PASSES: Final = 10  # times a preset's epochs, on data sets smaller than CIFAR-10
LONGEST: Final = 4.0  # times a preset's epochs, on data sets that need no more passes: more was never tried


@dataclass(frozen=True)
class Recommendation:
    """hours: the budget.  epochs, dense_epochs: of a ticket; of a dense network, if any.  taken: hours they take."""

    hours: float
    preset: Preset
    epochs: float
    dense_epochs: float | None
    taken: float


def fewest_passes(images: int) -> float:
    """By how much a preset's epochs are multiplied: as many steps as on CIFAR-10, within MOST_PASSES."""
    return min(MOST_PASSES, max(1.0, CIFAR10_SEARCH / images))


def recommend(hours: float, wanted: Sequence[tuple[Preset, float, float]], images: int) -> Recommendation | None:
    """The best of some presets within a budget; None: not even the cheapest fits.

    wanted: presets, the best first, each with the hours that its claims and its steps take at its own epochs.
    images: of the search part.
    """
    fewest = fewest_passes(images)
    for preset, claims, steps in wanted:
        factor = min(max(LONGEST, fewest), (hours - claims) / steps)
        if factor >= fewest:
            dense = None if preset.dense is None else factor * preset.dense["epochs"]
            return Recommendation(hours, preset, factor * preset.epochs, dense, claims + factor * steps)
    return None
