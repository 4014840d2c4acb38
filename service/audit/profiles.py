"""Profiles: which attacks run on which systems, on how many images, and what that costs, known before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from model_store.attacks import Norm
from model_store.library import Library
from model_store.policy import expected_size
from model_store.structures import multiply_adds
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.attacks.eot import PgdConfig, Reach
from service.audit.attacks.simple import RandomCorners, SingleModelPgd, UniversalPerturbation
from service.audit.baselines import BEST, COST, MEAN, OURS, single
from service.audit.config import ATTACKS, LARGEST, Audit, ProfileName, Settings, Step
from service.audit.errors import AuditRejected
from service.audit.evaluation import CandidateSet, Defense, all_members

GRADIENT: Final = 2.2  # forwards that one forward and backward costs, measured: weights need no gradient
FAR: Final[dict[Norm, tuple[float, float]]] = {"linf": (64.0, 128.0), "l2": (1020.0, 2040.0)}  # 255ths, for the checks
GMACS_PER_SECOND: Final = 25.0  # one core, measured on the compact library's structures; for the estimate alone
OPEN: Final = 0.5  # images that can still get riskier, mean over an attack's steps: measured between 0.41 and 0.54
Named = tuple[tuple[str, Settings], ...]

CHECK_FORWARDS: Final[dict[ProfileName, int]] = {"smoke": 60, "standard": 500, "full": 900}  # of all members, an image

PAPER: Final = PgdConfig("mean-candidates", steps=20, step=0.25)
REACH: Final = Reach("mean-loss", steps=60, schedule="adaptive")


@dataclass(frozen=True)
class Profile:
    """shared: attacks on every compared system at the headline epsilon.  swept: the same at every other epsilon.
    each: attacks on every ticket and baseline alone.  ours: attacks on the served law alone.  few: of those, what costs
    too much for all images, on `few_images`.  queries: attacks on answers, on the served law and on the fixed systems
    of `asked`.  universal: one perturbation for all images, made against each of `marked`.
    check_images: for the sanity checks that attack again."""

    about: str
    images: int
    swept_images: int
    few_images: int
    queried_images: int
    far_images: int
    check_images: int
    shared: Named
    swept: Named
    each: Named
    ours: Named = ()
    few: Named = ()
    queries: Named = ()
    asked: tuple[str, ...] = (COST,)
    marked: tuple[str, ...] = (OURS, MEAN, COST, BEST)
    universal: Named = ()
    sweep: bool = True


def apgd(loss: str, steps: int, restarts: int = 1) -> PgdConfig:
    return PgdConfig(loss, steps=steps, restarts=restarts, schedule="adaptive")


def refine(steps: int) -> PgdConfig:
    """On the smoothed risk, from the riskiest images found before."""
    return PgdConfig("risk", steps=steps, step=0.125, restarts=0, momentum=0.75)


def asking(method: Literal["square", "hopskipjump"], probes: int) -> Named:
    return tuple((f"{method}-queries", QueryAttackConfig(method, q, probes)) for q in (1, 5, 20))


EACH: Final[Named] = (("fgsm", SingleModelPgd(steps=0)), ("pgd-20", SingleModelPgd(steps=20)))
SMOKE: Final = Profile(
    about="a minute: whether the attacks run and bite, no figure to quote",
    images=8,
    swept_images=8,
    few_images=4,
    queried_images=2,
    far_images=2,
    check_images=4,
    shared=(("eot-mean-loss", PgdConfig("mean-loss", steps=5, step=0.5)), ("eot-risk", refine(5))),
    swept=(),
    each=EACH[:1],
    ours=(("paper-eot", PAPER),),
    sweep=False,
)
STANDARD: Final = Profile(
    about="under an hour on two cores with the compact library",
    images=128,
    swept_images=48,
    few_images=32,
    queried_images=8,
    far_images=5,
    check_images=24,
    shared=(("eot-mean-loss", apgd("mean-loss", 20)), ("eot-risk", refine(20))),
    swept=(("eot-mean-loss", apgd("mean-loss", 10)), ("eot-risk", refine(8))),
    each=EACH,
    ours=(
        ("paper-eot", PAPER),
        ("eot-hinge", apgd("hinge", 20)),
        ("apgd-ce", AutoAttackConfig("apgd-ce", "soft-vote", 20)),
        ("eot-risk", refine(30)),
        ("arc", ArcConfig(sweeps=4, candidates=4)),
    ),
    few=(
        ("apgd-t", AutoAttackConfig("apgd-t", "mean-logits", 20, targets=3)),
        ("fab-t", AutoAttackConfig("fab-t", "mean-logits", 10, targets=2)),
        ("square", AutoAttackConfig("square", "soft-vote", 300)),
        ("noise", RandomCorners(30)),
    ),
    queries=(*asking("square", 300), *asking("hopskipjump", 250)),
    universal=(("universal", UniversalPerturbation(epochs=12)),),
)
FULL: Final = Profile(
    about="a night on two cores with the compact library",
    images=250,
    swept_images=100,
    few_images=48,
    queried_images=16,
    far_images=10,
    check_images=32,
    shared=(
        ("eot-mean-loss", apgd("mean-loss", 50, restarts=2)),
        ("eot-hinge", apgd("hinge", 50)),
        ("eot-risk", refine(30)),
    ),
    swept=(("eot-mean-loss", apgd("mean-loss", 30)), ("eot-risk", refine(15))),
    each=EACH,
    ours=(
        ("paper-eot", PAPER),
        ("eot-mean-output", apgd("mean-output", 50)),
        ("eot-mean-loss-normalised", apgd("mean-loss-normalised", 50)),
        ("eot-hinge", apgd("hinge", 60, restarts=4)),
        ("apgd-ce", AutoAttackConfig("apgd-ce", "soft-vote", 100)),
        ("apgd-dlr", AutoAttackConfig("apgd-dlr", "mean-logits", 100)),
        ("eot-risk", refine(50)),
        ("arc", ArcConfig(sweeps=10, candidates=8)),
    ),
    few=(
        ("apgd-t", AutoAttackConfig("apgd-t", "mean-logits", 50, targets=9)),
        ("fab-t", AutoAttackConfig("fab-t", "mean-logits", 20, targets=9)),
        ("square", AutoAttackConfig("square", "soft-vote", 1000)),
        ("noise", RandomCorners(10_000)),
    ),
    queries=(*asking("square", 1000), *asking("hopskipjump", 1000)),
    asked=(COST, MEAN),
    universal=(("universal", UniversalPerturbation(epochs=20)),),
)
PROFILES: Final[dict[ProfileName, Profile]] = {"smoke": SMOKE, "standard": STANDARD, "full": FULL}
SHARED: Final = 1  # the last stage of what every compared system faces alike
WARM: Final = ("eot-risk", "arc")  # these start from the riskiest images of earlier stages


def images_of(audit: Audit) -> int:
    return audit.images or PROFILES[audit.profile].images


def plan(audit: Audit, bench: CandidateSet, systems: Sequence[Defense]) -> list[Step]:
    """Every attack, stage by stage, so that warm starts find what they start from: 0 and 1 what all systems face, cold
    and warm, 2 to 5 what is aimed at ours alone: cold, warm, the attack that never gives up a gain, the far end.

    Raises AuditRejected for an attack that the profile does not have, or a ticket that is not there.
    """
    profile, count = PROFILES[audit.profile], images_of(audit)
    refuse_missing(audit, profile)
    targets = [system.name for system in systems]
    singles = [single(bench, index).name for index in headline_steps(audit, bench)]
    steps: list[Step] = steps_for(audit, profile.each, singles, audit.headline, count)
    for epsilon in (e for e in audit.epsilons if e > 0 and (profile.sweep or e == audit.headline)):
        main = epsilon == audit.headline
        images = count if main else min(count, profile.swept_images)
        steps += steps_for(audit, profile.shared if main else profile.swept, targets, epsilon, images)
    steps += alone(audit, profile, count)
    steps += large_epsilon_steps(audit, min(count, profile.far_images))
    return sorted(dict.fromkeys(steps), key=lambda step: step.stage)


def attacks_of(profile: Profile, norm: Norm) -> list[str]:
    """The names of all attacks that a profile runs."""
    groups = (profile.each, profile.shared, profile.ours, profile.few, profile.universal, queries_of(profile, norm))
    return list(dict.fromkeys(name for group in groups for name, _ in group))


def queries_of(profile: Profile, norm: Norm) -> Named:
    """Black-box attacks are l-infinity here."""
    return profile.queries if norm == "linf" else ()


def refuse_missing(audit: Audit, profile: Profile) -> None:
    """An attack that was asked for and would not run must not look as if it had found nothing. Raises AuditRejected."""
    there = attacks_of(profile, audit.norm)
    for name in audit.attacks:
        if name not in there:
            raise AuditRejected(
                f"attacks {name!r}: profile {audit.profile} in {audit.norm} does not run it; it has {', '.join(there)}"
            )


def headline_steps(audit: Audit, bench: CandidateSet) -> list[int]:
    """The members to attack one by one: those that the audit names, or all. Raises AuditRejected."""
    for name in audit.tickets:
        if name not in bench.names:
            raise AuditRejected(f"tickets {name!r:.60}; expected some of {', '.join(bench.names)}")
    return [index for index, name in enumerate(bench.names) if not audit.tickets or name in audit.tickets]


def alone(audit: Audit, profile: Profile, count: int) -> list[Step]:
    """What is aimed at ours at the headline epsilon, and what is set beside it."""
    epsilon, few, asked = audit.headline, min(count, profile.few_images), min(count, profile.queried_images)
    queries = queries_of(profile, audit.norm)
    fixed = tuple(
        pair for pair in queries if isinstance(pair[1], QueryAttackConfig) and pair[1].averages == 1
    )  # answers alike
    return [
        *steps_for(audit, profile.ours, [OURS], epsilon, count, after=2),
        *steps_for(audit, profile.few, [OURS], epsilon, few, after=2),
        *steps_for(audit, profile.universal, profile.marked, epsilon, count, after=2),
        *steps_for(audit, queries, [OURS], epsilon, asked, after=2),
        *steps_for(audit, fixed, profile.asked, epsilon, asked, after=2),
    ]


def large_epsilon_steps(audit: Audit, images: int) -> list[Step]:
    """Each size from where the one before it came."""
    reach = (("eot-mean-loss", REACH),)
    return [
        replace(step, stage=3 + place, warm=True)
        for place, size in enumerate((*FAR[audit.norm], LARGEST[audit.norm]))
        for step in steps_for(audit, reach, [OURS], size, images)
    ]


def steps_for(
    audit: Audit, attacks: Named, systems: Sequence[str], epsilon: float, images: int, after: int = 0
) -> list[Step]:
    def stage(name: str) -> int:
        return after + (name in WARM) + (name == "arc")

    return [
        Step(name, system, audit.norm, epsilon, images, settings, stage(name), name in WARM)
        for system in systems
        for name, settings in attacks
        if audit.wants(name)
    ]


# Cost


def left_out(steps: Sequence[Step]) -> list[str]:
    """The attacks of ATTACKS that an audit does not run."""
    ran = {step.name for step in steps}
    return [name for name in ATTACKS if name not in ran]


def multiply_adds_of(library: Library, outside: Library | None = None) -> list[int]:
    """Of one image through each member of the bench."""
    return [multiply_adds(ticket.structure) for _, ticket in all_members(library, outside)]


def forwards(step: Step, drawn: float, members: int) -> float:
    """Forwards of one image through each member that the attack asks for. drawn: members of a draw."""
    match step.settings:
        case PgdConfig(steps=steps, restarts=restarts, ends_early=ends_early):
            return 2 + (OPEN if ends_early else 1) * GRADIENT * (steps + 1) * (restarts + step.warm)
        case ArcConfig(sweeps=sweeps, candidates=candidates):
            return OPEN * sweeps * (1 + candidates * (2 + GRADIENT * drawn / members))
        case AutoAttackConfig(method=method, iterations=iterations, restarts=restarts, targets=targets):
            each = 1 if method == "square" else GRADIENT + (method == "fab-t")
            return OPEN * each * iterations * restarts * (targets if method.endswith("-t") else 1)
        case SingleModelPgd(steps=steps, restarts=restarts):
            return GRADIENT * max(1, steps) * restarts
        case UniversalPerturbation(epochs=epochs):
            return epochs * (GRADIENT + 1) / 2
        case RandomCorners(count=count):
            return 1 + count
        case QueryAttackConfig(averages=averages, probes=probes):
            return probes * (1 - (1 - drawn / members) ** averages)


def giga_multiply_adds(step: Step, system: Defense, each: Sequence[int]) -> float:
    """What one attack costs, scoring included."""
    used = system.used
    attack = forwards(step, expected_size(system.policy), len(used)) * sum(each[index] for index in used)
    return step.images * (attack + sum(each)) / 1e9


def check_giga_multiply_adds(audit: Audit, each: Sequence[int]) -> float:
    """What the sanity checks cost, which attack the first few images again."""
    images = min(images_of(audit), PROFILES[audit.profile].check_images)
    return images * CHECK_FORWARDS[audit.profile] * sum(each) / 1e9


def estimated_seconds(giga: float, threads: int = 1) -> float:
    return giga / (GMACS_PER_SECOND * threads)
