"""theta(alpha, n, s): the law by which an ensemble is drawn, its exact probabilities, and the one door of chance.

alpha chooses groups of tickets (one group for each structure), n how many of each chosen group, s which ones.
Robust random switching (one structure, one ticket), a fixed ensemble and "all of them" are laws of the same form.
"""

import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final, Self

import torch
from torch import Tensor

from model_store.errors import PolicyRejected

SIZES: Final = (0.65, 0.35)  # P(n_i = 1), P(n_i = 2), as the method gives them


@dataclass(frozen=True)
class Policy:
    """A law of theta over the tickets 0 to tickets - 1.

    groups: disjoint, non-empty; the tickets of one structure each.
    sizes: P(n_i = 1), P(n_i = 2), ... for a chosen group. A group with fewer tickets than that draws n_i from the same
        law under the condition that it fits (with replacement every n_i fits).
    every: False: alpha is uniform over the non-empty choices of groups. True: every group is chosen, always.
    replacement: whether a chosen group may give one ticket more than once.
    tickets: how many the library has; the width of draw_matrix.

    Raises PolicyRejected.
    """

    groups: tuple[tuple[int, ...], ...]
    tickets: int
    sizes: tuple[float, ...] = SIZES
    every: bool = False
    replacement: bool = False

    def __post_init__(self) -> None:
        check_groups(self)
        check_sizes(self.sizes)
        group_sizes(self)

    @classmethod
    def over(
        cls,
        structures: Sequence[str],
        *,
        sizes: tuple[float, ...] = SIZES,
        every: bool = False,
        replacement: bool = False,
    ) -> Self:
        """The method's own law: ticket j is in the group of structures[j]."""
        names = dict.fromkeys(structures)
        groups = tuple(tuple(j for j, other in enumerate(structures) if other == name) for name in names)
        return cls(groups, len(structures), sizes=sizes, every=every, replacement=replacement)

    @classmethod
    def switching(cls, group: Sequence[int], tickets: int) -> Self:
        """Robust random switching (R2S): one ticket of one group."""
        return cls((tuple(group),), tickets, sizes=(1.0,))

    @classmethod
    def fixed(cls, members: Sequence[int], tickets: int) -> Self:
        """The same members in every draw."""
        return cls(tuple((member,) for member in members), tickets, sizes=(1.0,), every=True)

    @classmethod
    def all(cls, tickets: int) -> Self:
        """Every ticket in every draw."""
        return cls.fixed(range(tickets), tickets)


@dataclass(frozen=True, slots=True)
class Theta:
    """One draw. members: ticket indices, sorted; a ticket repeats only under a policy with replacement."""

    members: tuple[int, ...]


def check_groups(policy: Policy) -> None:
    members = Counter(index for group in policy.groups for index in group)
    if not policy.groups or not all(policy.groups):
        raise PolicyRejected(f"groups {policy.groups}; expected at least one, none of them empty")
    outside = [index for index in members if type(index) is not int or not 0 <= index < policy.tickets]
    if outside:
        raise PolicyRejected(f"ticket {outside[0]!r} in a group; the library has 0 to {policy.tickets - 1}")
    repeated = [index for index, count in members.items() if count > 1]
    if repeated:
        raise PolicyRejected(f"ticket {repeated[0]} is in the groups more than once; expected disjoint groups")


def check_sizes(sizes: tuple[float, ...]) -> None:
    if not sizes or not all(math.isfinite(p) and 0 <= p <= 1 for p in sizes) or abs(math.fsum(sizes) - 1) > 1e-9:
        raise PolicyRejected(f"sizes {sizes}; expected probabilities of n = 1, 2, ... that sum to 1")


@lru_cache(maxsize=256)
def group_sizes(policy: Policy) -> tuple[tuple[float, ...], ...]:
    """For each group P(n_i = 1), P(n_i = 2), ...: `sizes`, under the condition that so many tickets are there."""
    laws = []
    for group in policy.groups:
        fits = policy.sizes if policy.replacement else policy.sizes[: len(group)]
        total = math.fsum(fits)
        if total <= 0:
            raise PolicyRejected(f"a group of {len(group)} tickets; sizes {policy.sizes} asks for more in every draw")
        laws.append(tuple(p / total for p in fits))
    return tuple(laws)


# Drawing


@lru_cache(maxsize=256)
def thresholds(policy: Policy) -> tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]:
    """Each group with the upper ends in [0, 1) of n = 1, 2, ..., last - 1."""
    return tuple(
        (group, tuple(accumulate(law))[:-1]) for group, law in zip(policy.groups, group_sizes(policy), strict=True)
    )


def draw_theta(policy: Policy, rng: random.Random) -> Theta:
    """Draws one theta: which tickets classify one image.

    Args:
      policy: the distribution to draw from.
      rng: the only source of chance. `secrets.SystemRandom()` to serve, a private `random.Random(seed)` to measure.

    Returns:
      The draw, its members sorted.
    """
    table = thresholds(policy)
    alpha = -1 if policy.every else rng.randrange(1, 1 << len(table))  # bit i: group i is chosen
    members: list[int] = []
    for index, (group, ends) in enumerate(table):
        if alpha >> index & 1:
            n = bisect_right(ends, rng.random()) + 1
            members += rng.choices(group, k=n) if policy.replacement else rng.sample(group, n)
    members.sort()
    return Theta(tuple(members))


