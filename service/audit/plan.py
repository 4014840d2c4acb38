"""The plan of an audit: every attack on every system, stage by stage, so that warm starts have images to start from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from model_store.attacks import Norm
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.baselines import DENSE, OURS, single
from service.audit.config import ATTACKS, Audit, Step
from service.audit.epsilons import Epsilons
from service.audit.errors import AuditRejected
from service.audit.evaluation.draws import Defense
from service.audit.evaluation.members import CandidateSet
from service.audit.profiles import PROFILES, REACH, SMOKE_QUERIES, Named, Profile

SHARED: Final = 2  # the last stage of what every compared system faces alike
CHEAP: Final = ("fgsm", "pgd-20", "eot-mean-loss")  # of stage 0
WARM: Final = ("eot-risk", "arc")  # these start from the riskiest images of earlier stages
AIMED: Final = 2  # before the stages that are aimed at the served policy
FAR_STAGE: Final = AIMED + 4  # the first of the large epsilons


def images_of(audit: Audit) -> int:
    return audit.images or PROFILES[audit.profile].images


def plan(
    audit: Audit,
    epsilons: Epsilons,
    candidates: CandidateSet,
    systems: Sequence[Defense],
    known: Sequence[Defense] = (),
) -> list[Step]:
    """Every attack, in stages, so that warm starts have images to start from.

    systems: compared at every epsilon.  known: thetas that their attackers know, compared at the headline alone.

    Stages 0 to 2 are what all systems face: cheap attacks, costly ones on images that those left, and refinement from
    the riskiest. Later stages are aimed at the served policy alone: the same again, the attack that never gives up a
    gain, the large epsilons. An attack of a later stage leaves out images that earlier ones broke for good.

    Raises:
      AuditRejected: an attack that the profile does not have, or a ticket that does not exist.
    """
    profile, count = PROFILES[audit.profile], images_of(audit)
    refuse_missing(audit, profile)
    targets = [system.name for system in systems]
    singles = [single(candidates, index).name for index in selected_members(audit, candidates)]
    alone, drawn = min(count, profile.single_images), min(count, profile.theta_images)
    steps: list[Step] = steps_for(audit, profile.each, singles, epsilons.headline, alone)
    for epsilon in (e for e in epsilons.swept if e > 0 and (profile.sweep or e == epsilons.headline)):
        main = epsilon == epsilons.headline
        images = count if main else min(count, profile.swept_images)
        steps += steps_for(audit, profile.shared if main else profile.swept, targets, epsilon, images)
    steps += steps_for(audit, profile.shared, [theta.name for theta in known], epsilons.headline, drawn)
    steps += headline_steps(audit, profile, epsilons.headline, count)
    dense = [name for name in targets if name.startswith(DENSE)]
    there = [name for name in profile.published_systems if name in targets]
    steps += steps_for(audit, profile.published, [*there, *dense], epsilons.headline, count, after=AIMED)
    steps += large_epsilon_steps(audit, epsilons, min(count, profile.far_images))
    return sorted(dict.fromkeys(steps), key=lambda step: step.stage)


def endpoint_steps(audit: Audit, epsilons: Epsilons, *, scores: bool, averages: int) -> list[Step]:
    """What answers alone allow, at the headline epsilon.

    scores: whether the answers have probabilities.  averages: answers to each probe.

    Raises:
      AuditRejected: the norm, or an attack that needs more than answers.
    """
    if audit.norm != "linf":
        raise AuditRejected(f"norm {audit.norm}: an endpoint is attacked in linf alone")
    attacks: Named = tuple(
        (name, replace(settings, averages=averages))
        for name, settings in PROFILES[audit.profile].queries or SMOKE_QUERIES
        if isinstance(settings, QueryAttackConfig)
        and settings.averages == 1
        and (scores or settings.method == "hopskipjump")
    )
    there = [name for name, _ in attacks]
    for name in audit.attacks:
        if name not in there:
            raise AuditRejected(f"attacks {name!r}: needs more than an endpoint answers; expected {', '.join(there)}")
    return steps_for(audit, attacks, [OURS], epsilons.headline, images_of(audit))


def attacks_of(profile: Profile, norm: Norm) -> list[str]:
    """The names of all attacks that a profile runs."""
    groups = (
        profile.each,
        profile.shared,
        profile.ours,
        profile.few,
        profile.universal,
        profile.published,
        queries_of(profile, norm),
    )
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


def selected_members(audit: Audit, candidates: CandidateSet) -> list[int]:
    """The members to attack one by one: those that the audit names, or all. Raises AuditRejected."""
    for name in audit.tickets:
        if name not in candidates.names:
            raise AuditRejected(f"tickets {name!r:.60}; expected some of {', '.join(candidates.names)}")
    return [index for index, name in enumerate(candidates.names) if not audit.tickets or name in audit.tickets]


def headline_steps(audit: Audit, profile: Profile, epsilon: float, count: int) -> list[Step]:
    """What is aimed at ours at the headline epsilon, and what is set beside it."""
    few, queried = min(count, profile.few_images), min(count, profile.queried_images)
    universal = min(count, profile.universal_images)
    queries = queries_of(profile, audit.norm)
    fixed = tuple(
        pair for pair in queries if isinstance(pair[1], QueryAttackConfig) and pair[1].averages == 1
    )  # answers alike
    return [
        *steps_for(audit, profile.ours, [OURS], epsilon, count, after=AIMED),
        *steps_for(audit, profile.few, [OURS], epsilon, few, after=AIMED),
        *steps_for(audit, profile.universal, profile.universal_systems, epsilon, universal, after=AIMED),
        *steps_for(audit, queries, [OURS], epsilon, queried, after=AIMED),
        *steps_for(audit, fixed, profile.queried_systems, epsilon, queried, after=AIMED),
    ]


def large_epsilon_steps(audit: Audit, epsilons: Epsilons, images: int) -> list[Step]:
    """Each size from where the one before it came."""
    reach = (("eot-mean-loss", REACH),)
    return [
        replace(step, stage=FAR_STAGE + place, warm=True)
        for place, size in enumerate((*epsilons.far, epsilons.largest))
        for step in steps_for(audit, reach, [OURS], size, images)
    ]


def attacked_epsilons(steps: Sequence[Step], epsilons: Epsilons) -> tuple[float, ...]:
    """Those of the figure and its curve, without the large ones of the checks: not every profile sweeps."""
    attacked = {step.epsilon for step in steps}
    return tuple(epsilon for epsilon in epsilons.swept if epsilon in attacked)


def steps_for(
    audit: Audit, attacks: Named, systems: Sequence[str], epsilon: float, images: int, after: int = 0
) -> list[Step]:
    def stage(name: str) -> int:
        if name in WARM:
            return after + 2 + (name == "arc")
        return after + (after > 0 or name not in CHEAP)

    return [
        Step(name, system, audit.norm, epsilon, images, settings, stage(name), name in WARM)
        for system in systems
        for name, settings in attacks
        if audit.wants(name)
    ]


def skipped_attacks(steps: Sequence[Step]) -> list[str]:
    """The attacks of ATTACKS that an audit does not run."""
    ran = {step.name for step in steps}
    return [name for name in ATTACKS if name not in ran]
