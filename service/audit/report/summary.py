"""An audit's report from its run. Library, images, seeds and code fix everything in it but the timings."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, JsonValue
from torch import Tensor

from model_store import policy as sampling
from model_store.code_version import code_commit
from model_store.json_object import digest_of
from model_store.ticket import ZERO_DIGEST
from service.audit import baselines, stats
from service.audit.attack_runner import AuditRun, Outcome
from service.audit.config import BLACK_BOX, NOT_COVERED
from service.audit.epsilons import threat_model
from service.audit.evaluation.draws import Defense, is_countable
from service.audit.evaluation.scoring import Scores, pointwise_worst
from service.audit.plan import skipped_attacks
from service.audit.profiles import PROFILES, SHARED
from service.audit.report.model import (
    FORMAT,
    VERSION,
    Attack,
    AuditPart,
    Check,
    Comparison,
    Contribution,
    CurvePoint,
    DataPart,
    Figures,
    Interval,
    LibraryPart,
    OutsideLibrary,
    Part,
    PerImage,
    ProfilePart,
    Report,
    Secrecy,
    System,
    Ticket,
    Timings,
    Transfer,
    Universal,
    UniversalSystem,
    Verdict,
    digest_of_report,
)
from service.audit.secrecy import read_secrecy
from service.audit.stats import bootstrap, clopper_pearson, holm, paired_difference, sign_flip_p

TRIES: Final = (1, 10, 100)
PACKAGES: Final = ("torch", "numpy", "pyautoattack", "adversarial-robustness-toolbox", "tombola")
DIGITS: Final = 6
SIGNIFICANT: Final = 0.05
FIXED_DRAW: Final = "average fixed draw"  # of the served law, known to its attacker
RANDOMNESS: Final = (baselines.MEAN, baselines.COST, FIXED_DRAW)  # what is compared for the randomness alone

CONTRIBUTORS: Final = {
    "attacks aimed at random ensembles": ("eot-targeted", "eot-probability-margin", "eot-alternating", "mora", "arc"),
    "AutoAttack's and ART's own code": ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "hopskipjump-queries"),
}


def interval(estimate: stats.Interval) -> Interval:
    value, low, high = (round(each, DIGITS) for each in estimate)
    return Interval(value=value, low=low, high=high)


def mean(values: NDArray[np.float64]) -> Interval:
    """The mean over images with its bootstrap interval."""
    return interval(bootstrap(values))


def figures(scores: Scores) -> Figures:
    """The definitions of accuracy, and accuracy by ensemble size, with 95 % intervals."""
    right, images = scores.right.numpy(), len(scores.right)
    return Figures(
        images=images,
        expected=mean(right),
        tries={f"k{k}": mean(right**k) for k in TRIES},
        no_failing_draw=interval(clopper_pearson(images - int(scores.any_wrong.sum()), images)),
        majority=interval(clopper_pearson(int((scores.right > 0.5).sum()), images)),
        by_size={str(n): round(float(p.mean()), DIGITS) for n, p in scores.by_size.items()},
    )


def summarize(run: AuditRun, checks: Sequence[Mapping[str, Any]], seconds: float) -> Report:
    """The whole report. Its digest covers all but itself and the timings."""
    rows = [Check(**row) for row in checks]
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **verdict(rows, partial=bool(run.audit.attacks)),
        "audit": audit_part(run),
        "profile": ProfilePart(
            about=PROFILES[run.audit.profile].about, left_out=skipped_attacks(run.steps), crafted_in=run.crafted_in
        ),
        "threat_model": {**threat_model(run.audit, run.epsilons), **(BLACK_BOX if run.endpoint else {})},
        "not_covered": list(NOT_COVERED),
        "library": library_part(run),
        "data": data_part(run),
        "versions": versions(),
        "systems": {system.name: system_part(run, system) for system in run.systems},
        "attacks": [attack_part(run, outcome) for outcome in run.outcomes],
        "tickets": ticket_rows(run),
        "transfer": transfer_part(run),
        "comparisons": comparisons(run),
        "secrecy": secrecy_part(run),
        "contributions": contributions(run),
        "universal": universal_part(run),
        "checks": rows,
        "per_image": per_image(run),
    }
    timings = Timings(
        seconds=round(seconds, 2),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        attacks={outcome.step.id: round(outcome.seconds, 3) for outcome in run.outcomes},
    )
    return with_digest(Report(**body, digest=ZERO_DIGEST, timings=timings))


def with_digest(report: Report) -> Report:
    return report.model_copy(update={"digest": digest_of_report(report.as_json())})


def verdict(checks: Sequence[Check], *, partial: bool = False) -> dict[str, Any]:
    """partial: only chosen attacks ran, so that the figures are theirs alone."""
    failed = [check.id for check in checks if check.outcome == "fail"]
    warned = [check.id for check in checks if check.outcome == "warn"]
    word = "invalid" if failed else "warnings" if warned or partial else "valid"
    return {"verdict": word, "failed": failed, "warned": warned}


def audit_part(run: AuditRun) -> AuditPart:
    epsilons = {"epsilons": run.epsilons.swept, "headline": run.epsilons.headline}
    return AuditPart(**{**asdict(run.audit), **epsilons, "images": len(run.data)})


def library_part(run: AuditRun) -> LibraryPart:
    policy, names = run.library.policy, list(run.candidates.names)
    tickets, own = run.candidates.tickets, run.candidates.own
    surrogate = run.options.outside
    outside = None if surrogate is None else OutsideLibrary(digest=surrogate.digest, members=names[own:])
    return LibraryPart(
        digest=run.library.digest,
        classes=list(run.library.classes),
        tickets=names[:tickets],
        baselines=names[tickets:own],
        outside=outside,
        states=sampling.states(policy),
        effective_states=round(sampling.effective_states(policy), 3),
        entropy_bits=round(sampling.entropy_bits(policy), 4),
        expected_size=round(sampling.expected_size(policy), DIGITS),
    )


def data_part(run: AuditRun) -> DataPart:
    return DataPart(
        name=run.data.name,
        origin=run.data.origin,
        held_out=run.data.held_out,
        images=len(run.data),
        digest=run.data.digest,
        ids_digest=digest_of(list(run.data.ids)),
        ids=list(run.data.ids),
    )


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version(), "commit": code_commit()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


# Parts


def system_part(run: AuditRun, system: Defense) -> System:
    curve, images = [], covered(run)
    for epsilon in epsilons(run):
        point = mean(run.robust(system, epsilon, images).right.numpy())
        curve.append(CurvePoint(epsilon=epsilon, value=point.value, low=point.low, high=point.high, images=images))
    return System(
        about=system.about,
        members=[run.candidates.names[index] for index in system.used],
        scored_on=scored_on(run, system),
        clean=figures(run.reported(system, len(run.data), clean=True)),
        robust=figures(run.reported(system, len(run.data))),
        shared=figures(run.reported(system, len(run.data), shared=True)),
        curve=curve,
    )


def scored_on(run: AuditRun, system: Defense) -> str:
    draws = run.scoring(system)
    if len(draws.rows) == 1:
        return "one state"
    if draws.exhaustive:
        return f"all {len(draws.rows):,} states"
    if is_countable(system.policy):
        return f"all {sampling.states(system.policy):,} states, its images chosen on {len(draws.rows):,} draws"
    return f"{len(draws.rows):,} draws"


def epsilons(run: AuditRun) -> list[float]:
    return sorted({0.0} | {step.epsilon for step in run.steps if step.epsilon in run.epsilons.swept})


def covered(run: AuditRun) -> int:
    """The images on which every system was attacked at every epsilon: a curve has the same ones all along."""
    counts = [step.images for step in run.steps if step.epsilon in run.epsilons.swept and step.stage <= SHARED]
    return min(counts, default=len(run.data))


def attack_part(run: AuditRun, outcome: Outcome) -> Attack:
    step = outcome.step
    own = run.system(step.system)
    right = run.scores(own, outcome).right
    broken = (right < 0.5) & (run.clean(own).right[: step.images] >= 0.5)
    return Attack(
        id=step.id,
        **step.as_dict(),
        expected=mean(right.numpy()),
        tombola=round(float(run.scores(run.systems[0], outcome).right.mean()), DIGITS),
        broken=int(broken.sum()),
        broken_by_no_other=count_broken_by_no_other(run, outcome, broken),
        images_seen=step.images,
        image_steps=outcome.passes,
        trace=outcome.trace,
        **outcome.extra,
    )


def count_broken_by_no_other(run: AuditRun, outcome: Outcome, broken: Tensor) -> int:
    """Images whose majority only this attack, of those on the same system within its epsilon, turns."""
    own = run.system(outcome.step.system)
    left = broken.clone()
    for other in run.outcomes:
        if other is outcome or other.step.system != own.name or other.step.epsilon > outcome.step.epsilon:
            continue
        count = min(len(left), other.step.images)
        left[:count] &= run.scores(own, other).right[:count] >= 0.5
    return int(left.sum())


def singles(run: AuditRun, attack: str) -> dict[str, Outcome]:
    """The outcomes of an attack on each member alone, by the member's name."""
    return {o.step.system.split(" ", 1)[1]: o for o in run.outcomes if o.step.name == attack}


