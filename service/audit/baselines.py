"""What is compared: the served law, and the classifiers that a critic would set beside it, over the same tickets."""

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Final

from model_store.library import Library
from model_store.policy import Policy, draw_theta, inclusion_probabilities, states
from service.audit.evaluation.draws import Defense, widen
from service.audit.evaluation.members import CandidateSet
from service.audit.rivals import Rivals, rival_size
from service.audit.target import Target

OURS: Final = "tombola"
MEAN: Final = "mean-of-all"
BEST: Final = "best-ticket"
COST: Final = "fixed-equal-cost"
TICKET: Final = "ticket "
DENSE: Final = "dense "
OUTSIDE: Final = "outside "
DENSE_COST: Final = "dense-equal-cost"
OVER_BUDGET: Final = 1.1  # of a draw's cost, that a rival of equal cost may take
R2S: Final = "r2s "
THETA: Final = "theta "


def ours(candidates: CandidateSet) -> Defense:
    about = "theta drawn anew for each image by the library's own law"
    return Defense(OURS, about, widen(candidates.policy, len(candidates.members)))


def mean_of_all(candidates: CandidateSet) -> Defense:
    return Defense(MEAN, "all tickets together, every time: no chance", fixed(candidates, range(candidates.tickets)))


def single(candidates: CandidateSet, index: int) -> Defense:
    if index < candidates.tickets:
        prefix, about = TICKET, "one ticket alone"
    elif index < candidates.own:
        prefix, about = DENSE, "dense adversarial training, one network alone"
    else:
        prefix, about = OUTSIDE, "an attacker's own network, never served"
    return Defense(prefix + candidates.names[index], about, fixed(candidates, [index]))


def fixed(candidates: CandidateSet, members: Sequence[int]) -> Policy:
    return Policy.fixed(list(members), len(candidates.members))


def known_draws(candidates: CandidateSet, seed: int, count: int) -> list[Defense]:
    """Thetas drawn by the served law, each known to its attacker: what is left of the defence once the secret is out.

    None where the law has one state, which is no secret.
    """
    if states(candidates.policy) == 1:
        return []
    rng = random.Random(f"known theta {seed}")
    drawn = [sorted(set(draw_theta(candidates.policy, rng).members)) for _ in range(count)]
    about = "one theta of the served law, known to the attacker"
    return [Defense(f"{THETA}{place}", about, fixed(candidates, members)) for place, members in enumerate(drawn, 1)]


def switching(candidates: CandidateSet) -> list[Defense]:
    """R2S: one ticket of one structure for each image."""
    names = list(dict.fromkeys(candidates.structures[: candidates.tickets]))
    return [
        Defense(
            f"{R2S}{name}", f"one {name} ticket drawn for each image", Policy.switching(group, len(candidates.members))
        )
        for name in names
        if len(group := [j for j in range(candidates.tickets) if candidates.structures[j] == name]) > 1
    ]


def claimed_rivals(candidates: CandidateSet, strength: Sequence[float]) -> Rivals:
    """By the tickets' own claims: the best one, and as many as the law draws on average, structures mixed."""
    count = rival_size(candidates)
    ranked = sorted(range(candidates.tickets), key=lambda j: -strength[j])[: max(count, 12)]
    chosen = max(
        combinations(ranked, count),
        key=lambda some: (len({candidates.structures[j] for j in some}), sum(strength[j] for j in some)),
    )
    return Rivals(ranked[0], chosen)


def best_ticket(candidates: CandidateSet, rivals: Rivals) -> Defense:
    """The ticket most robust alone."""
    about = f"{candidates.names[rivals.best]} alone: {describe_choice(rivals, rivals.best_accuracy)}"
    return Defense(BEST, about, fixed(candidates, [rivals.best]))


def equal_cost(candidates: CandidateSet, rivals: Rivals) -> Defense:
    """As many fixed tickets as the law draws on average, rounded."""
    names = " + ".join(candidates.names[j] for j in rivals.fixed)
    about = f"{names}, always, as many as a draw has on average: {describe_choice(rivals, rivals.fixed_accuracy)}"
    return Defense(COST, about, fixed(candidates, rivals.fixed))


def describe_choice(rivals: Rivals, accuracy: float | None) -> str:
    if accuracy is None:
        return "the best by the library's claims on held-out images"
    return (
        f"the best under attack on {rivals.images} held-out training images, of which it keeps {100 * accuracy:.1f} %"
    )


def strengths(library: Library | Target) -> list[float]:
    """Each ticket's PGD claim on the selection split, else on any split, else 0. Audited images never choose."""
    values = []
    for entry in library.entries:
        claims = [claim for claim in entry.claims if claim.metric == "pgd"]
        held_out = [claim for claim in claims if claim.data.split == "selection"]
        values.append(max((claim.value for claim in held_out or claims), default=0.0))
    return values


def dense_at_equal_cost(candidates: CandidateSet, multiply_adds: Sequence[int]) -> list[Defense]:
    """The dense networks that together come nearest to what one draw costs on average; none where one alone does.

    multiply_adds: of each member.
    """
    inclusion = inclusion_probabilities(candidates.policy)
    budget = sum(p * multiply_adds[index] for index, p in enumerate(inclusion))
    dense = range(candidates.tickets, candidates.own)
    groups = [some for count in range(1, len(dense) + 1) for some in combinations(dense, count)]
    fitting = [some for some in groups if sum(multiply_adds[j] for j in some) <= OVER_BUDGET * budget]
    chosen = max(fitting, key=lambda some: sum(multiply_adds[j] for j in some), default=())
    if len(chosen) < 2:
        return []
    cost = sum(multiply_adds[j] for j in chosen)
    names = " + ".join(candidates.names[j] for j in chosen)
    about = f"{names}, always: dense adversarial training at {100 * cost / budget:.0f} % of what one draw costs"
    return [Defense(DENSE_COST, about, fixed(candidates, chosen))]


def compared_systems(candidates: CandidateSet, rivals: Rivals, multiply_adds: Sequence[int] = ()) -> list[Defense]:
    """All that face the same attacks: ours first. multiply_adds: of each member, for a rival of equal cost."""
    dense = [single(candidates, index) for index in range(candidates.tickets, candidates.own)]
    if multiply_adds:
        dense += dense_at_equal_cost(candidates, multiply_adds)
    return [
        ours(candidates),
        mean_of_all(candidates),
        equal_cost(candidates, rivals),
        best_ticket(candidates, rivals),
        *switching(candidates),
        *dense,
    ]
