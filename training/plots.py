"""Figures of searches against time: loss and held-out accuracy from their logs, and libraries' claims from manifests.

Time is of one process of one thread.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model_store.files import replacing
from model_store.library import Library
from model_store.quiet_imports import import_matplotlib
from training.errors import TrainingError
from training.export import claim_on_test
from training.jobs import Job, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED = 15  # log lines, 20 steps each


def draw(jobs: Sequence[Job], path: Path) -> None:
    """Writes one figure of all the jobs that have a log. path: .svg or .png. Raises TrainingError if none has."""
    logs = {job.name: rows for job in jobs if (rows := read_log(job.folder))}
    if not logs:
        raise TrainingError("no search has logged a step yet; there is nothing to draw")
    figure = import_matplotlib().figure.Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, rows in logs.items():
        steps = [row for row in rows if row["kind"] == "step"]
        guards = [row for row in rows if row["kind"] == "guard"]
        minutes = [row["seconds"] / 60 for row in steps]
        axes[0].plot(minutes, smooth([row["loss"] for row in steps]), label=name)
        for axis, field in ((axes[1], "clean"), (axes[2], "robust")):
            line(axis, guards, field, name)
    for axis, title in zip(axes, TITLES, strict=True):
        axis.set(title=title, xlabel="minutes of one process")
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_libraries(libraries: Sequence[Library], path: Path) -> None:
    """Writes one figure of libraries side by side: each ticket's accuracy against what was spent on it.

    A ticket that was searched inside a dense network bears its share of that network's time. path: .svg or .png.
    """
    figure = import_matplotlib().figure.Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for library in libraries:
        hours = [seconds / 3600 for seconds in seconds_spent(library)]
        label = f"{library.path.name}: {len(hours)} tickets, {sum(hours):.1f} hours"
        for axis, metric in zip(axes, ("clean", "pgd"), strict=True):
            claims = [claim_on_test(entry, metric) for entry in library.entries]
            values = [100 * claim.value for claim in claims]
            ends = [[100 * (claim.value - claim.low) for claim in claims]]
            ends += [[100 * (claim.high - claim.value) for claim in claims]]
            axis.errorbar(hours, values, ends, fmt="o", markersize=4, elinewidth=0.5, label=label)
    attack = claim_on_test(libraries[0].entries[0], "pgd").attack
    assert attack is not None  # noqa: S101 (a Claim of metric pgd has one)
    robust = f"PGD-{attack.steps} accuracy, ε = {255 * attack.epsilon:g}/255, test images (%)"
    for axis, title in zip(axes, ("clean accuracy, test images (%)", robust), strict=True):
        axis.set(title=title, xlabel="hours of one process, a ticket")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", loc="lower right")
    save(figure, path)


def seconds_spent(library: Library) -> list[float]:
    """Of each ticket: its own search and an equal share of its dense network's among those searched inside it."""
    dense = {entry.sha256: entry.provenance.seconds for entry in library.baseline_entries}
    inside = Counter(entry.provenance.parent for entry in library.entries)
    return [
        entry.provenance.seconds
        + dense.get(entry.provenance.parent or "", 0.0) / max(1, inside[entry.provenance.parent])
        for entry in library.entries
    ]


def save(figure: "Figure", path: Path) -> None:
    """path: .svg or .png. An SVG of the same figures has the same bytes."""
    kind, known = path.suffix.removeprefix("."), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise TrainingError(f"{path}: no kind of picture; expected a name that ends in .svg or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, import_matplotlib().rc_context({"svg.hashsalt": "tombola"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


TITLES = (
    "loss on the step's adversarial images",
    "clean accuracy, held-out training images (%)",
    "PGD-10 accuracy, ε = 8/255, the same images (%)",
)


def line(axis: "Axes", guards: Sequence[dict[str, Any]], field: str, name: str) -> None:
    minutes = [row["seconds"] / 60 for row in guards]
    axis.plot(minutes, [100 * row[field] for row in guards], marker="o", markersize=3, label=name)


def smooth(values: Sequence[float]) -> Sequence[float]:
    """The mean of up to SMOOTHED values up to each."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTHED)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means