def draw_matrix(policy: Policy, draws: int, rng: random.Random) -> Tensor:
    """Draws many thetas at once, as `draw_theta` would one after the other.

    Args:
      policy: the distribution to draw from.
      draws: R, how many.
      rng: the only source of chance.

    Returns:
      float32 [R, tickets]: how often ticket j is in the r-th draw; 0 or 1 without replacement.
    """
    return matrix([draw_theta(policy, rng) for _ in range(draws)], policy.tickets)


def matrix(thetas: Sequence[Theta], tickets: int) -> Tensor:
    """float32 [len(thetas), tickets], the draws as rows of counts."""
    places = [(row, member) for row, theta in enumerate(thetas) for member in theta.members]
    rows, columns = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(1)
    counts = torch.zeros(len(thetas), tickets)
    return counts.index_put_((rows, columns), torch.ones(len(places)), accumulate=True)


# The exact law


def choices(policy: Policy) -> int:
    """How many alphas there are, all equally probable."""
    return 1 if policy.every else 2 ** len(policy.groups) - 1


def chosen(policy: Policy) -> float:
    """The probability that alpha chooses a given group."""
    return 1.0 if policy.every else 2 ** (len(policy.groups) - 1) / choices(policy)


def over_alphas(policy: Policy, factors: Iterable[float]) -> float:
    """Sum over the alphas of the product of the chosen groups' factors."""
    if policy.every:
        return math.prod(factors)
    return math.prod(1 + factor for factor in factors) - 1


def size_probabilities(policy: Policy) -> dict[int, float]:
    """P(n) of the ensemble's size, repeats counted, for every n that can be."""
    law = [1.0]  # of the groups so far, each chosen with 1 or left out with 1: normalised at the end
    for group in group_sizes(policy):
        law = convolve(law, [0.0 if policy.every else 1.0, *group])
    law[0] -= 0.0 if policy.every else 1.0
    return {n: p / choices(policy) for n, p in enumerate(law) if p > 0}


def convolve(first: Sequence[float], second: Sequence[float]) -> list[float]:
    result = [0.0] * (len(first) + len(second) - 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            result[i + j] += a * b
    return result


def expected_size(policy: Policy) -> float:
    """Computes the mean number of tickets in a draw.

    Args:
      policy: the distribution of theta.

    Returns:
      E[n], exact.
    """
    return math.fsum(n * p for n, p in size_probabilities(policy).items())


def inclusion_probabilities(policy: Policy) -> tuple[float, ...]:
    """For each ticket, the probability that it is among a draw's members."""
    weights = [0.0] * policy.tickets
    for group, law in zip(policy.groups, group_sizes(policy), strict=True):
        missed = 1 - 1 / len(group)
        inside = [1 - missed**n if policy.replacement else n / len(group) for n in range(1, len(law) + 1)]
        share = chosen(policy) * math.fsum(p * q for p, q in zip(law, inside, strict=True))
        for ticket in group:
            weights[ticket] = share
    return tuple(weights)


def states(policy: Policy) -> int:
    """How many different thetas can be drawn."""
    counts = [sum(count for count, _ in outcomes(policy, index)) for index in range(len(policy.groups))]
    return math.prod(counts) if policy.every else math.prod(1 + count for count in counts) - 1


def entropy_bits(policy: Policy) -> float:
    """Shannon's entropy of theta."""
    inside = math.fsum(-k * p * math.log2(p) for index in range(len(policy.groups)) for k, p in outcomes(policy, index))
    return math.log2(choices(policy)) + chosen(policy) * inside


def effective_states(policy: Policy) -> float:
    """1 / the probability that two draws are the same theta."""
    factors = [math.fsum(k * p * p for k, p in outcomes(policy, index)) for index in range(len(policy.groups))]
    return choices(policy) ** 2 / over_alphas(policy, factors)


def outcomes(policy: Policy, index: int) -> list[tuple[int, float]]:
    """What a chosen group can give, as (how many of one probability, that probability)."""
    tickets = len(policy.groups[index])
    weights = []
    for n, p in enumerate(group_sizes(policy)[index], start=1):
        if p > 0 and not policy.replacement:
            weights.append((math.comb(tickets, n), p / math.comb(tickets, n)))
        elif p > 0:
            weights += [(count, p * ways / tickets**n) for count, ways in multisets(tickets, n)]
    return weights


def multisets(tickets: int, n: int) -> Iterator[tuple[int, int]]:
    """The multisets of n out of `tickets` by kind: (how many of the kind, ordered draws that give each one)."""
    for parts in partitions(n, n):
        if len(parts) <= tickets:
            kinds = math.prod(math.factorial(count) for count in Counter(parts).values())
            ways = math.factorial(n) // math.prod(math.factorial(part) for part in parts)
            yield math.perm(tickets, len(parts)) // kinds, ways


def partitions(n: int, largest: int) -> Iterator[tuple[int, ...]]:
    """The ways to write n as a sum of positive parts, each at most `largest`, not increasing."""
    if n == 0:
        yield ()
    for part in range(min(n, largest), 0, -1):
        for rest in partitions(n - part, part):
            yield (part, *rest)