def ticket_rows(run: AuditRun) -> list[Ticket]:
    """Each ticket and baseline alone."""
    rows = []
    attacked = {name: singles(run, name) for name in ("fgsm", "pgd-20")}
    for index, name in enumerate(run.candidates.names):
        own = baselines.single(run.candidates, index)
        robust = {
            attack: mean(run.scores(own, outcomes[name]).right.numpy())
            for attack, outcomes in attacked.items()
            if name in outcomes
        }
        role, structure = own.name.split(" ")[0], run.candidates.structures[index]
        clean = mean(run.clean(own).right.numpy())
        rows.append(Ticket(name=name, structure=structure, role=role, clean=clean, **robust))
    return rows


def transfer_part(run: AuditRun) -> Transfer | None:
    """The matrix over the members that were attacked one by one, and its means over pairs of structures."""
    outcomes = singles(run, "pgd-20") or singles(run, "fgsm")
    chosen = [index for index, name in enumerate(run.candidates.names) if name in outcomes]
    if not any(index < run.candidates.tickets for index in chosen):
        return None
    names = [run.candidates.names[index] for index in chosen]
    rows = []
    for name in names:
        outcome = outcomes[name]
        right = outcome.logits[chosen].argmax(dim=2) == run.data.labels[: outcome.step.images]
        rows.append([round(value, DIGITS) for value in right.double().mean(dim=1).tolist()])
    attack = next(iter(outcomes.values())).step.name
    structures = [run.candidates.structures[index] for index in chosen if index < run.candidates.tickets]
    return Transfer(attack=attack, names=names, accuracy=rows, **blocks(structures, torch.tensor(rows)))


