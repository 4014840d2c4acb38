"""An audit's figures as one JSON object: everything but timings is fixed by library, images, seeds and code."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from torch import Tensor

from model_store import policy as sampling
from model_store.code_version import code_commit
from service.audit import baselines
from service.audit.attack_runner import AuditRun, Outcome
from service.audit.config import NOT_COVERED, digest_of, threat_model
from service.audit.evaluation.draws import Defense, is_countable
from service.audit.evaluation.scoring import Scores
from service.audit.plan import skipped_attacks
from service.audit.profiles import PROFILES, SHARED
from service.audit.stats import Interval, bootstrap, clopper_pearson, paired_difference

FORMAT: Final = "tombola-audit"
VERSION: Final = 1
TRIES: Final = (1, 10, 100)
UNTOUCHED: Final = ("digest", "timings")  # the digest is over everything else
PACKAGES: Final = ("torch", "numpy", "pyautoattack", "adversarial-robustness-toolbox", "tombola")
Json = dict[str, Any]


def interval(found: Interval) -> Json:
    return {name: round(value, 6) for name, value in found._asdict().items()}


def figures(found: Scores) -> Json:
    """The four definitions of accuracy, and by ensemble size, with 95 % intervals."""
    right = found.right.numpy()
    tries = {f"k{k}": interval(bootstrap(right**k)) for k in TRIES}
    images = len(right)
    return {
        "images": images,
        "expected": interval(bootstrap(right)),
        "tries": tries,
        "no_failing_draw": interval(clopper_pearson(images - int(found.any_wrong.sum()), images)),
        "majority": interval(clopper_pearson(int((found.right > 0.5).sum()), images)),
        "by_size": {str(n): round(float(p.mean()), 6) for n, p in found.by_size.items()},
    }


def summary(run: AuditRun, checks: Sequence[Json], seconds: float) -> Json:
    """The whole report. `digest` covers all but itself and the timings."""
    body: Json = {
        "format": FORMAT,
        "version": VERSION,
        **verdict(checks, partial=bool(run.audit.attacks)),
        "audit": {**asdict(run.audit), "images": len(run.data), "headline": run.audit.headline},
        "profile": {"about": PROFILES[run.audit.profile].about, "left_out": skipped_attacks(run.steps)},
        "threat_model": threat_model(run.audit),
        "not_covered": list(NOT_COVERED),
        "library": library_of(run),
        "data": data_of(run),
        "versions": versions(),
        "systems": {system.name: system_of(run, system) for system in run.systems},
        "attacks": [attack_of(run, outcome) for outcome in run.outcomes],
        "tickets": tickets_of(run),
        "transfer": transfer_of(run),
        "comparisons": comparisons(run),
        "universal": universal_of(run),
        "checks": list(checks),
        "per_image": per_image(run),
    }
    timings = {"seconds": round(seconds, 2), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    timings |= {"attacks": {o.step.id: round(o.seconds, 3) for o in run.outcomes}}
    return {**body, "digest": digest_of(body), "timings": timings}


def digest_holds(report: Json) -> bool:
    return digest_of({k: v for k, v in report.items() if k not in UNTOUCHED}) == report.get("digest")


def verdict(checks: Sequence[Json], *, partial: bool = False) -> Json:
    """partial: only some of the profile's attacks were asked for, so that the figures are of those alone."""
    failed = [c for c in checks if c["outcome"] == "fail"]
    warned = [c for c in checks if c["outcome"] == "warn"]
    word = "invalid" if failed else "warnings" if warned or partial else "valid"
    return {"verdict": word, "failed": [c["id"] for c in failed], "warned": [c["id"] for c in warned]}


def library_of(run: AuditRun) -> Json:
    policy = run.library.policy
    return {
        "digest": run.library.digest,
        "classes": list(run.library.classes),
        "tickets": list(run.candidates.names[: run.candidates.tickets]),
        "baselines": list(run.candidates.names[run.candidates.tickets : run.candidates.own]),
        "outside": outside_of(run),
        "states": sampling.states(policy),
        "effective_states": round(sampling.effective_states(policy), 3),
        "entropy_bits": round(sampling.entropy_bits(policy), 4),
        "expected_size": round(sampling.expected_size(policy), 6),
    }


