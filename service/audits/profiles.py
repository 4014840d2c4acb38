"""Profiles: which attacks run on which systems, on how many images, and what that costs, known before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from model_store.library import Library
from model_store.structures import multiply_adds
from model_store.theta import expected_size
from service.audits.attacks.arc import Sweeps
from service.audits.attacks.eot import Ascent
from service.audits.attacks.libraries import Standard
from service.audits.attacks.query import BlackBox
from service.audits.attacks.simple import Corners, Single, Universal
from service.audits.config import ATTACKS, Audit, ProfileName, Settings, Step
from service.audits.evaluate import Bench, System
from service.audits.systems import MEAN, OURS, single

GRADIENT: Final = 2.2  # forwards that one forward and backward costs, measured: weights need no gradient
FAR: Final = (64.0, 128.0)  # 255ths, for the checks: no classifier can be right there
UNBOUNDED: Final = 255.0
GMACS_PER_SECOND: Final = 25.0  # one core, measured on the compact library's structures; for the estimate alone
Named = tuple[tuple[str, Settings], ...]

PAPER: Final = Ascent("mean-candidates", steps=20, step=0.25)
REACH: Final = Ascent("mean-loss", steps=60, schedule="adaptive")  # ends early on images that fall, as all must
REFINE: Final = Ascent("risk", steps=10, step=0.125, restarts=0, momentum=0.75)


@dataclass(frozen=True)
class Profile:
    """ours: attacks on the served law at the headline epsilon.  shared: attacks on every compared system there.
    swept: attacks at every other epsilon.  few: attacks that cost too much for all images, on `few_images`.
    checks: images for the sanity checks that attack again."""

    about: str
    images: int
    swept_images: int
    few_images: int
    far_images: int
    check_images: int
    ours: Named
    shared: Named
    swept: Named
    few: Named
    each: Named
    compare: bool
    sweep: bool


SMOKE: Final = Profile(
    about="a minute: whether the attacks run and bite, no figure to quote",
    images=8,
    swept_images=8,
    few_images=4,
    far_images=2,
    check_images=4,
    ours=(("paper-eot", PAPER), ("eot-risk", REFINE)),
    shared=(("eot-mean-loss", Ascent("mean-loss", steps=5, step=0.5)),),
    swept=(),
    few=(),
    each=(("fgsm", Single(steps=0)),),
    compare=True,
    sweep=False,
)
STANDARD: Final = Profile(
    about="under an hour on two cores with the compact library",
    images=100,
    swept_images=30,
    few_images=10,
    far_images=5,
    check_images=10,
    ours=(
        ("paper-eot", PAPER),
        ("eot-mean-output", Ascent("mean-output", steps=20, momentum=0.75)),
        ("eot-mean-loss", Ascent("mean-loss", steps=30, schedule="adaptive")),
        ("eot-hinge", Ascent("hinge", steps=30, schedule="adaptive")),
        ("eot-risk", replace(REFINE, steps=15)),
        ("apgd-ce", Standard("apgd-ce", "soft-vote", 20)),
        ("noise", Corners(20)),
        ("universal", Universal()),
    ),
    shared=(("eot-mean-loss", Ascent("mean-loss", steps=15, schedule="adaptive")), ("eot-risk", REFINE)),
    swept=(("eot-mean-loss", Ascent("mean-loss", steps=15, schedule="adaptive")),),
    few=(
        ("apgd-t", Standard("apgd-t", "mean-logits", 20, targets=3)),
        ("square", Standard("square", "soft-vote", 300)),
        ("arc", Sweeps(sweeps=3, candidates=4)),
        ("square-queries", BlackBox("square", 1, 500)),
        ("square-queries", BlackBox("square", 5, 500)),
        ("square-queries", BlackBox("square", 20, 500)),
    ),
    each=(("fgsm", Single(steps=0)), ("pgd-20", Single(steps=20))),
    compare=True,
    sweep=True,
)
FULL: Final = Profile(
    about="a night on two cores with the compact library",
    images=200,
    swept_images=60,
    few_images=20,
    far_images=10,
    check_images=20,
    ours=(
        ("paper-eot", PAPER),
        ("eot-mean-output", Ascent("mean-output", steps=100, schedule="adaptive")),
        ("eot-mean-loss", Ascent("mean-loss", steps=100, schedule="adaptive")),
        ("eot-mean-loss-normalised", Ascent("mean-loss-normalised", steps=50, schedule="adaptive")),
        ("eot-hinge", Ascent("hinge", steps=100, schedule="adaptive")),
        ("eot-risk", replace(REFINE, steps=50, step=0.1)),
        ("apgd-ce", Standard("apgd-ce", "soft-vote", 100)),
        ("apgd-dlr", Standard("apgd-dlr", "mean-logits", 100)),
        ("noise", Corners(200)),
        ("universal", Universal(epochs=30)),
    ),
    shared=(
        ("eot-mean-loss", Ascent("mean-loss", steps=50, schedule="adaptive")),
        ("eot-hinge", Ascent("hinge", steps=50, schedule="adaptive")),
        ("eot-risk", replace(REFINE, steps=20)),
    ),
    swept=(("eot-mean-loss", Ascent("mean-loss", steps=30, schedule="adaptive")), ("eot-risk", REFINE)),
    few=(
        ("apgd-t", Standard("apgd-t", "mean-logits", 50, targets=9)),
        ("fab-t", Standard("fab-t", "soft-vote", 20, targets=3)),
        ("square", Standard("square", "soft-vote", 1000)),
        ("arc", Sweeps(sweeps=10, candidates=8)),
        *(("square-queries", BlackBox("square", q, 1000)) for q in (1, 5, 20)),
        *(("hopskipjump-queries", BlackBox("hopskipjump", q, 1000)) for q in (1, 5)),
    ),
    each=(("fgsm", Single(steps=0)), ("pgd-20", Single(steps=20))),
    compare=True,
    sweep=True,
)
PROFILES: Final[dict[ProfileName, Profile]] = {"smoke": SMOKE, "standard": STANDARD, "full": FULL}
STAGES: Final = {"eot-risk": 1, "arc": 2}  # these start from the riskiest images of earlier stages


def images_of(audit: Audit) -> int:
    return audit.images or PROFILES[audit.profile].images


def plan(audit: Audit, bench: Bench, systems: Sequence[System]) -> list[Step]:
    """Every attack, by stage, so that warm starts find what they start from; inside a stage by epsilon."""
    profile, count = PROFILES[audit.profile], images_of(audit)
    targets = [system.name for system in systems] if profile.compare else [OURS]
    steps: list[Step] = []
    swept = [e for e in audit.epsilons if e not in (0.0, audit.headline)] if profile.sweep else []
    for epsilon in sorted({*swept, audit.headline}):
        if epsilon == audit.headline:
            steps += headline(audit, profile, bench, targets, count)
        else:
            steps += several(audit, profile.swept, targets, epsilon, min(count, profile.swept_images))
    far = min(count, profile.far_images)
    for epsilon in (*FAR, UNBOUNDED) if audit.norm == "linf" else ():
        steps += [replace(step, stage=1) for step in several(audit, (("eot-mean-loss", REACH),), [OURS], epsilon, far)]
    return sorted(dict.fromkeys(steps), key=lambda step: step.stage)


def headline(audit: Audit, profile: Profile, bench: Bench, targets: Sequence[str], count: int) -> list[Step]:
    singles = [single(bench, index).name for index in range(len(bench.members))]
    epsilon, few = audit.headline, min(count, profile.few_images)
    others = [name for name in targets if name != OURS]
    queries = [pair for pair in profile.few if isinstance(pair[1], BlackBox) and audit.norm == "linf"]
    costly = [pair for pair in profile.few if not isinstance(pair[1], BlackBox)]
    return [
        *several(audit, profile.each, singles, epsilon, count),
        *several(audit, profile.shared, [*others, OURS], epsilon, count),
        *several(audit, profile.ours, [OURS], epsilon, count),
        *several(audit, costly, [OURS], epsilon, few),
        *several(audit, queries, [OURS], epsilon, few),
        *several(audit, [pair for pair in queries if once(pair[1])], [n for n in others if n == MEAN], epsilon, few),
    ]


def once(settings: Settings) -> bool:
    """A deterministic classifier answers every repeat alike: averaging over it buys nothing."""
    return isinstance(settings, BlackBox) and settings.averages == 1


def several(
    audit: Audit, attacks: Sequence[tuple[str, Settings]], systems: Sequence[str], epsilon: float, images: int
) -> list[Step]:
    return [
        Step(name, system, audit.norm, epsilon, images, settings, stage=STAGES.get(name, 0))
        for system in systems
        for name, settings in attacks
        if audit.wants(name)
    ]


# Cost


def left_out(steps: Sequence[Step]) -> list[str]:
    """The attacks of ATTACKS that an audit does not run."""
    ran = {step.name for step in steps}
    return [name for name in ATTACKS if name not in ran]


def multiply_adds_of(library: Library) -> list[int]:
    """Of one image through each member of the bench."""
    return [multiply_adds(ticket.structure) for ticket in (*library.tickets, *library.baselines)]


def forwards(step: Step, drawn: float, members: int) -> float:
    """Forwards of one image through each member that the attack asks for, at most. drawn: members of a draw."""
    match step.settings:
        case Ascent(steps=steps, restarts=restarts):
            return 2 + GRADIENT * (steps + 1) * (restarts + (step.stage > 0))
        case Sweeps(sweeps=sweeps, candidates=candidates):
            return sweeps * (1 + candidates * (2 + GRADIENT * drawn / members))
        case Standard(method=method, iterations=iterations, restarts=restarts, targets=targets):
            each = 1 if method == "square" else GRADIENT + (method == "fab-t")
            return each * iterations * restarts * (targets if method.endswith("-t") else 1)
        case Single(steps=steps, restarts=restarts):
            return GRADIENT * max(1, steps) * restarts
        case Universal(epochs=epochs):
            return epochs * (GRADIENT + 1) / 2
        case Corners(count=count):
            return 1 + count
        case BlackBox(averages=averages, probes=probes):
            return averages * probes * drawn / members


def giga_multiply_adds(step: Step, system: System, each: Sequence[int]) -> float:
    """The most that one attack can cost, scoring included."""
    used = system.used
    attack = forwards(step, expected_size(system.policy), len(used)) * sum(each[index] for index in used)
    return step.images * (attack + sum(each)) / 1e9


def estimated_seconds(giga: float, threads: int = 1) -> float:
    return giga / (GMACS_PER_SECOND * threads)
