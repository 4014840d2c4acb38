import itertools
import math
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from model_store.errors import PolicyRejected
from model_store.policy import (
    Policy,
    Theta,
    draw_matrix,
    draw_theta,
    effective_states,
    entropy_bits,
    expected_size,
    inclusion_probabilities,
    matrix,
    size_probabilities,
    states,
)

FORTY = [f"structure {index // 10}" for index in range(40)]
METHOD = Policy.over(FORTY)
UNEQUAL = Policy(((0, 3, 4), (1,), (2, 6)), tickets=7, sizes=(0.5, 0.3, 0.2))
FALSE_ALARM = 1e-6


# The exact law


def test_the_method_s_law_has_the_figures_of_its_design() -> None:
    assert states(METHOD) == 56**4 - 1 == 9_834_495
    assert expected_size(METHOD) == pytest.approx(2.88)
    assert [round(p, 3) for p in size_probabilities(METHOD).values()] == [
        0.173,
        0.262,
        0.255,
        0.179,
        0.089,
        0.032,
        0.007,
        0.001,
    ]
    assert list(size_probabilities(METHOD)) == list(range(1, 9))
    assert inclusion_probabilities(METHOD) == pytest.approx([0.072] * 40)
    assert entropy_bits(METHOD) == pytest.approx(14.6, abs=0.01)
    assert effective_states(METHOD) == pytest.approx(1169, abs=1)


def test_with_replacement_there_are_66_states_of_a_structure() -> None:
    policy = Policy.over(FORTY, replacement=True)
    assert states(policy) == 66**4 - 1 == 18_974_735
    # n = 1: a tenth; n = 2: one of two equal chances of 1 - .9^2
    assert inclusion_probabilities(policy)[0] == pytest.approx(8 / 15 * (0.65 * 0.1 + 0.35 * 0.19))


def test_a_law_with_all_structures_always() -> None:
    policy = Policy.over(FORTY, every=True)
    assert states(policy) == 55**4
    assert expected_size(policy) == pytest.approx(4 * 1.35)
    assert size_probabilities(policy)[4] == pytest.approx(0.65**4)


def test_switching_fixed_and_all_are_policies_like_any_other() -> None:
    rng = random.Random(0)
    switching = Policy.switching(range(10, 20), 40)
    assert (states(switching), size_probabilities(switching)) == (10, {1: 1.0})
    assert {draw_theta(switching, rng).members for _ in range(500)} == {(index,) for index in range(10, 20)}
    fixed = Policy.fixed((7, 3, 30), 40)
    assert (states(fixed), size_probabilities(fixed), entropy_bits(fixed)) == (1, {3: 1.0}, 0)
    assert {draw_theta(fixed, rng) for _ in range(20)} == {Theta((3, 7, 30))}
    everything = Policy.all(40)
    assert draw_theta(everything, rng) == Theta(tuple(range(40)))
    assert inclusion_probabilities(everything) == (1.0,) * 40
    assert effective_states(everything) == 1


def enumerated(policy: Policy) -> dict[tuple[int, ...], float]:
    """Every theta with its probability, straight from the definition: each alpha, each n, each choice, one by one."""
    law: defaultdict[tuple[int, ...], float] = defaultdict(float)
    groups = range(len(policy.groups))
    alphas = [c for size in range(1, len(groups) + 1) for c in itertools.combinations(groups, size)]
    alphas = [tuple(groups)] if policy.every else alphas
    for alpha in alphas:
        for parts in itertools.product(*(list(choices_of(policy, policy.groups[index])) for index in alpha)):
            members = tuple(sorted(itertools.chain.from_iterable(part for part, _ in parts)))
            law[members] += math.prod(p for _, p in parts) / len(alphas)
    return dict(law)


