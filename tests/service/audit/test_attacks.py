"""The attacks attacked: closed forms, second opinions, toys on which weak attacks fail, and what they must never do."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model_store.attacks import Norm, ThreatModel, misclassified, pgd
from model_store.policy import Policy
from service.audit.attacks import arc, autoattack, black_box, eot, simple
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig, ExpectedLogits, Proxy, isolated_rng
from service.audit.attacks.black_box import LocalOracle, QueryAttackConfig
from service.audit.attacks.eot import PgdConfig
from service.audit.attacks.losses import LOSSES, Stage
from service.audit.attacks.simple import SingleModelPgd, UniversalPerturbation
from service.audit.checks.report import Linear, closed_form_error, linear_target, two_against_one_direction
from service.audit.evaluation import members as evaluation
from service.audit.evaluation.draws import DrawSet, draws_of
from service.audit.evaluation.members import AttackTarget, Member, as_floats
from service.audit.evaluation.scoring import CERTAIN, failure
from service.audit.profiles import PROFILES
from tests.support.audit_models import alone, faint_digits, small_cnn, trained_on_the_others_images, undefended

EIGHT = ThreatModel("linf", 8 / 255)
THREE = ThreatModel("linf", 3 / 255)  # where the undefended network keeps about a third: good to compare attacks at


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 pixels, their floats, labels."""
    data = faint_digits(count)
    return data.pixels, as_floats(data.pixels), data.labels


def random_networks(count: int) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [small_cnn().eval().requires_grad_(False) for _ in range(count)]


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 1 - float(misclassified(network(images), labels).mean())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "risk"])
def test_an_undefended_network_falls(loss: str) -> None:
    _, images, labels = some(100)
    assert accuracy(undefended(), images, labels) > 0.85
    result = eot.attack(alone(undefended()), images, labels, EIGHT, PgdConfig(loss, steps=30, step=0.1), generator())
    assert 1 - float(result.risk.mean()) <= 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
@pytest.mark.parametrize("loss", ["mean-loss", "mean-output", "mean-candidates", "hinge", "mean-logits"])
def test_the_closed_form_of_a_linear_model_is_met(norm: Norm, schedule: Any, loss: str) -> None:
    assert closed_form_error(norm, PgdConfig(loss, steps=40, schedule=schedule)) <= 1e-4


@pytest.mark.parametrize("loss", ["mean-loss", "mean-output", "mean-candidates", "hinge", "mean-logits"])
def test_two_opposed_linear_members_fool_averaged_gradients_but_not_arc(loss: str) -> None:
    target, images, labels, threat = two_against_one_direction()
    averaged = eot.attack(target, images, labels, threat, PgdConfig(loss, steps=100), generator())
    assert float(averaged.risk) == 0
    _, risk = arc.attack(target, images, labels, threat, ArcConfig(), generator())
    assert float(risk) == 0.5


def test_the_smoothed_risk_chooses_a_member_where_averages_cannot() -> None:
    target, images, labels, threat = two_against_one_direction()
    result = eot.attack(
        target, images, labels, threat, PgdConfig("risk", steps=100, step=0.1, momentum=0.75), generator()
    )
    assert float(result.risk) == 0.5


def test_a_trained_pair_that_averaged_cross_entropy_misjudges_is_broken_by_arc_and_by_the_hinge() -> None:
    """Its authors' attack leaves it far more than the worst member; attacks that let go of fooled draws do not."""
    pair, threat = alone(*trained_on_the_others_images()), ThreatModel("linf", 6 / 255)
    _, images, labels = some(80)

    def left(loss: str) -> float:
        config = PgdConfig(loss, steps=25, schedule="adaptive")
        return 1 - float(eot.attack(pair, images, labels, threat, config, generator()).risk.mean())

    averaged = left("mean-loss")
    assert averaged >= 0.3
    assert left("hinge") <= averaged - 0.2
    assert left("probability-margin") <= averaged - 0.2
    assert 1 - float(arc.attack(pair, images, labels, threat, ArcConfig(4, 2), generator())[1].mean()) <= averaged - 0.2


