"""Profiles: which attacks an audit runs, and on how many images. Plain data; plan.py makes steps of it."""

from dataclasses import dataclass
from typing import Final, Literal

from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.attacks.eot import PgdConfig, Reach
from service.audit.attacks.simple import RandomCorners, SingleModelPgd, UniversalPerturbation
from service.audit.baselines import BEST, COST, DENSE_COST, MEAN, OURS
from service.audit.config import MAX_IMAGES, AttackConfig, ProfileName

Named = tuple[tuple[str, AttackConfig], ...]

PAPER: Final = PgdConfig("mean-candidates", steps=20, step=0.25)
REACH: Final = Reach("mean-loss", steps=60, schedule="adaptive")
SQUARE_QUERIES: Final = 5_000  # of each image, as AutoAttack has it: with fewer a black box is a strawman


@dataclass(frozen=True)
class Profile:
    """What one profile runs. `Named` pairs a name of config.ATTACKS with its settings."""

    about: str
    images: int
    swept_images: int  # at every epsilon but the headline
    few_images: int  # for the attacks of `few`
    queried_images: int  # for the attacks of `queries`
    far_images: int  # at epsilons where none should be left
    check_images: int  # right at first, for the checks that attack again
    shared: Named  # on every compared system at the headline epsilon
    swept: Named  # on every compared system at every other epsilon
    each: Named  # on every ticket and baseline alone
    thetas: int  # of the served law, each attacked by somebody who knows it
    ours: Named = ()  # on the served policy alone
    few: Named = ()  # on the served policy alone, too expensive for all images
    queries: Named = ()  # on answers of the served policy, and of queried_systems
    queried_systems: tuple[str, ...] = (COST,)
    universal: Named = ()  # one perturbation for all images
    universal_systems: tuple[str, ...] = (OURS, MEAN, COST, BEST)  # a perturbation is made against each
    single_images: int = MAX_IMAGES  # for the attacks of `each`
    theta_images: int = MAX_IMAGES  # for thetas that are known
    universal_images: int = MAX_IMAGES  # for the attacks of `universal`
    sweep: bool = True
    bfloat16: bool = False  # attacks are crafted in it where the processor multiplies in it
    rival_images: int = 1_000  # held out, on which the fixed systems that ours is held against are chosen
    published: Named = ()  # AutoAttack with its authors' settings, on fixed systems
    published_systems: tuple[str, ...] = (BEST, DENSE_COST, MEAN)


def apgd(loss: str, steps: int, restarts: int = 1) -> PgdConfig:
    return PgdConfig(loss, steps=steps, restarts=restarts, schedule="adaptive")


def temperatures(steps: int) -> Named:
    """Cross-entropy of logits ten times as large and a tenth as large: at its own scale it may see too little."""
    return (
        ("eot-mean-loss-sharp", PgdConfig("mean-loss", steps=steps, schedule="adaptive", temperature=0.1)),
        ("eot-mean-loss-flat", PgdConfig("mean-loss", steps=steps, schedule="adaptive", temperature=10.0)),
    )


def refine(steps: int) -> PgdConfig:
    """On the smoothed risk, from the riskiest images of earlier attacks."""
    return PgdConfig("risk", steps=steps, step=0.125, restarts=0, momentum=0.75)


def compared_attacks(steps: int, *, restarts: int, refined: int) -> Named:
    """On every compared system. restarts: of the mean loss; the two margins have two.  refined: steps on the risk."""
    return (
        ("eot-mean-loss", apgd("mean-loss", steps, restarts)),
        *temperatures(max(20, steps)),  # after 15 steps a tenth of the sharp ones still moves: measured
        ("eot-hinge", apgd("hinge", steps, restarts=2)),
        ("eot-probability-margin", apgd("probability-margin", steps, restarts=2)),
        ("eot-risk", refine(refined)),
    )


def adaptive_attacks(targets: int, *, steps: int, alternating: int, refined: int, arc: ArcConfig) -> Named:
    """On the served policy, aimed at what is its own. alternating, refined: steps of those two."""
    return (
        ("eot-targeted", PgdConfig("targeted", targets=targets, steps=steps, step=0.125, momentum=0.75)),
        ("eot-alternating", PgdConfig("alternating", steps=alternating, step=0.125, momentum=0.75)),
        ("mora", apgd("reweighted", steps)),
        ("eot-risk", refine(refined)),
        ("arc", arc),
    )


def apgd_t(steps: int, targets: int) -> Named:
    return (("apgd-t", AutoAttackConfig("apgd-t", "mean-logits", steps, targets=targets)),)


def few_attacks(*, fab_steps: int, targets: int) -> Named:
    """Too expensive for all images. targets: wrong classes that FAB-T aims at."""
    return (
        ("fab-t", AutoAttackConfig("fab-t", "mean-logits", fab_steps, targets=targets)),
        ("square", AutoAttackConfig("square", "soft-vote", SQUARE_QUERIES)),
    )