def choices_of(policy: Policy, group: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Ordered choices out of one group: n by `sizes` where n fits, then each order with equal chance."""
    fits = {n: p for n, p in enumerate(policy.sizes, 1) if policy.replacement or n <= len(group)}
    for n, p in fits.items():
        orders = list(itertools.product(group, repeat=n) if policy.replacement else itertools.permutations(group, n))
        for order in orders:
            yield order, p / sum(fits.values()) / len(orders)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
def test_the_exact_law_is_that_of_all_draws_enumerated(every: bool, replacement: bool) -> None:
    policy = Policy(UNEQUAL.groups, UNEQUAL.tickets, UNEQUAL.sizes, every, replacement)
    law = enumerated(policy)
    assert math.fsum(law.values()) == pytest.approx(1)
    assert states(policy) == len(law)
    for n, p in size_probabilities(policy).items():
        assert p == pytest.approx(math.fsum(q for members, q in law.items() if len(members) == n))
    assert math.fsum(size_probabilities(policy).values()) == pytest.approx(1)
    for ticket, p in enumerate(inclusion_probabilities(policy)):
        assert p == pytest.approx(math.fsum(q for members, q in law.items() if ticket in members))
    assert entropy_bits(policy) == pytest.approx(-math.fsum(q * math.log2(q) for q in law.values()))
    assert effective_states(policy) == pytest.approx(1 / math.fsum(q * q for q in law.values()))
    assert expected_size(policy) == pytest.approx(math.fsum(len(members) * q for members, q in law.items()))


def test_a_group_too_small_for_a_size_draws_from_the_sizes_that_fit() -> None:
    policy = Policy.over(["a", "a", "a", "b"])
    assert size_probabilities(policy) == pytest.approx({1: (0.65 + 1) / 3, 2: (0.35 + 0.65) / 3, 3: 0.35 / 3})
    rng = random.Random(0)
    assert {draw_theta(policy, rng).members for _ in range(2000)} == set(enumerated(policy))
    with pytest.raises(PolicyRejected, match=r"a group of 1 tickets; .* asks for more in every draw"):
        Policy.over(["a"], sizes=(0.0, 1.0))


def test_groups_follow_the_structures_in_whatever_order_the_library_holds_them() -> None:
    assert Policy.over(["a", "b", "a", "c", "b"]).groups == ((0, 2), (1, 4), (3,))


@pytest.mark.parametrize(
    ("groups", "sizes", "message"),
    [
        ((), (1.0,), "expected at least one"),
        (((0,), ()), (1.0,), "none of them empty"),
        (((0, 4),), (1.0,), "ticket 4 in a group; the library has 0 to 3"),
        (((-1,),), (1.0,), "ticket -1"),
        (((0, 0),), (1.0,), "ticket 0 is in the groups more than once"),
        (((0, 1), (1, 2)), (1.0,), "ticket 1 is in the groups more than once"),
        (((0, 1),), (), "sum to 1"),
        (((0, 1),), (0.5, 0.4), "sum to 1"),
        (((0, 1),), (1.5, -0.5), "sum to 1"),
        (((0, 1),), (math.nan, 1.0), "sum to 1"),
    ],
)
def test_what_is_no_law_over_the_library_is_refused(
    groups: tuple[tuple[int, ...], ...], sizes: tuple[float, ...], message: str
) -> None:
    with pytest.raises(PolicyRejected, match=message):
        Policy(groups, 4, sizes)


# Draws. Random(seed) gives the same draws in every run. With SystemRandom each of the eight checks on `drawn` raises a
# false alarm once in a million runs.


def chi_square(observed: Counter[object], expected: dict[object, float]) -> float:
    """How far counts are from their law, as the statistic over its FALSE_ALARM quantile: 1 or less is a fit."""
    assert observed.keys() <= expected.keys()
    assert min(expected.values()) >= 5
    statistic = math.fsum((observed[key] - count) ** 2 / count for key, count in expected.items())
    return statistic / float(chi2.isf(FALSE_ALARM, len(expected) - 1))


@pytest.fixture(scope="module", params=["seeded", "system"])
def drawn(request: pytest.FixtureRequest) -> list[Theta]:
    """10^5 draws of the method's own law through the one door, from either source."""
    rng = random.Random(20250131) if request.param == "seeded" else secrets.SystemRandom()
    return [draw_theta(METHOD, rng) for _ in range(100_000)]


def by_structure(theta: Theta) -> dict[int, tuple[int, ...]]:
    return {key: tuple(group) for key, group in itertools.groupby(theta.members, key=lambda member: member // 10)}


def test_ensemble_sizes_follow_their_law(drawn: list[Theta]) -> None:
    expected: dict[object, float] = {n: p * len(drawn) for n, p in size_probabilities(METHOD).items()}
    assert chi_square(Counter(len(theta.members) for theta in drawn), expected) <= 1


def test_every_choice_of_structures_is_drawn_equally_often(drawn: list[Theta]) -> None:
    alphas = [c for size in range(1, 5) for c in itertools.combinations(range(4), size)]
    observed: Counter[object] = Counter(tuple(by_structure(theta)) for theta in drawn)
    assert chi_square(observed, {alpha: len(drawn) / 15 for alpha in alphas}) <= 1


@pytest.mark.parametrize("structure", range(4))
def test_within_a_structure_every_choice_of_tickets_is_drawn_by_its_law(drawn: list[Theta], structure: int) -> None:
    picks: Counter[object] = Counter()
    for theta in drawn:
        groups = by_structure(theta)
        if structure in groups:
            picks[groups[structure]] += 1
    tickets = range(10 * structure, 10 * structure + 10)
    expected: dict[object, float] = {(ticket,): picks.total() * 0.65 / 10 for ticket in tickets}
    expected |= {pair: picks.total() * 0.35 / 45 for pair in itertools.combinations(tickets, 2)}
    assert len(expected) == 55
    assert chi_square(picks, expected) <= 1


def test_every_ticket_is_drawn_equally_often(drawn: list[Theta]) -> None:
    counts = Counter(member for theta in drawn for member in theta.members)
    limit = norm.isf(FALSE_ALARM / 2 / 40) * math.sqrt(0.072 * 0.928 / len(drawn))
    assert max(abs(counts[ticket] / len(drawn) - 0.072) for ticket in range(40)) <= limit


def test_one_draw_says_nothing_about_the_next(drawn: list[Theta]) -> None:
    sizes = size_probabilities(METHOD)
    small = [n for n in sizes if n <= 5]
    pairs = Counter((len(a.members), len(b.members)) for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    rest = 1 - sum(sizes[a] * sizes[b] for a in small for b in small)
    expected: dict[object, float] = {(a, b): sizes[a] * sizes[b] * len(drawn) / 2 for a in small for b in small}
    observed: Counter[object] = Counter({pair: count for pair, count in pairs.items() if pair in expected})
    observed["rest"], expected["rest"] = len(drawn) // 2 - observed.total(), rest * len(drawn) / 2
    assert chi_square(observed, expected) <= 1


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_of_unequal_groups_follow_the_enumerated_law(replacement: bool) -> None:
    policy = Policy(UNEQUAL.groups, UNEQUAL.tickets, UNEQUAL.sizes, replacement=replacement)
    law = enumerated(policy)
    rng = random.Random(7)
    observed = Counter(draw_theta(policy, rng).members for _ in range(100_000))
    likely: dict[object, float] = {members: 1e5 * p for members, p in law.items() if p >= 1e-4}
    counts: Counter[object] = Counter({members: count for members, count in observed.items() if members in likely})
    if len(likely) < len(law):
        likely["rest"], counts["rest"] = 1e5 - math.fsum(likely.values()), 100_000 - counts.total()
    assert chi_square(counts, likely) <= 1


def test_members_are_sorted_and_distinct_without_replacement(drawn: list[Theta]) -> None:
    assert all(list(theta.members) == sorted(set(theta.members)) for theta in drawn)


def test_a_seed_gives_its_draws_again_and_another_seed_gives_others() -> None:
    def draws(seed: int) -> list[Theta]:
        rng = random.Random(seed)
        return [draw_theta(METHOD, rng) for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)


def test_the_global_generators_neither_feel_a_draw_nor_steer_it() -> None:
    before = random.getstate(), torch.get_rng_state()
    np_before = str(np.random.get_state())  # noqa: NPY002 - the global generator is the subject
    random.seed(0)
    torch.manual_seed(0)
    first = [draw_theta(METHOD, secrets.SystemRandom()) for _ in range(20)]
    random.seed(0)
    torch.manual_seed(0)
    state = random.getstate(), torch.get_rng_state()
    second = [draw_theta(METHOD, secrets.SystemRandom()) for _ in range(20)]
    draw_matrix(METHOD, 20, random.Random(0))
    assert first != second  # equal with odds below 1e-60
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert str(np.random.get_state()) == np_before  # noqa: NPY002
    random.setstate(before[0])
    torch.set_rng_state(before[1])


def test_a_matrix_row_is_the_draw_of_the_same_turn() -> None:
    draws = draw_matrix(METHOD, 300, random.Random(3))
    assert draws.shape == (300, 40)
    assert draws.dtype == torch.float32
    rng = random.Random(3)
    for row in draws:
        assert tuple(row.nonzero().flatten().tolist()) == draw_theta(METHOD, rng).members
    assert ((draws == 0) | (draws == 1)).all()


def test_with_replacement_a_matrix_counts() -> None:
    assert matrix([Theta((1, 1, 3)), Theta((0,))], 4).tolist() == [[0, 2, 0, 1], [1, 0, 0, 0]]
    policy = Policy.over(["a", "a"], sizes=(0.0, 0.0, 1.0), replacement=True)
    assert (draw_matrix(policy, 50, random.Random(0)).sum(dim=1) == 3).all()


def test_an_empty_matrix_has_its_width() -> None:
    assert draw_matrix(METHOD, 0, random.Random(0)).shape == (0, 40)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.booleans(), st.integers(0, 99))
def test_any_library_s_draws_lie_in_its_law(structures: list[str], every: bool, seed: int) -> None:
    policy = Policy.over(structures, every=every)
    theta = draw_theta(policy, random.Random(seed))
    assert len(theta.members) in size_probabilities(policy)
    assert all(inclusion_probabilities(policy)[member] > 0 for member in theta.members)
    assert math.fsum(size_probabilities(policy).values()) == pytest.approx(1)
    assert math.fsum(inclusion_probabilities(policy)) == pytest.approx(expected_size(policy))