def blocks(structures: Sequence[str], matrix: Tensor) -> dict[str, Any]:
    """Means over the tickets, which come first, without the diagonal, where the attacker holds the ticket that answers.

    structures: the tickets'.
    """
    count = len(structures)
    off = ~torch.eye(count, dtype=torch.bool)
    means = {}
    for first in dict.fromkeys(structures):
        for second in dict.fromkeys(structures):
            inside = [
                (i, j)
                for i in range(count)
                for j in range(count)
                if (structures[i], structures[j]) == (first, second) and i != j
            ]
            if inside:
                means[f"{first} -> {second}"] = round(float(torch.stack([matrix[i, j] for i, j in inside]).mean()), 6)
    square = matrix[:count, :count]
    naive = round(float(square.mean()), 6)
    diagonal = round(float(square.diagonal().mean()), 6)
    outside = round(float(square[off].mean()), 6) if count > 1 else None
    return {"blocks": means, "diagonal": diagonal, "off_diagonal": outside, "naive_random_against_random": naive}


def comparisons(run: AuditRun) -> list[Comparison]:
    """Ours less each other system: same images, same attacks, paired. Words only where the interval and Holm's
    correction for the number of comparisons allow them."""
    count = len(run.data)
    ours, *others = run.systems
    own = run.reported(ours, count, shared=True).right.numpy()
    own_clean = run.reported(ours, count, clean=True).right.numpy()
    pairs = {
        other.name: (run.reported(other, count, shared=True).right.numpy(), run.clean(other).right.numpy())
        for other in others
    }
    robust = {name: paired_difference(own, theirs) for name, (theirs, _) in pairs.items()}
    if (reading := read_secrecy(run)) is not None:
        clean_known = torch.stack([run.clean(theta).right for theta in run.known]).mean(dim=0)[: len(reading.secret)]
        pairs[FIXED_DRAW] = (reading.known.mean(dim=0).numpy(), clean_known.numpy())
        robust[FIXED_DRAW] = reading.difference
    corrected = holm([sign_flip_p(own[: len(theirs)], theirs) for theirs, _ in pairs.values()])
    return [
        Comparison(
            against=name,
            robust=interval(robust[name]),
            clean=interval(paired_difference(own_clean[: len(clean)], clean)),
            words=words(robust[name], p, randomness=name in RANDOMNESS),
            p=round(p, DIGITS),
        )
        for (name, (_, clean)), p in zip(pairs.items(), corrected, strict=True)
    ]


