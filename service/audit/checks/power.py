"""What a check could have seen: an effect on the same images, its standard error, and the smallest one that shows."""

import math
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from service.audit.stats import at_least, bisect, standard_error

ENOUGH: Final = 200  # images that are right at first; a check that sees nothing on fewer says "no power"
MATTERS: Final = 0.005  # of accuracy: what is smaller moves no figure
ERRORS: Final = 2.0  # standard errors that an effect has to exceed
QUANTILE: Final = 0.8416  # of the normal distribution at 80 %: effects of the size stated show in four of five audits
ALPHA: Final = 0.025  # of a count: how often chance alone may exceed the limit


class Seen(Protocol):
    """An effect, or the lack of one."""

    @property
    def value(self) -> float: ...

    @property
    def images(self) -> int:
        """Images that could have shown it: right at first."""

    @property
    def shows(self) -> bool:
        """Whether it is beyond the limit, and beyond chance."""

    @property
    def detectable(self) -> float:
        """The smallest effect that shows in four of five audits like this one."""


@dataclass(frozen=True)
class Effect:
    """A mean paired difference of accuracy, image by image."""

    value: float
    error: float  # standard, of the mean
    images: int
    limit: float = MATTERS

    @classmethod
    def between(cls, higher: Tensor, lower: Tensor, limit: float = MATTERS) -> "Effect":
        """The mean of `higher` less `lower`, both [images], of images that are right at first."""
        if not len(higher):
            return cls(0.0, 0.0, 0, limit)
        error = standard_error(higher.numpy(), lower.numpy())
        return cls(float((higher - lower).mean()), error, len(higher), limit)

    @property
    def shows(self) -> bool:
        return self.value > max(self.limit, ERRORS * self.error)

    @property
    def detectable(self) -> float:
        """Of whole images lost: an effect of size p adds the scatter p (1 - p) / n to that which is there."""
        if not self.images:
            return 1.0

        def beyond(p: float) -> float:
            error = math.sqrt(self.error**2 + p * (1 - p) / self.images)
            return p - max(self.limit, ERRORS * error) - QUANTILE * error

        return bisect(beyond)


@dataclass(frozen=True)
class Share:
    """Images with a property that few may have."""

    count: int
    images: int
    limit: float

    @classmethod
    def of(cls, cases: Tensor, limit: float) -> "Share":
        """cases: bool [images]."""
        return cls(int(cases.sum()), len(cases), limit)

    @property
    def value(self) -> float:
        return self.count / max(1, self.images)

    @property
    def shows(self) -> bool:
        """Whether so many would be rare (2.5 %) if the share were the limit; beyond a limit of 0, one is enough."""
        return self.count > 0 and at_least(self.count, self.images, max(self.limit, 1e-12)) <= ALPHA

    @property
    def detectable(self) -> float:
        if not self.images:
            return 1.0
        needed = next((k for k in range(1, self.images + 1) if Share(k, self.images, self.limit).shows), None)
        if needed is None:
            return 1.0
        return bisect(lambda p: at_least(needed, self.images, p) - 0.8)


def worst(seen: list[Effect]) -> Effect:
    """The effect furthest beyond chance."""
    return max(seen, key=lambda each: each.value - max(each.limit, ERRORS * each.error))
