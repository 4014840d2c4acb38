"""What is compared: the served law, and the classifiers that a critic would set beside it, over the same tickets."""

from collections.abc import Sequence
from itertools import combinations
from typing import Final

from model_store.library import Library
from model_store.policy import Policy, expected_size
from service.audit.evaluation import CandidateSet, Defense, widened

OURS: Final = "tombola"
MEAN: Final = "mean-of-all"
BEST: Final = "best-ticket"
COST: Final = "fixed-equal-cost"
TICKET: Final = "ticket "
DENSE: Final = "dense "
OUTSIDE: Final = "outside "
R2S: Final = "r2s "


def ours(bench: CandidateSet) -> Defense:
    about = "theta drawn anew for each image by the library's own law"
    return Defense(OURS, about, widened(bench.policy, len(bench.members)))


def mean_of_all(bench: CandidateSet) -> Defense:
    return Defense(MEAN, "all tickets together, every time: no chance", fixed(bench, range(bench.tickets)))


def single(bench: CandidateSet, index: int) -> Defense:
    if index < bench.tickets:
        prefix, about = TICKET, "one ticket alone"
    elif index < bench.own:
        prefix, about = DENSE, "dense adversarial training, one network alone"
    else:
        prefix, about = OUTSIDE, "an attacker's own network, never served"
    return Defense(prefix + bench.names[index], about, fixed(bench, [index]))


def fixed(bench: CandidateSet, members: Sequence[int]) -> Policy:
    return Policy.fixed(list(members), len(bench.members))


def switching(bench: CandidateSet) -> list[Defense]:
    """R2S: one ticket of one structure for each image."""
    names = list(dict.fromkeys(bench.structures[: bench.tickets]))
    return [
        Defense(f"{R2S}{name}", f"one {name} ticket drawn for each image", Policy.switching(group, len(bench.members)))
        for name in names
        if len(group := [j for j in range(bench.tickets) if bench.structures[j] == name]) > 1
    ]


def best_ticket(bench: CandidateSet, strength: Sequence[float]) -> Defense:
    """The ticket most robust by the library's own claims on held-out training images."""
    index = max(range(bench.tickets), key=lambda j: strength[j])
    about = f"{bench.names[index]} alone: the best by the library's claims on held-out images"
    return Defense(BEST, about, fixed(bench, [index]))


def equal_cost(bench: CandidateSet, strength: Sequence[float]) -> Defense:
    """As many fixed tickets as the law draws on average, rounded: the best by claims, structures as mixed as may be."""
    count = min(bench.tickets, max(1, round(expected_size(bench.policy))))
    ranked = sorted(range(bench.tickets), key=lambda j: -strength[j])[: max(count, 12)]
    chosen = max(
        combinations(ranked, count),
        key=lambda some: (len({bench.structures[j] for j in some}), sum(strength[j] for j in some)),
    )
    names = " + ".join(bench.names[j] for j in chosen)
    return Defense(COST, f"{names}, always: what one draw costs on average", fixed(bench, chosen))


def strengths(library: Library) -> list[float]:
    """Each ticket's PGD claim on the selection split, else on any split, else 0. Audited images never choose."""
    found = []
    for entry in library.entries:
        claims = [claim for claim in entry.claims if claim.metric == "pgd"]
        held_out = [claim for claim in claims if claim.data.split == "selection"]
        found.append(max((claim.value for claim in held_out or claims), default=0.0))
    return found


def compared(bench: CandidateSet, strength: Sequence[float]) -> list[Defense]:
    """All that face the same attacks: ours first."""
    dense = [single(bench, index) for index in range(bench.tickets, bench.own)]
    return [
        ours(bench),
        mean_of_all(bench),
        equal_cost(bench, strength),
        best_ticket(bench, strength),
        *switching(bench),
        *dense,
    ]