def query_attacks(method: Literal["square", "hopskipjump"], probes: int) -> Named:
    return tuple((f"{method}-queries", QueryAttackConfig(method, q, probes)) for q in (1, 5, 20))


EACH: Final[Named] = (("fgsm", SingleModelPgd(steps=0)), ("pgd-20", SingleModelPgd(steps=20)))
SMOKE_QUERIES: Final[Named] = (  # on an endpoint, where there is nothing else
    ("square-queries", QueryAttackConfig("square", 1, 30)),
    ("hopskipjump-queries", QueryAttackConfig("hopskipjump", 1, 60)),
)
SMOKE: Final = Profile(
    about="a minute: whether the attacks run and bite, no figure to quote",
    images=8,
    swept_images=8,
    few_images=4,
    queried_images=2,
    far_images=2,
    check_images=8,
    shared=(("eot-mean-loss", PgdConfig("mean-loss", steps=5, step=0.5)), ("eot-risk", refine(5))),
    swept=(),
    each=EACH[:1],
    thetas=2,
    ours=(("paper-eot", PAPER),),
    sweep=False,
    rival_images=0,
)
STANDARD: Final = Profile(
    about="an hour on two cores with the compact library",
    images=500,
    swept_images=48,
    single_images=100,
    theta_images=200,
    universal_images=200,
    few_images=10,
    queried_images=8,
    far_images=500,
    check_images=200,
    shared=compared_attacks(15, restarts=1, refined=28),
    swept=(("eot-mean-loss", apgd("mean-loss", 10)), ("eot-risk", refine(8))),
    each=EACH,
    thetas=16,
    ours=(
        ("paper-eot", PAPER),
        ("apgd-ce", AutoAttackConfig("apgd-ce", "soft-vote", 15)),
        *apgd_t(15, targets=2),
        *adaptive_attacks(2, steps=15, alternating=15, refined=38, arc=ArcConfig(sweeps=2, candidates=4)),
        ("noise", RandomCorners(10)),
    ),
    few=few_attacks(fab_steps=10, targets=2),
    queries=(*query_attacks("square", 300), *query_attacks("hopskipjump", 250)),
    universal=(("universal", UniversalPerturbation(epochs=12)),),
    bfloat16=True,
)
FULL: Final = Profile(
    about="a night on two cores with the compact library",
    images=2_000,
    swept_images=100,
    single_images=250,
    theta_images=400,
    universal_images=500,
    few_images=48,
    queried_images=16,
    far_images=1_000,
    check_images=400,
    shared=compared_attacks(50, restarts=2, refined=50),
    swept=(("eot-mean-loss", apgd("mean-loss", 30)), ("eot-risk", refine(15))),
    each=EACH,
    thetas=32,
    ours=(
        ("paper-eot", PAPER),
        ("eot-mean-output", apgd("mean-output", 50)),
        ("eot-mean-loss-normalised", apgd("mean-loss-normalised", 50)),
        ("eot-hinge", apgd("hinge", 100, restarts=2)),
        ("apgd-ce", AutoAttackConfig("apgd-ce", "soft-vote", 100)),
        ("apgd-dlr", AutoAttackConfig("apgd-dlr", "mean-logits", 100)),
        *adaptive_attacks(9, steps=50, alternating=60, refined=100, arc=ArcConfig(sweeps=10, candidates=8)),
    ),
    few=(*apgd_t(50, targets=9), *few_attacks(fab_steps=20, targets=9), ("noise", RandomCorners(10_000))),
    queries=(*query_attacks("square", 1000), *query_attacks("hopskipjump", 1000)),
    queried_systems=(COST, MEAN),
    universal=(("universal", UniversalPerturbation(epochs=20)),),
    bfloat16=True,
)
AUTOATTACK: Final[Named] = (
    ("apgd-ce", AutoAttackConfig("apgd-ce", "mean-logits", 100)),
    ("apgd-t", AutoAttackConfig("apgd-t", "mean-logits", 100, targets=9)),
    ("fab-t", AutoAttackConfig("fab-t", "mean-logits", 100, targets=9)),
    ("square", AutoAttackConfig("square", "mean-logits", SQUARE_QUERIES)),
)
RAND: Final[Named] = (
    ("apgd-ce", AutoAttackConfig("apgd-ce", "soft-vote", 100)),
    ("apgd-dlr", AutoAttackConfig("apgd-dlr", "mean-logits", 100)),
)
REFERENCE: Final = Profile(
    about="AutoAttack as published: standard on fixed systems, rand's two attacks on the exact expectation of ours",
    images=250,
    swept_images=100,
    few_images=48,
    queried_images=16,
    far_images=250,
    check_images=200,
    shared=(("eot-mean-loss", apgd("mean-loss", 50)),),
    swept=(),
    each=EACH,
    thetas=0,
    ours=RAND,
    published=AUTOATTACK,
    sweep=False,
)
PROFILES: Final[dict[ProfileName, Profile]] = {
    "smoke": SMOKE,
    "standard": STANDARD,
    "full": FULL,
    "reference": REFERENCE,
}
SHARED: Final = 2  # the last stage of what every compared system faces alike