def outside_of(run: AuditRun) -> Json | None:
    """The attacker's own library, if there was one."""
    if run.outside is None:
        return None
    return {"digest": run.outside.digest, "members": list(run.candidates.names[run.candidates.own :])}


def data_of(run: AuditRun) -> Json:
    return {
        "name": run.data.name,
        "origin": run.data.origin,
        "held_out": run.data.held_out,
        "images": len(run.data),
        "digest": run.data.digest,
        "ids_digest": digest_of(list(run.data.ids)),
        "ids": list(run.data.ids),
    }


def versions() -> Json:
    found = {"python": platform.python_version(), "commit": code_commit()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# Parts


def system_of(run: AuditRun, system: Defense) -> Json:
    curve, images = [], covered(run)
    for epsilon in epsilons(run):
        found = run.robust(system, epsilon, images)
        curve.append({"epsilon": epsilon, **interval(bootstrap(found.right.numpy())), "images": images})
    return {
        "about": system.about,
        "members": [run.candidates.names[index] for index in system.used],
        "scored_on": scored_on(run, system),
        "clean": figures(run.reported(system, len(run.data), clean=True)),
        "robust": figures(run.reported(system, len(run.data))),
        "shared": figures(run.reported(system, len(run.data), shared=True)),
        "curve": curve,
    }


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
    return sorted({0.0} | {step.epsilon for step in run.steps if step.epsilon in (*run.audit.epsilons,)})


def covered(run: AuditRun) -> int:
    """The images on which every system was attacked at every epsilon: a curve has the same ones all along."""
    counts = [step.images for step in run.steps if step.epsilon in run.audit.epsilons and step.stage <= SHARED]
    return min(counts, default=len(run.data))


def attack_of(run: AuditRun, outcome: Outcome) -> Json:
    step = outcome.step
    own = run.system(step.system)
    labels = run.data.labels[: step.images]
    found = run.scores(own, outcome)
    broken = (found.right < 0.5) & (run.clean(own).right[: step.images] >= 0.5)
    return {
        "id": step.id,
        **step.as_dict(),
        "expected": interval(bootstrap(found.right.numpy())),
        "tombola": round(float(run.scores(run.systems[0], outcome).right.mean()), 6),
        "broken": int(broken.sum()),
        "broken_by_no_other": alone(run, outcome, broken),
        "images_seen": len(labels),
        "image_steps": outcome.passes,
        "trace": outcome.trace,
        **outcome.extra,
    }


def alone(run: AuditRun, outcome: Outcome, broken: Tensor) -> int:
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


def tickets_of(run: AuditRun) -> list[Json]:
    """Table 1: each ticket and baseline alone."""
    rows = []
    attacked = {name: singles(run, name) for name in ("fgsm", "pgd-20")}
    for index, name in enumerate(run.candidates.names):
        own = baselines.single(run.candidates, index)
        row: Json = {"name": name, "structure": run.candidates.structures[index], "role": own.name.split(" ")[0]}
        row["clean"] = interval(bootstrap(run.clean(own).right.numpy()))
        for attack, outcomes in attacked.items():
            if name in outcomes:
                row[attack] = interval(bootstrap(run.scores(own, outcomes[name]).right.numpy()))
        rows.append(row)
    return rows


def transfer_of(run: AuditRun) -> Json | None:
    """Fig. 1: row = the member attacked, column = the one that answers; means over blocks of structures. Of the members
    that the audit attacked one by one."""
    outcomes = singles(run, "pgd-20") or singles(run, "fgsm")
    chosen = [index for index, name in enumerate(run.candidates.names) if name in outcomes]
    if not any(index < run.candidates.tickets for index in chosen):
        return None
    names = [run.candidates.names[index] for index in chosen]
    rows = []
    for name in names:
        outcome = outcomes[name]
        right = outcome.logits[chosen].argmax(dim=2) == run.data.labels[: outcome.step.images]
        rows.append([round(value, 6) for value in right.double().mean(dim=1).tolist()])
    attack = next(iter(outcomes.values())).step.name
    structures = [run.candidates.structures[index] for index in chosen if index < run.candidates.tickets]
    return {"attack": attack, "names": names, "accuracy": rows, **blocks(structures, torch.tensor(rows))}


def blocks(structures: Sequence[str], matrix: Tensor) -> Json:
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


def comparisons(run: AuditRun) -> list[Json]:
    """Ours less each other system, on the same images under the same attacks, paired; words only where the interval
    allows them."""
    count = len(run.data)
    ours, *others = run.systems
    own = run.reported(ours, count, shared=True).right.numpy()
    own_clean = run.reported(ours, count, clean=True).right.numpy()
    rows = []
    for other in others:
        theirs = run.reported(other, count, shared=True).right.numpy()
        robust = paired_difference(own, theirs)
        clean = paired_difference(own_clean, run.clean(other).right.numpy())
        rows.append(
            {
                "against": other.name,
                "robust": interval(robust),
                "clean": interval(clean),
                "words": words(robust, randomness=other.name in (baselines.MEAN, baselines.COST)),
            }
        )
    return rows


def words(difference: Interval, *, randomness: bool) -> str:
    what = "randomisation" if randomness else "the served law"
    if difference.low > 0:
        return f"{what} helps"
    if difference.high < 0:
        return f"{what} does not help: it loses"
    return "no difference shown: the interval holds 0"


def universal_of(run: AuditRun) -> Json | None:
    """One perturbation for all images: each system on the half of the images that none was made from, under the one
    made against it (if one was), and under the worst of all that were made."""
    found = {o.step.system: o for o in run.outcomes if o.step.name == "universal"}
    if not found:
        return None
    images = min(o.step.images for o in found.values())
    unseen = torch.arange(max(1, images // 2), images)
    rows = {}
    for system in run.systems:
        after = {name: run.scores(system, o).pick(unseen).right for name, o in found.items()}
        lowest = min(after.values(), key=lambda right: float(right.mean()))
        rows[system.name] = {
            "clean": interval(bootstrap(run.clean(system).pick(unseen).right.numpy())),
            "own": interval(bootstrap(after[system.name].numpy())) if system.name in after else None,
            "worst": interval(bootstrap(lowest.numpy())),
        }
    return {"made_against": list(found), "images": len(unseen), "systems": rows}


def per_image(run: AuditRun) -> Json:
    """p_i of every system, clean and at the headline: what two reports are compared by."""

    def row(found: Scores) -> list[float]:
        return [round(p, 6) for p in found.right.tolist()]

    count = len(run.data)
    return {
        system.name: {
            "clean": row(run.reported(system, count, clean=True)),
            "robust": row(run.reported(system, count)),
        }
        for system in run.systems
    }


def compare(first: Json, second: Json) -> Json:
    """What changed from one report to another, with paired intervals where the images are the same."""
    changed = {
        field: [first[field]["digest"], second[field]["digest"]]
        for field in ("library", "data")
        if first[field]["digest"] != second[field]["digest"]
    }
    changed |= {
        f"audit.{name}": [first["audit"][name], second["audit"].get(name)]
        for name in first["audit"]
        if first["audit"][name] != second["audit"].get(name)
    }
    same = first["data"]["ids_digest"] == second["data"]["ids_digest"]
    rows = {}
    for name in first["per_image"]:
        if name in second["per_image"]:
            one, other = first["per_image"][name], second["per_image"][name]
            rows[name] = {
                kind: interval(paired_difference(other[kind], one[kind])) if same else None
                for kind in ("clean", "robust")
            }
    return {"paired": same, "changed": changed, "verdicts": [first["verdict"], second["verdict"]], "systems": rows}