def far_in_logits_near_in_pixels() -> tuple[AttackTarget, Tensor, Tensor, ThreatModel]:
    """Class 1 has the second highest logit and a boundary 2.5 epsilon away; class 2 the least, 0.5 epsilon away."""
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.4, 0.0, 0.0], [0.0, 4.0, 0.0]])

    class Three(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images - 0.5).flatten(1) @ weights.T + torch.tensor([0.2, 0.1, 0.0])

    return alone(Three()), torch.full((1, 3, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64), ThreatModel("linf", 0.1)


def test_targets_are_ordered_by_linearised_distance_not_by_logit() -> None:
    target, images, labels, threat = far_in_logits_near_in_pixels()
    (nearest, second), _ = eot.nearest_classes(target, images, labels, threat, 2)
    assert (int(nearest), int(second)) == (2, 1)
    for ordered, risk in ((1, 1.0), (0, 0.0)):  # 0: whichever wrong class leads
        once = PgdConfig("targeted", targets=ordered, steps=10, restarts=0)
        assert float(eot.attack(target, images, labels, threat, once, generator(), [images]).risk) == risk


def test_arc_goes_over_the_nearest_boundary_not_towards_the_highest_logit() -> None:
    """The old one looked at the highest wrong logit alone, whose boundary lies 2.5 epsilon away."""
    target, images, labels, threat = far_in_logits_near_in_pixels()
    away, gradient = arc.nearest_boundary(target, torch.ones(1), images, labels, threat, 2)
    assert float(away) == pytest.approx(0.05)
    assert gradient.flatten().tolist() == pytest.approx([0, -4, 0])
    assert float(arc.attack(target, images, labels, threat, ArcConfig(1, 1, restarts=0), generator())[1]) == 1
    blind = ArcConfig(1, 1, classes=1, restarts=0)
    assert float(arc.attack(target, images, labels, threat, blind, generator())[1]) == 0


def test_a_protected_step_keeps_what_an_earlier_one_gained() -> None:
    """l2: the first boundary is crossed along x. A full step along y, scaled into the ball, would fall far back."""
    threat, first = ThreatModel("l2", 0.1), torch.tensor([0.05, 0.0, 0.0]).view(1, 3, 1, 1)
    gradient, away = torch.tensor([0.0, -1.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.01])
    moved = arc.protected_step(first, away, gradient, threat, first=False).flatten()
    unprotected = (first - 0.05 * gradient).flatten()
    unprotected = unprotected * 0.05 / unprotected.norm()
    assert float(moved.norm()) == pytest.approx(0.05)
    assert float(moved[1]) > 0.01  # over the second boundary
    assert float(moved[0]) > float(unprotected[0])  # and less far back from the first


def test_the_nearest_draws_are_attacked_first() -> None:
    near, far = Linear(torch.tensor([1.0, 0.0, 0.0]), -0.45), Linear(torch.tensor([1.0, 0.0, 0.0]), 0.4)
    target, images = linear_target(far, near), torch.full((1, 3, 1, 1), 0.5)
    rows = arc.nearest_rows(target, images, torch.zeros(1, dtype=torch.int64), 1, generator())
    assert next(rows).tolist() == [0, 1]


def test_reweighting_is_blind_to_no_member() -> None:
    """MORA by hand for two members of equal shares: the weight follows each one's pull on the mean softmax."""
    logits = torch.tensor([[[2.0, 0.0, -1.0]], [[0.5, 0.4, -1.0]]])
    labels, draws = torch.tensor([0]), DrawSet(torch.ones(1, 2), torch.ones(1).double(), True)
    soft = logits.softmax(dim=-1)
    right, wrong = soft[:, 0, 0], soft[:, 0, 1]
    pull = wrong * (right / right.mean() + (1 - wrong) / wrong.mean())
    weights = pull / pull.sum()
    expected = (logits.mean(dim=0) + (weights[:, None, None] * logits).sum(dim=0)) / 2
    losses = LOSSES["reweighted"](logits, labels, draws, Stage(1.0, 0.0))
    assert weights[1] > 0.6  # the one that is nearly undecided
    assert losses.tolist() == pytest.approx((expected[:, 1] - expected[:, 0]).tolist(), abs=1e-6)


def test_pgd_is_eot_with_one_member() -> None:
    """The same starts, steps and bookkeeping as the store's own PGD, to the last bit."""
    _, images, labels = some(20)
    ours = eot.attack(alone(undefended()), images, labels, EIGHT, PgdConfig(steps=10, step=0.25), generator())
    theirs = pgd(undefended(), images, labels, EIGHT, steps=10, step_size=2 / 255, generator=generator())
    alive = ours.risk < 1  # ours ends at the first failure that nothing can add to
    assert torch.equal(ours.images[alive], theirs[alive])
    with torch.no_grad():
        assert torch.equal(ours.risk > 0, misclassified(undefended()(theirs), labels) > 0)


def test_factored_losses_are_the_plain_ones() -> None:
    """Expected cross-entropy over draws, by running each draw on its own."""
    networks, (_, images, labels) = random_networks(4), some(5)
    draws = draws_of(Policy.over(["a", "a", "b", "b"]), 100, random.Random(0))
    with torch.no_grad():
        logits = torch.stack([network(images) for network in networks])
        losses = LOSSES["mean-loss"](logits, labels, draws, Stage(1.0, 0.0))
        expected = torch.zeros(5)
        for row, weight in zip(draws.rows, draws.weights, strict=True):
            mean = logits[row.bool()].mean(dim=0)
            expected += float(weight) * nn.functional.cross_entropy(mean, labels, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_attacks_stay_inside_and_never_lose_a_warm_start(norm: Norm, loss: str) -> None:
    networks, (_, images, labels) = random_networks(3), some(6)
    target, threat = (
        AttackTarget(alone(*networks).members, draws_of(Policy.over(["a", "a", "b"]), 9, random.Random(0))),
        ThreatModel(norm, 0.1),
    )
    first = eot.attack(target, images, labels, threat, PgdConfig(steps=5), generator())
    again = eot.attack(
        target, images, labels, threat, PgdConfig(loss, steps=4, restarts=0), generator(1), [first.images]
    )
    assert bool((again.risk >= first.risk).all())
    moved = (again.images - images).flatten(1)
    size = moved.abs().amax(dim=1) if norm == "linf" else moved.norm(dim=1)
    assert float(size.max()) <= 0.1 + 1e-6
    assert float(again.images.min()) >= 0
    assert float(again.images.max()) <= 1


@pytest.mark.parametrize("more", [{"steps": 16}, {"restarts": 3}])
def test_more_of_anything_never_raises_accuracy(more: dict[str, int]) -> None:
    networks, (_, images, labels) = random_networks(3), some(8)
    target = alone(*networks)
    fewer = eot.attack(target, images, labels, EIGHT, PgdConfig(steps=8), generator())
    stronger = eot.attack(target, images, labels, EIGHT, PgdConfig(**{"steps": 8, **more}), generator())  # type: ignore[arg-type]
    assert bool((stronger.risk >= fewer.risk).all())


def test_traces_start_clean_and_only_rise() -> None:
    networks, (_, images, labels) = random_networks(3), some(8)
    result = eot.attack(alone(*networks), images, labels, EIGHT, PgdConfig(steps=8), generator())
    assert result.risks.shape == (10, 8)
    assert bool((result.risks.diff(dim=0) >= 0).all())
    assert torch.equal(result.risks[-1], result.risk)


def test_a_reach_is_certain_only_where_no_draw_can_be_right() -> None:
    """Two members that misread alone, each as another class, are right together; and rounding may turn a small lead."""
    right, first, second = 0.0, (1.0, -9.0), (-9.0, 1.0)
    logits = torch.tensor(
        [[[right, *first], [right, *first], [right, 0.2, -9.0]], [[right, *second], *[[right, *first]] * 2]]
    )
    labels, each_alone = (
        torch.zeros(3, dtype=torch.int64),
        DrawSet(torch.eye(2), torch.full((2,), 0.5).double(), exhaustive=True),
    )
    assert failure(logits, labels, each_alone).tolist() == [1, 1, 1]
    assert (eot.risk_of_every_draw(logits, labels, each_alone) >= CERTAIN).tolist() == [False, True, False]


def test_a_reach_goes_on_until_draws_that_the_attacker_did_not_make_are_wrong_too() -> None:
    """Networks that learnt nothing misread all images alone, each in its own way."""
    (_, images, labels), target = some(8), alone(*random_networks(3))
    early, late = (
        eot.attack(target, images, labels, ThreatModel("linf", 12 / 255), kind("mean-loss", steps=30), generator())
        for kind in (PgdConfig, eot.Reach)
    )
    together = DrawSet(torch.ones(1, 3), torch.ones(1, dtype=torch.float64), exhaustive=True)
    assert bool((early.risk == 1).all())
    assert bool((late.risk == 1).all())
    assert bool((failure(target.logits(late.images), labels, together) == 1).all())
    assert early.passes < late.passes < 8 * 32


class Immovable(nn.Module):
    """Says class 0 whatever it is shown, and counts the images that it is shown."""

    shown = 0

    def forward(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10).float()


def test_square_asks_as_many_queries_as_its_settings_say() -> None:
    (_, images, _), labels, shown = some(3), torch.zeros(3, dtype=torch.int64), []
    for queries in (40, 60):
        network = Immovable()
        autoattack.attack(alone(network), images, labels, EIGHT, AutoAttackConfig("square", "soft-vote", queries), 0)
        shown.append(network.shown)
    assert shown[1] - shown[0] == 3 * 20  # the rest is of images before and after the search
    assert shown[0] < 2 * 3 * 40


def test_every_profile_gives_square_autoattacks_budget() -> None:
    for profile in PROFILES.values():
        groups = (*profile.ours, *profile.few, *profile.published)
        budgets = [each.iterations for name, each in groups if name == "square" and isinstance(each, AutoAttackConfig)]
        assert budgets == ([] if profile is PROFILES["smoke"] else [5_000])


def test_the_risk_an_attack_reports_is_the_risk_of_its_images() -> None:
    networks, (_, images, labels) = random_networks(3), some(8)
    target = alone(*networks)
    for result, risk in (
        (a := eot.attack(target, images, labels, EIGHT, PgdConfig(steps=8, schedule="adaptive"), generator()), a.risk),
        (b := arc.attack(target, images, labels, EIGHT, ArcConfig(2, 2), generator()), b[1]),
    ):
        reached = result.images if isinstance(result, eot.AttackResult) else result[0]
        with torch.no_grad():
            assert torch.allclose(failure(target(reached), labels, target.draws), risk)


# Second opinions


def test_apgd_reaches_what_pyautoattacks_reaches() -> None:
    """On a deterministic network, the same loss and steps: within two images of a hundred, either way."""
    _, images, labels = some(100)
    target, threat = alone(undefended()), THREE
    theirs = autoattack.attack(target, images, labels, threat, AutoAttackConfig("apgd-ce", "mean-logits", 30), 0)
    ours = eot.attack(
        target, images, labels, threat, PgdConfig("mean-loss", steps=30, schedule="adaptive"), generator()
    )
    left = accuracy(undefended(), theirs, labels)
    assert 0.02 < left < 0.9
    assert abs(left - (1 - float(ours.risk.mean()))) <= 0.02


def test_our_proxy_is_what_pyautoattack_would_attack_itself() -> None:
    """Through ExpectedLogits, on one network: to the bit what their class does with the bare network."""
    from pyautoattack.autopgd_base import APGDAttack

    _, images, labels = some(12)
    with torch.no_grad():
        right = undefended()(images).argmax(dim=1) == labels
    images, labels = images[right].contiguous(), labels[right]
    through = autoattack.attack(
        alone(undefended()), images, labels, EIGHT, AutoAttackConfig("apgd-ce", "mean-logits", 10), 5
    )
    with isolated_rng(5):
        bare = APGDAttack(undefended(), n_iter=10, norm="Linf", eps=EIGHT.epsilon, seed=5, device=images.device)
        direct = bare.perturb(images, labels, best_loss=True)
    assert torch.equal(through, direct)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # foolbox touches names that scipy has moved
def test_pgd_agrees_with_foolbox_within_a_point() -> None:
    foolbox = pytest.importorskip("foolbox")
    _, images, labels = some(400)
    wrapped = foolbox.PyTorchModel(undefended(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=40, random_start=True)
    with isolated_rng(0):
        _, _, broken = attack(wrapped, images, labels, epsilons=THREE.epsilon)
    theirs = 1 - float(broken.double().mean())
    ours = eot.attack(alone(undefended()), images, labels, THREE, PgdConfig(steps=40, step=0.1), generator())
    assert 0.02 < theirs < 0.9
    assert abs(1 - float(ours.risk.mean()) - theirs) <= 0.01


@pytest.mark.parametrize("method", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"])
def test_autoattacks_parts_bite_and_leave_our_generators_alone(method: Any) -> None:
    _, images, labels = some(6)
    steps = 200 if method == "square" else 10
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    adversarial = autoattack.attack(
        alone(undefended()), images, labels, EIGHT, AutoAttackConfig(method, "soft-vote", steps, targets=3), 0
    )
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert float((adversarial - images).abs().max()) <= EIGHT.epsilon + 1e-6
    assert accuracy(undefended(), adversarial, labels) <= 0.5


def test_autoattack_takes_members_that_are_laid_out_channels_last() -> None:
    """As every ticket is: the gradients of one alone come out in its layout, and the library's own check views them."""
    _, images, labels = some(4)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    network(images)
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    logits = ExpectedLogits(alone(network), "mean-logits")
    inputs = images.contiguous().requires_grad_(True)
    (gradient,) = torch.autograd.grad(logits(inputs).sum(), inputs)
    assert gradient.is_contiguous()
    autoattack.attack(alone(network), images, labels, EIGHT, AutoAttackConfig("apgd-ce", "mean-logits", 3), 0)


def test_of_all_that_a_library_tries_the_riskiest_is_kept() -> None:
    """A targeted attack that never fools its proxy returns the clean images; what it tried was riskier than those."""
    networks, (_, images, labels) = random_networks(4), some(16)
    target = AttackTarget(alone(*networks).members, draws_of(Policy.over(["a", "a", "b", "b"]), 9, random.Random(0)))
    with torch.no_grad():
        clean = failure(target(images), labels, target.draws)
    tried: list[Tensor] = []
    kept = autoattack.WorstCaseTracker(target, images, labels, THREE)

    def see(queries: Tensor, logits: Tensor) -> None:
        tried.append(queries)
        kept.see(queries, logits)

    classifier = ExpectedLogits(target, "mean-logits", see)
    with isolated_rng(0):
        autoattack.build_attack(classifier, THREE, AutoAttackConfig("apgd-t", "mean-logits", 8, targets=3), 0)(
            images.contiguous(), labels
        )
    assert len(tried) > 8
    assert bool((kept.risk >= clean).all())
    assert float((kept.images - images).abs().max()) <= THREE.epsilon + 1e-6
    with torch.no_grad():
        assert torch.equal(failure(target(kept.images), labels, target.draws), kept.risk)
        highest = kept.risk.clone()
        for queries in tried:
            near = (queries[:, None] - images[None]).abs().flatten(2).amax(dim=2)
            for place, row in enumerate(near.argmin(dim=1).tolist()):
                risk = failure(target(queries[place : place + 1]), labels[row : row + 1], target.draws)
                highest[row] = torch.maximum(highest[row], risk[0])
    assert torch.allclose(highest, kept.risk, atol=1e-9)


def test_proxies_are_deterministic_and_normalised() -> None:
    networks, (_, images, _labels) = random_networks(3), some(4)
    proxies: tuple[Proxy, ...] = ("soft-vote", "mean-logits", "mean-log-softmax")
    for proxy in proxies:
        expected_logits = ExpectedLogits(alone(*networks), proxy)
        assert torch.equal(expected_logits(images), expected_logits(images))
    vote = ExpectedLogits(alone(*networks), "soft-vote")(images)
    assert torch.allclose(vote.exp().sum(dim=1), torch.ones(4), atol=1e-5)


def test_the_weaker_attacks_run_and_stay_inside() -> None:
    _, images, labels = some(60)
    target, member = alone(undefended()), Member("network", undefended(), 1.0)
    for single in (SingleModelPgd(steps=0), SingleModelPgd(steps=10)):
        adversarial = simple.attack_member(member, images, labels, EIGHT, single, generator())
        assert accuracy(undefended(), adversarial, labels) < accuracy(undefended(), images, labels)
    noisy, risk = simple.corners(target, images, labels, EIGHT, 5, generator())
    assert float((noisy - images).abs().max()) <= EIGHT.epsilon + 1e-6
    assert float(risk.mean()) >= 1 - accuracy(undefended(), images, labels)
    shifted = simple.universal(target, images, labels, EIGHT, UniversalPerturbation(epochs=12), generator())
    assert accuracy(undefended(), shifted, labels) < accuracy(undefended(), images, labels) - 0.1


def test_one_perturbation_takes_the_same_steps_however_much_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network fits 64 images where forty fit a few: an attack on the one must not have fewer steps for it."""
    _, images, labels = some(40)
    results = []
    for free, size in ((1e15, 128), (0.0, 4)):
        monkeypatch.setattr(evaluation, "free_memory_bytes", lambda free=free: free)
        target = alone(undefended())
        assert target.batch(images) == size
        results.append(simple.universal(target, images, labels, EIGHT, UniversalPerturbation(epochs=3), generator()))
    assert torch.allclose(results[0], results[1], atol=1e-5)


# Black box


def oracle(members: int = 1, digits: int = 2) -> LocalOracle:
    networks = [undefended(), *random_networks(members - 1)]
    tickets = [Member(str(i), network, 1.0) for i, network in enumerate(networks)]
    return LocalOracle(
        tickets, Policy.switching(range(members), members), torch.device("cpu"), random.Random(0), digits
    )


def test_the_oracle_draws_by_the_law_for_every_image_and_counts() -> None:
    """Two members that disagree: of 400 equal images each answer comes about half the time (5 sigma: 50)."""
    answering = oracle(2, digits=6)
    pixels, images, _ = some(1)
    first, second = (int(m(images).argmax()) for m in answering.members)
    assert first != second
    answers = answering(pixels.expand(400, 3, 32, 32)).argmax(axis=1)
    assert answering.queries == 400
    assert abs(int((answers == first).sum()) - 200) < 50
    assert set(answers.tolist()) == {first, second}


@pytest.mark.parametrize(("method", "averages"), [("square", 1), ("square", 3), ("hopskipjump", 1)])
def test_black_box_attacks_break_the_undefended_and_keep_a_true_ledger(method: Any, averages: int) -> None:
    pixels, images, labels = some(4)
    answering, probes = oracle(), 1500 if method == "hopskipjump" else 300
    stops = black_box.attack(answering, pixels, labels, EIGHT, QueryAttackConfig(method, averages, probes), 0)
    last = stops[-1]
    assert last.queries == probes * averages
    assert answering.queries <= len(pixels) * last.queries * 1.6 + 10
    assert int((last.pixels.int() - pixels.int()).abs().max()) <= 8
    assert [stop.queries for stop in stops] == sorted({stop.queries for stop in stops})
    assert accuracy(undefended(), as_floats(last.pixels), labels) <= accuracy(undefended(), images, labels) - 0.15


def test_black_box_attacks_repeat_with_their_seed() -> None:
    pixels, _, labels = some(3)
    first, second = (
        black_box.attack(oracle(), pixels, labels, EIGHT, QueryAttackConfig("square", 1, 30), 7)[-1].pixels
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_linear_members_know_their_own_margin() -> None:
    model = Linear(torch.tensor([1.0, -1.0, 0.0]), 0.25)
    assert linear_target(model)(torch.zeros(1, 3, 1, 1)).flatten().tolist() == [0.125, -0.125]
    assert DrawSet(torch.ones(2, 3), torch.ones(2).double() / 2, True).sizes.tolist() == [3, 3]