def secrecy_part(run: AuditRun) -> Secrecy | None:
    """None where nothing is secret, or where chosen attacks alone ran."""
    reading = read_secrecy(run)
    if reading is None:
        return None
    return Secrecy(
        difference=interval(reading.difference),
        secret=mean(reading.secret.numpy()),
        known=interval(reading.known_accuracy),
        thetas=len(reading.known),
        images=len(reading.secret),
    )


def contributions(run: AuditRun) -> list[Contribution]:
    """By how much some attacks lower the served law's figure, at the headline epsilon, beyond all others."""
    tried = run.reached(run.systems[0], run.epsilons.headline, len(run.data))
    ran = {each.step.name for each in tried if each.step is not None}
    everything = pointwise_worst([each.scores for each in tried]).right.numpy()
    rows = []
    for name, attacks in CONTRIBUTORS.items():
        others = [each.scores for each in tried if each.step is None or each.step.name not in attacks]
        lowers = interval(paired_difference(pointwise_worst(others).right.numpy(), everything))
        if there := [attack for attack in attacks if attack in ran]:
            rows.append(Contribution(name=name, attacks=there, lowers=lowers))
    return rows


def words(difference: stats.Interval, p: float, *, randomness: bool) -> str:
    """p: corrected for the number of comparisons."""
    what = "randomisation" if randomness else "the served law"
    if difference.low <= 0 <= difference.high:
        return "no difference shown: the interval holds 0"
    if p > SIGNIFICANT:
        return f"no difference shown: p = {p:.2f} after Holm's correction"
    return f"{what} helps" if difference.low > 0 else f"{what} does not help: it loses"


def universal_part(run: AuditRun) -> Universal | None:
    """One perturbation for all images, on the half of the images that none was made from.

    Each system under the one made against it, if there is one, and under the worst of all.
    """
    outcomes = {outcome.step.system: outcome for outcome in run.outcomes if outcome.step.name == "universal"}
    if not outcomes:
        return None
    images = min(outcome.step.images for outcome in outcomes.values())
    unseen = torch.arange(max(1, images // 2), images)
    rows = {}
    for system in run.systems:
        after = {name: run.scores(system, outcome).pick(unseen).right for name, outcome in outcomes.items()}
        lowest = min(after.values(), key=lambda right: float(right.mean()))
        rows[system.name] = UniversalSystem(
            clean=mean(run.clean(system).pick(unseen).right.numpy()),
            own=mean(after[system.name].numpy()) if system.name in after else None,
            worst=mean(lowest.numpy()),
        )
    return Universal(made_against=list(outcomes), images=len(unseen), systems=rows)


def per_image(run: AuditRun) -> dict[str, PerImage]:
    """p_i of every system, clean and at the headline: what two reports are compared by."""

    def row(scores: Scores) -> list[float]:
        return [round(p, DIGITS) for p in scores.right.tolist()]

    count = len(run.data)
    return {
        system.name: PerImage(
            clean=row(run.reported(system, count, clean=True)), robust=row(run.reported(system, count))
        )
        for system in run.systems
    }


# Two reports


class Change(Part):
    """A system's change from one report to another. None where the images are not the same."""

    clean: Interval | None
    robust: Interval | None


class Changes(Part):
    """What changed from one report to another."""

    paired: bool = Field(description="whether both are on the same images")
    changed: dict[str, tuple[JsonValue, JsonValue]]
    verdicts: tuple[Verdict, Verdict]
    systems: dict[str, Change]


def compare(first: Report, second: Report) -> Changes:
    """What changed, with paired intervals where the images are the same."""
    changed: dict[str, tuple[JsonValue, JsonValue]] = {
        f"{part}.digest": pair
        for part, pair in (
            ("library", (first.library.digest, second.library.digest)),
            ("data", (first.data.digest, second.data.digest)),
        )
        if pair[0] != pair[1]
    }
    before, after = first.audit.model_dump(mode="json"), second.audit.model_dump(mode="json")
    changed |= {f"audit.{name}": (before[name], after.get(name)) for name in before if before[name] != after.get(name)}
    paired = first.data.ids_digest == second.data.ids_digest
    return Changes(
        paired=paired,
        changed=changed,
        verdicts=(first.verdict, second.verdict),
        systems={
            name: change(first.per_image[name], second.per_image[name], paired=paired)
            for name in first.per_image
            if name in second.per_image
        },
    )


def change(before: PerImage, after: PerImage, *, paired: bool) -> Change:
    if not paired:
        return Change(clean=None, robust=None)
    return Change(
        clean=interval(paired_difference(after.clean, before.clean)),
        robust=interval(paired_difference(after.robust, before.robust)),
    )
