"""Draws of theta: sampled from a policy, or all of its states with their probabilities."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from model_store.policy import Policy, Theta, draw_matrix, group_sizes, inclusion_probabilities, matrix, states

SCORING_DRAWS: Final = 10_000
ATTACK_DRAWS: Final = 2_000
MAX_ENUMERATED: Final = 4_096  # policies of at most so many states are enumerated instead of sampled
MAX_EXACT_STATES: Final = 20_000_000  # policies of at most so many are scored exactly for the figures reported


@dataclass(frozen=True)
class DrawSet:
    """Draws of theta, with their probabilities.

    rows: float32 [R, M], one draw a row.  weights: float64 [R], summing to 1.
    exhaustive: whether the rows are all the states there are, so that figures are exact.
    """

    rows: Tensor
    weights: Tensor
    exhaustive: bool

    @classmethod
    def single(cls, members: int, device: torch.device | str) -> "DrawSet":
        """One draw, known: all these members, always."""
        rows, weights = torch.ones(1, members), torch.ones(1, dtype=torch.float64)
        return cls(rows, weights, exhaustive=True).to(device)

    @property
    def sizes(self) -> Tensor:
        """[R]: n, the members of each draw."""
        return self.rows.sum(dim=1)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def to(self, device: torch.device | str) -> "DrawSet":
        return DrawSet(self.rows.to(device), self.weights.to(device), self.exhaustive)


@dataclass(frozen=True)
class Defense:
    """A randomised (or fixed) classifier over a set of candidates: its policy, and why it is compared."""

    name: str
    about: str
    policy: Policy

    @property
    def used(self) -> tuple[int, ...]:
        """The members that can be drawn at all."""
        return tuple(index for index, p in enumerate(inclusion_probabilities(self.policy)) if p > 0)


def widen(policy: Policy, members: int) -> Policy:
    """The same policy over a matrix of more columns."""
    return Policy(policy.groups, members, policy.sizes, policy.every, policy.replacement)


def draws_of(policy: Policy, count: int, rng: random.Random) -> DrawSet:
    """All the states of a small policy, with their probabilities; `count` draws of a large one."""
    if not policy.replacement and states(policy) <= MAX_ENUMERATED:
        return enumerate_states(policy)
    rows = draw_matrix(policy, count, rng)
    return DrawSet(rows, torch.full((count,), 1 / count, dtype=torch.float64), exhaustive=False)


def scoring_draws(system: Defense, seed: int) -> DrawSet:
    """Set B: the defender's draws, which depend on nothing of the attacker's."""
    return draws_of(system.policy, SCORING_DRAWS, random.Random(f"defender {seed} {system.name}"))


def enumerate_states(policy: Policy) -> DrawSet:
    every = list(every_state(policy))
    rows = matrix([theta for theta, _ in every], policy.tickets)
    weights = torch.tensor([p for _, p in every], dtype=torch.float64)
    return DrawSet(rows, weights / weights.sum(), exhaustive=True)


def every_state(policy: Policy) -> Iterator[tuple[Theta, float]]:
    """Each theta of a policy without replacement, with a number proportional to its probability."""
    for members, p in states_over(options_of(policy)):
        if members:
            yield Theta(members), p


Option = tuple[tuple[int, ...], float]
"""Members that one group or several give, and a number proportional to its probability."""


def options_of(policy: Policy) -> list[list[Option]]:
    """For each group what it can give, nothing included where alpha may leave it out."""
    options: list[list[Option]] = []
    for group, sizes in zip(policy.groups, group_sizes(policy), strict=True):
        chosen = [
            (members, p / math.comb(len(group), n))
            for n, p in enumerate(sizes, start=1)
            if p > 0
            for members in itertools.combinations(group, n)
        ]
        options.append(chosen if policy.every else [((), 1.0), *chosen])
    return options


def states_over(options: Sequence[Sequence[Option]]) -> Iterator[Option]:
    for state in itertools.product(*options):
        members = tuple(sorted(itertools.chain.from_iterable(part for part, _ in state)))
        yield members, math.prod(p for _, p in state)


def is_countable(policy: Policy) -> bool:
    """Whether all states of a policy can be scored for a few thousand images."""
    return not policy.replacement and states(policy) <= MAX_EXACT_STATES
