"""The 256 levels of an 8-bit range: the arithmetic that the engine's graph and the audit's copy of it share."""

from typing import Final

LEVELS: Final = 256
WEIGHT_LEVELS: Final = LEVELS - 1  # as many below zero as above
SMALLEST: Final = 1e-9  # of a range: that of a channel whose weights are all masked


def with_zero(low: float, high: float) -> tuple[float, float]:
    """The range widened until 0 is in it and is exactly one of its levels, as padding and rectifiers need it."""
    low, high = min(low, 0.0), max(high, SMALLEST)
    zero = round(-low * (LEVELS - 1) / (high - low))
    below, above = zero, LEVELS - 1 - zero
    step = max(-low / below if below else 0.0, high / above if above else 0.0)
    return -below * step, above * step
