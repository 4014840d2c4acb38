"""Finished jobs -> a library, alone or over one that exists; and the paper's Table 1 from a library's claims."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

from model_store.library import Library, open_library, write_library
from model_store.manifest import Claim, Entry, Provenance
from model_store.structures import STRUCTURES
from model_store.ticket import Ticket
from training.errors import TrainingError
from training.jobs import Job, find_jobs, read_output

Made = tuple[Ticket, Provenance, Sequence[Claim]]

# Robust Scratch Tickets' and the paper's structures as they print them, and their PGD-20 range over the ten densities.
PRINTED: Final = {
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "wideresnet32": "WideResNet32",
    "wideresnet38": "WideResNet38",
}


def export(path: Path, states: Sequence[Path], base: Path | None = None) -> Library:
    """Writes the library of every finished job in `states`, over `base`'s tickets where it has better ones.

    Better is chosen by held-out training images alone (mean of clean and PGD accuracy), never by test images.
    """
    library = open_library(base) if base else None
    made = {role: made_by(library, role) for role in ("ticket", "baseline")}
    classes = library.classes if library else None
    for job in (job for state in states for job in find_jobs(state) if (job.folder / "done.json").exists()):
        result = read_output(job.folder)
        agree(classes, job)
        classes = job.classes
        offer(made[job.role], result)
    if not made["ticket"] or classes is None:
        raise TrainingError(f"{', '.join(map(str, states)) or 'no --state'}: no finished ticket; nothing was written")
    data = next(claim.data.name for _, _, claims in made["ticket"].values() for claim in claims)
    return write_library(
        path,
        classes=classes,
        data=data,
        tickets=sort_by_structure(made["ticket"]),
        baselines=sort_by_structure(made["baseline"]),
    )


def agree(classes: tuple[str, ...] | None, job: Job) -> None:
    if classes not in (None, job.classes):
        raise TrainingError(
            f"{job.folder}: classes {', '.join(job.classes)}; the others have {', '.join(classes or ())}"
        )


def made_by(library: Library | None, role: str) -> dict[str, Made]:
    if library is None:
        return {}
    tickets = library.tickets if role == "ticket" else library.baselines
    entries = [entry for entry in library.manifest.entries if entry.role == role]
    return {
        ticket.name: (ticket, entry.provenance, entry.claims) for ticket, entry in zip(tickets, entries, strict=True)
    }


def offer(made: dict[str, Made], result: Made) -> None:
    """Takes the result's place under its name if there is none, or a worse one."""
    before = made.get(result[0].name)
    if before is None or selection_score(result) >= selection_score(before):
        made[result[0].name] = result


def selection_score(result: Made) -> float:
    """Mean of clean and PGD accuracy on selection images."""
    return fmean(claim.value for claim in result[2] if claim.data.split == "selection")


def sort_by_structure(made: dict[str, Made]) -> list[Made]:
    """By structure as the paper lists them, then by density."""
    return sorted(made.values(), key=lambda item: (STRUCTURES.index(item[0].structure.name), item[0].density))


# --- Table 1 ---------------------------------------------------------------------------------------------------


def table(library: Library) -> str:
    """Markdown: a row a density, their mean, and the dense baselines; clean and PGD accuracy in % of each structure.

    The intervals are in the manifest.
    """
    entries = {(entry.structure.name, entry.density): entry for entry in library.entries}
    names = [name for name in STRUCTURES if any(key[0] == name for key in entries)]
    densities = sorted({key[1] for key in entries})
    head = ["density", *(f"{PRINTED[name]} clean / PGD-20" for name in names)]
    rows = [[f"{100 * d:.0f} %", *(cell(entries.get((name, d))) for name in names)] for d in densities]
    rows.append(["**mean**", *(mean_cell([e for e in library.entries if e.structure.name == name]) for name in names)])
    if library.baseline_entries:
        dense = {entry.structure.name: entry for entry in library.baseline_entries}
        rows.append(["dense, never drawn", *(cell(dense.get(name)) for name in names)])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + conditions(library)


def mark(library: Path | None) -> str:
    """The line of a page under which the library's table stands: the command that makes it. None: the embedded one."""
    return f"<!-- table: tombola table{'' if library is None else f' {library}'} -->"


def claim_on_test(entry: Entry, metric: str) -> Claim:
    return next(claim for claim in entry.claims if claim.metric == metric and claim.data.split == "test")


def cell(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    return " / ".join(f"{100 * claim_on_test(entry, metric).value:.1f}" for metric in ("clean", "pgd"))


def mean_cell(entries: Sequence[Entry]) -> str:
    values = (fmean(claim_on_test(entry, metric).value for entry in entries) for metric in ("clean", "pgd"))
    return " / ".join(f"**{100 * value:.1f}**" for value in values)


def conditions(library: Library) -> str:
    """What the figures above were measured under, from the claims themselves."""
    clean, attacked = (claim_on_test(library.entries[0], metric) for metric in ("clean", "pgd"))
    attack = attacked.attack
    assert attack is not None  # noqa: S101 (a Claim of metric pgd has one)
    shown = [claim_on_test(entry, metric) for entry in library.entries for metric in ("clean", "pgd")]
    widest = max((claim.high - claim.low) / 2 for claim in shown)
    return (
        f"{attacked.data.name}, test images: n = {clean.images:,} clean, {attacked.images:,} attacked; {attack.norm} "
        f"PGD, ε = {255 * attack.epsilon:g}/255, {attack.steps} steps of {255 * attack.step_size:g}/255, "
        f"{attack.restarts} random start, {attack.loss}, best iterate. 95 % intervals (Wilson, in the manifest) are "
        f"within ±{100 * widest:.1f} points. Library {library.digest[:12]}."
    )
