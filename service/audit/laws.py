"""Laws of theta held against stored attack images: what each would keep, and what none of a menu can exceed.

The attacker chooses among the images that an audit made; the defender chooses how to draw. That is a zero-sum game, and
its linear program has a dual: a mixture of attack images under which no law does better than the best single draw.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.ensemble import combine, predictions
from model_store.policy import Policy
from service.audit.evaluation.draws import MAX_EXACT_STATES, DrawSet, draws_of
from service.audit.evaluation.scoring import pairs_wrong, same_everywhere
from service.audit.evaluation.threads import WorkerThreads

SIZES: Final = ((1.0,), (0.65, 0.35), (0.35, 0.65), (0.0, 1.0))  # P(n = 1), P(n = 2) of each chosen group
TRIOS: Final = 300  # of different structures where there are three, in the menu of the linear program
GAP: Final = 1e-6  # of the linear program's value, at which its rows are enough
MAX_ROUNDS: Final = 200
CHUNK: Final = 2**23  # floats of ensemble logits at once
LAW_DRAWS: Final = 500
PROOF_ROUNDS: Final = 6  # of counting all draws
CLOSE: Final = 0.005  # between what a law keeps and what is proved of all, at which rounds end
ADDED: Final = 200  # draws that a round adds to the menu


@dataclass(frozen=True)
class Game:
    """Attack images that were made, and who answers.

    logits: float32 [A, M, N, classes], of every attack's images through every ticket, the clean images first.
    labels: int64 [N].  multiply_adds: of one image through each ticket.  structures: of each ticket.
    """

    logits: Tensor
    labels: Tensor
    multiply_adds: tuple[int, ...]
    structures: tuple[str, ...]

    @property
    def tickets(self) -> int:
        return len(self.structures)

    def pick(self, index: Tensor) -> "Game":
        """The same game over some of the images."""
        return Game(self.logits[:, :, index], self.labels[index], self.multiply_adds, self.structures)


@dataclass(frozen=True)
class Law:
    """One way to draw. rows: float32 [R, M], 0 or 1.  weights: float64 [R], summing to 1."""

    name: str
    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, name: str, draws: DrawSet) -> "Law":
        return cls(name, draws.rows, draws.weights)

    def cost(self, multiply_adds: Sequence[int]) -> float:
        """Multiply-adds of one image, on average."""
        return float(self.weights @ (self.rows.double() @ torch.tensor(multiply_adds, dtype=torch.float64)))


@dataclass(frozen=True)
class Kept:
    """What a law keeps of each image under the worst stored attack. right: float64 [N]."""

    right: Tensor

    def after(self, tries: int) -> float:
        """The chance that so many answers in a row are right, mean over the images."""
        return float((self.right**tries).mean())

    @property
    def for_ever(self) -> float:
        """Images that no draw of the law misreads, under any stored attack."""
        return float((self.right > 1 - 1e-9).double().mean())


@torch.no_grad()
def rights(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """bool [R, A, N]: whether each draw reads each attack's image rightly."""
    attacks, members, images, classes = logits.shape
    flat = logits.permute(1, 0, 2, 3).reshape(members, attacks * images, classes)
    wanted = labels.repeat(attacks)
    step = max(1, CHUNK // (attacks * images * classes))
    parts = [predictions(combine(flat, some)) == wanted for some in torch.split(rows, step)]
    return torch.cat(parts).view(len(rows), attacks, images)


def keep(game: Game, law: Law) -> Kept:
    """The law against the worst stored attack, image by image."""
    right = rights(game.logits, game.labels, law.rows)
    shares = torch.einsum("r,ran->an", law.weights, right.double())
    return Kept(shares.amin(dim=0).clamp(0, 1))


def family(structures: Sequence[str], generator_seed: int) -> Iterator[Law]:
    """Laws of the method's own kind: which structures may take part, how many tickets each gives, all or some."""
    import random

    names = list(dict.fromkeys(structures))
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            groups = tuple(tuple(j for j, name in enumerate(structures) if name == each) for each in chosen)
            for sizes, every in itertools.product(SIZES, (False, True)):
                if len(groups) == 1 and every:
                    continue
                if sizes[0] == 0 and min(map(len, groups)) < 2:
                    continue
                policy = Policy(groups, len(structures), sizes=sizes, every=every)
                name = f"{' + '.join(chosen)}, n = {shown(sizes)}{', all of them' if every else ''}"
                yield Law.of(name, draws_of(policy, LAW_DRAWS, random.Random(f"law {generator_seed} {name}")))
    yield Law.of("mean of all", DrawSet.single(len(structures), "cpu"))


def shown(sizes: Sequence[float]) -> str:
    likely = [f"{n} ({100 * p:.0f} %)" if p < 1 else str(n) for n, p in enumerate(sizes, 1) if p > 0]
    return " or ".join(likely)


def menu(structures: Sequence[str], seed: int) -> Tensor:
    """float32 [S, M]: single tickets, pairs, and trios: what a law of the linear program may draw."""
    count, rng = len(structures), np.random.default_rng(seed)
    subsets: list[tuple[int, ...]] = [(j,) for j in range(count)]
    subsets += list(itertools.combinations(range(count), 2))
    trios = list(itertools.combinations(range(count), 3))
    mixed = [trio for trio in trios if len({structures[j] for j in trio}) == 3] or trios
    places = rng.permutation(len(mixed))[:TRIOS]
    subsets += [mixed[place] for place in sorted(places.tolist())]
    rows = torch.zeros(len(subsets), count)
    for place, members in enumerate(subsets):
        rows[place, list(members)] = 1
    return rows


@dataclass(frozen=True)
class Solved:
    """The game's solution. value: of the best law.  bound: what no law over the menu exceeds, from the dual alone.

    weights: float64 [S], the law.  mixture: [(attack, image, weight)], whose weights sum to 1 / N for each image.
    """

    value: float
    bound: float
    weights: NDArray[np.float64]
    mixture: list[tuple[int, int, float]]


def solve(right: NDArray[np.bool_]) -> Solved:
    """Maximises over laws the mean over images of the worst attack's accuracy (HiGHS), adding rows as they are needed.

    right: bool [S, A, N], whether each choice of the menu reads each attack's image rightly.
    """
    choices, _, images = right.shape
    shares = np.full(choices, 1 / choices)
    rows: list[tuple[int, int]] = []
    there: set[tuple[int, int]] = set()
    solved = Solved(1.0, 1.0, shares, [])
    for _ in range(MAX_ROUNDS):
        left = np.einsum("s,san->an", shares, right)
        worst = left.argmin(axis=0)
        value = float(left.min(axis=0).mean())
        fresh = [row for row in zip(worst.tolist(), range(images), strict=True) if row not in there]
        if rows and (solved.bound - value <= GAP or not fresh):
            return Solved(value, solved.bound, shares, solved.mixture)
        rows += fresh
        there |= set(fresh)
        shares, mixture = linear_program(right, rows)
        solved = Solved(value, dual_bound(right, mixture), shares, mixture)
    return solved


@dataclass(frozen=True)
class Proved:
    """A game solved over every draw of some kind. bound: what no law over them exceeds.  draws: how many they are.

    choices: float32 [S, M], the draws of the solution.  solved: the game over these.
    """

    bound: float
    draws: int
    choices: Tensor
    solved: Solved


def prove(game: Game, choices: Tensor, threads: WorkerThreads) -> Proved:
    """Solves the game over all draws of at most two tickets of each structure, and a menu's, by column generation.

    A mixture of attack images bounds every law by the draw that keeps most of it: weak duality. So each round counts
    all draws, and adds the strongest to the menu. Where there are too many to count, the menu is all that is proved.
    """
    halves = halves_of(game.structures)
    draws = len(halves[0]) * len(halves[1]) - 1 + count_beyond(choices, game.structures)
    solved = solve(rights(game.logits, game.labels, choices).numpy())
    if draws > MAX_EXACT_STATES:
        return Proved(solved.bound, len(choices), choices, solved)
    bound = 1.0
    for _ in range(PROOF_ROUNDS):
        highest, strongest = strongest_draws(game, solved.mixture, halves, threads)
        bound = min(bound, max(highest, solved.bound))
        if bound - solved.value <= CLOSE:
            break
        choices = torch.unique(torch.cat([choices, strongest]), dim=0)
        solved = solve(rights(game.logits, game.labels, choices).numpy())
    return Proved(bound, draws, choices, solved)


def count_beyond(choices: Tensor, structures: Sequence[str]) -> int:
    """How many draws of a menu have more than two tickets of one structure."""
    groups = torch.tensor([[each == name for each in structures] for name in dict.fromkeys(structures)]).float()
    return int(((choices @ groups.T) > 2).any(dim=1).sum())


def halves_of(structures: Sequence[str]) -> tuple[Tensor, Tensor]:
    """float32 [K, M], [L, M]: nothing, or up to two tickets of each structure; a draw is one row of each, added."""
    names = list(dict.fromkeys(structures))
    options = []
    for name in names:
        group = [j for j, each in enumerate(structures) if each == name]
        options.append([(), *((j,) for j in group), *itertools.combinations(group, 2)])
    halves = []
    for part in (options[: len(names) // 2], options[len(names) // 2 :]):
        listed = [tuple(itertools.chain.from_iterable(state)) for state in itertools.product(*part)]
        rows = torch.zeros(len(listed), len(structures))
        for place, members in enumerate(listed):
            rows[place, list(members)] = 1
        halves.append(rows)
    return halves[0], halves[1]


@torch.no_grad()
def strongest_draws(
    game: Game, mixture: Sequence[tuple[int, int, float]], halves: tuple[Tensor, Tensor], threads: WorkerThreads
) -> tuple[float, Tensor]:
    """The most that any draw keeps under a mixture of attack images, and the draws that keep most, [ADDED, M]."""
    first, second = halves
    kept = torch.zeros(len(first), len(second), dtype=torch.float64)
    covered = torch.zeros(len(game.labels), dtype=torch.float64)
    always = 0.0

    def right(attack: int, image: int, _: float) -> bool | Tensor:
        logits, label = game.logits[attack, :, image], int(game.labels[image])
        one, other = first @ logits, second @ logits
        alike = same_everywhere(one, other, label, every=False)
        return ~pairs_wrong(one, other, label) if alike is None else alike

    for (_, image, weight), outcome in zip(mixture, threads.map(right, *zip(*mixture, strict=True)), strict=True):
        covered[image] += weight
        if isinstance(outcome, Tensor):
            kept += weight * outcome
        else:
            always += weight * outcome
    kept[0, 0] = -torch.inf  # nothing drawn
    always += float((1 / len(covered) - covered).clamp_min(0).sum())
    places = kept.flatten().topk(min(ADDED, kept.numel() - 1)).indices
    rows = first[places // len(second)] + second[places % len(second)]
    return float(kept.max()) + always, rows


def linear_program(
    right: NDArray[np.bool_], rows: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float64], list[tuple[int, int, float]]]:
    """The law [S] and the dual mixture of attack images, for these rows alone."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, csr_array, hstack

    choices, images = right.shape[0], right.shape[2]
    attacks, places = (np.array(column) for column in zip(*rows, strict=True))
    gains = csr_array(-right[:, attacks, places].T.astype(np.float64))  # t_i - sum of right <= 0
    index = np.arange(len(rows))
    caps = coo_array((np.ones(len(rows)), (index, places)), shape=(len(rows), images))
    objective = np.r_[np.zeros(choices), np.full(images, -1 / images)]
    solution = linprog(
        objective,
        A_ub=hstack([gains, caps]).tocsr(),
        b_ub=np.zeros(len(rows)),
        A_eq=np.r_[np.ones(choices), np.zeros(images)][None],
        b_eq=[1.0],
        bounds=[(0, None)] * choices + [(None, 1)] * images,
        method="highs",
    )
    shares = np.clip(solution.x[:choices], 0, None)
    duals = np.clip(-np.asarray(solution.ineqlin.marginals), 0, None)
    totals = np.zeros(images)
    np.add.at(totals, places, duals)
    scale = np.divide(1 / images, totals, out=np.zeros(images), where=totals > 0)
    mixture = [(int(a), int(i), float(d * scale[i])) for a, i, d in zip(attacks, places, duals, strict=True) if d > 0]
    return shares / shares.sum(), mixture


def dual_bound(right: NDArray[np.bool_], mixture: Sequence[tuple[int, int, float]]) -> float:
    """The most that any choice of the menu keeps under a fixed mixture of attack images: no law keeps more.

    Where the mixture leaves an image out, it counts as right.
    """
    kept = np.zeros(right.shape[0])
    covered = np.zeros(right.shape[2])
    for attack, image, weight in mixture:
        kept += weight * right[:, attack, image]
        covered[image] += weight
    return float(kept.max() + np.clip(1 / right.shape[2] - covered, 0, None).sum())
