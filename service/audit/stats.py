"""Intervals: bootstrap over images for means of probabilities, Clopper-Pearson for counts. All at 95 %."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES: Final = 4000
TAIL: Final = 0.025
FEW: Final = 200  # images below which intervals are BCa
NO_SCATTER: Final = 1e-9  # of values that differ by rounding alone, which BCa divides by
FLIPS: Final = 9_999


class Interval(NamedTuple):
    """A figure and its 95 % interval, fractions or differences of fractions."""

    value: float
    low: float
    high: float


def resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means over RESAMPLES samples, with replacement, of the images."""
    index = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return np.asarray(values[index].mean(axis=1), dtype=np.float64)


def resampled_interval(sample: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Bootstrap bounds of a mean: BCa below FEW images (Efron, 1987), where percentiles are too narrow and lean."""
    if len(sample) < FEW and float(np.ptp(sample)) > NO_SCATTER:
        from scipy import stats as scipy_stats

        options: dict[str, Any] = {"n_resamples": RESAMPLES, "confidence_level": 1 - 2 * TAIL, "method": "BCa"}
        interval = scipy_stats.bootstrap((sample,), np.mean, rng=seed, **options).confidence_interval
        if np.isfinite((interval.low, interval.high)).all():
            return float(interval.low), float(interval.high)
    low, high = np.quantile(resampled_means(sample, seed), [TAIL, 1 - TAIL])
    return float(low), float(high)


def bootstrap(values: ArrayLike, seed: int = 0) -> Interval:
    """Bootstrap of a mean over images. Where all are 0 or all 1: Clopper-Pearson."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if float(np.ptp(sample)) == 0 and mean in (0.0, 1.0):
        return clopper_pearson(round(mean * len(sample)), len(sample))
    low, high = resampled_interval(sample, seed)
    return Interval(mean, min(mean, low), max(mean, high))


def paired_difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Interval:
    """The mean difference first - second of two systems on the same images, image by image."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    low, high = resampled_interval(difference, seed)
    return Interval(float(difference.mean()), low, high)


def sign_flip_p(first: ArrayLike, second: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of a mean paired difference of 0: how often random signs make it as large (Fisher, 1935)."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, len(difference)), dtype=np.int8) * 2 - 1
    flipped = np.abs(signs @ difference)
    return float((1 + (flipped >= abs(difference.sum()) - 1e-9).sum()) / (1 + FLIPS))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979), in their order."""
    order = np.argsort(values, kind="stable")
    raised = [min(1.0, (len(values) - rank) * values[index]) for rank, index in enumerate(order)]
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(raised) if raised else []
    return [float(each) for each in corrected]


def crossed_difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Interval:
    """The mean of `first`, [images], less the mean of `second`, [systems, images]: both axes are resampled."""
    ours, others = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    systems, images = others.shape
    rng = np.random.default_rng(seed)
    by_image = rng.multinomial(images, np.full(images, 1 / images), RESAMPLES) / images
    by_system = rng.multinomial(systems, np.full(systems, 1 / systems), RESAMPLES) / systems
    means = by_image @ ours - ((by_system @ others) * by_image).sum(axis=1)
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    value = float(ours.mean() - others.mean())
    return Interval(value, min(value, float(low)), max(value, float(high)))


def standard_error(first: ArrayLike, second: ArrayLike) -> float:
    """Of the mean paired difference."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0


def clopper_pearson(count: int, images: int) -> Interval:
    """The exact interval of a count of 0/1 outcomes (Clopper and Pearson, 1934)."""
    low = 0.0 if count == 0 else bisect(lambda p: at_least(count, images, p) - TAIL)
    high = 1.0 if count == images else bisect(lambda p: TAIL - at_least(count + 1, images, p, below=True))
    return Interval(count / images, low, high)


def at_least(count: int, images: int, p: float, *, below: bool = False) -> float:
    """P(X >= count) of X ~ Binomial(images, p); with `below`, P(X < count)."""
    terms = range(count) if below else range(count, images + 1)
    return math.fsum(math.exp(log_mass(k, images, p)) for k in terms)


def log_mass(k: int, images: int, p: float) -> float:
    ways = math.lgamma(images + 1) - math.lgamma(k + 1) - math.lgamma(images - k + 1)
    return ways + k * math.log(p) + (images - k) * math.log1p(-p)


def bisect(increasing: Callable[[float], float]) -> float:
    """The zero of an increasing function inside (0, 1)."""
    low, high = 1e-12, 1 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return (low + high) / 2
