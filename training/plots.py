"""Figures of searches, from their logs: loss, and held-out clean and robust accuracy, against time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model_store.files import replacing
from model_store.quiet_imports import import_matplotlib
from training.errors import TrainingError
from training.jobs import Job, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    kind, known = path.suffix.removeprefix("."), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise TrainingError(f"{path}: no kind of picture; expected a name that ends in .svg or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=kind)


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
