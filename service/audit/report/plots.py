"""The report's figures, from its JSON, as SVG text; and example images as data URIs."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from PIL import Image
from scipy.optimize import isotonic_regression
from torch import Tensor

from model_store.quiet_imports import import_matplotlib
from service.audit.attack_runner import AuditRun
from service.audit.report.model import OURS, Attack, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from service.audit.explore import LawFigures

matplotlib = import_matplotlib()

INK: Final = "#1b2126"  # of text and axes; a page replaces it by the colour of its own text
STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "tombola",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "savefig.transparent": True,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
COLOURS: Final = ("#2878c8", "#c8641e", "#2e9e5b", "#9a5bc4", "#b8860b", "#cc4477", "#3a9fa8", "#7d6b5d")
MINOR: Final = "#8a949e"  # of systems that are there for comparison alone
EXAMPLES: Final = 8
ZOOM: Final = 3
AMPLIFICATION: Final = 8  # the perturbation is shown so many times larger, around grey
LABELLED_MEMBERS: Final = 14  # a matrix of at most so many has each one's name at its edge
LINE_HEIGHT: Final = 0.055  # of an end label, as a share of the axes' height


@dataclass(frozen=True)
class Example:
    """One image: clean, under the worst attack, and the change. Shares are the chance over theta of the right label."""

    label: str
    clean: float
    attacked: float
    pictures: tuple[str, str, str]


def all_figures(report: Report, *, themed: bool = True) -> dict[str, str]:
    """SVG by title, of those that the report has data for. themed: text in the colour of the page around it."""
    with matplotlib.rc_context(STYLE):
        drawn = {
            "Accuracy against epsilon": draw_curves(report),
            "Transfer between tickets": draw_matrix(report),
            "Risk by step": draw_traces(report, "accuracy", "accuracy, best so far", 100),
            "Loss by step": draw_traces(report, "loss", "loss, best so far", 1),
            "Accuracy against queries": draw_queries(report),
        }
        return {title: svg(figure, themed=themed) for title, figure in drawn.items() if figure is not None}


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: "Figure", *, themed: bool) -> str:
    """Without a date, so that equal figures are equal bytes."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=themed)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(INK, "currentColor") if themed else text


def label_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name at its right end, moved apart where they would overlap. ends: y, name, colour."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    ordered = sorted(ends)
    places = spread_apart([y for y, _, _ in ordered], (top - bottom) * LINE_HEIGHT, bottom)
    for place, (_, name, colour) in zip(places, ordered, strict=True):
        offset: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points"}
        axes.annotate(name, (right, place), color=colour, va="center", fontsize=8, annotation_clip=False, **offset)
    axes.spines["bottom"].set_bounds(left, right)


def spread_apart(heights: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Ascending heights, at least a gap apart, as near as can be to where they were, and none below `lowest`."""
    if not heights:
        return []
    steps = gap * np.arange(len(heights))
    nearest = isotonic_regression(np.array(heights) - steps).x + steps
    return [max(float(place), lowest + float(step)) for place, step in zip(nearest, steps, strict=True)]


def colour_of(report: Report) -> Callable[[str], str]:
    """A colour for each system; those that draw one ticket of one structure share a grey."""
    named = [name for name in report.systems if not name.startswith("r2s ")]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(named)}
    return lambda name: colours.get(name, MINOR)


def draw_curves(report: Report) -> "Figure":
    figure, axes = new_figure(7.6, 4)
    colour, ends, highest = colour_of(report), [], 0.0
    for name, system in report.systems.items():
        points = system.curve
        epsilons, values = [point.epsilon for point in points], [100 * point.value for point in points]
        width = 2.4 if name == OURS else 1.1
        axes.plot(epsilons, values, marker="o", markersize=3, linewidth=width, color=colour(name))
        ends.append((values[-1], name, colour(name)))
        highest = max(highest, *values)
        if name == OURS:
            low, high = [100 * point.low for point in points], [100 * point.high for point in points]
            axes.fill_between(epsilons, low, high, alpha=0.15, color=colour(name), linewidth=0)
            highest = max(highest, *high)
    axes.set(xlabel=f"epsilon, 255ths ({report.audit.norm})", ylabel="expected accuracy, %")
    axes.set_ylim(0, min(100, 1.05 * highest + 1))
    axes.margins(x=0.01)
    label_ends(axes, ends)
    return figure


def draw_matrix(report: Report) -> "Figure | None":
    if report.transfer is None:
        return None
    names, values = report.transfer.names, np.array(report.transfer.accuracy) * 100
    side = min(7.0, 3 + 0.18 * len(names))
    figure, axes = new_figure(side + 1, side)
    axes.grid(visible=False)
    picture = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    ticks, labels = name_ticks(names)
    axes.set_xticks(ticks, labels, rotation=45, ha="right")
    axes.set_yticks(ticks, labels)
    axes.set(xlabel="answers", ylabel="attacked")
    bar = figure.colorbar(picture, ax=axes, label="accuracy, %", shrink=0.8)
    bar.outline.set_edgecolor(INK)
    return figure


def name_ticks(names: Sequence[str]) -> tuple[list[float], list[str]]:
    """Each member's name where there is room, else each structure's in the middle of its members."""
    if len(names) <= LABELLED_MEMBERS:
        return list(map(float, range(len(names)))), list(names)
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name.rpartition("-")[0] if not name.endswith("-100") else f"{name} (dense)", []).append(index)
    return [sum(group) / len(group) for group in groups.values()], list(groups)


def draw_traces(report: Report, field: str, label: str, scale: float) -> "Figure | None":
    headline = report.audit.headline
    traced = [a for a in report.attacks if a.trace and a.system == OURS and a.epsilon == headline]
    if not traced:
        return None
    figure, axes = new_figure(7.6, 3.4)
    ends = []
    for index, attack in enumerate(traced):
        values = [scale * value for value in attack.trace[field]]
        axes.plot(values, color=COLOURS[index % len(COLOURS)])
        name = f"{attack.name} ({attack.settings['steps']} steps)"
        ends.append((values[-1], name, COLOURS[index % len(COLOURS)]))
    axes.set(xlabel="step", ylabel=label + (", %" if scale == 100 else ""))
    axes.margins(x=0.01)
    label_ends(axes, ends)
    return figure


def draw_queries(report: Report) -> "Figure | None":
    queried = [attack for attack in report.attacks if attack.curve]
    if not queried:
        return None
    figure, axes = new_figure(7.6, 4)
    ends, highest = [], 0.0
    for index, attack in enumerate(queried):
        spent, values = curve_of(attack)
        style, colour = ("-" if attack.system == OURS else "--"), COLOURS[index % len(COLOURS)]
        axes.plot(spent, values, style, marker="o", markersize=3, color=colour)
        short = attack.name.removesuffix("-queries")
        ends.append((values[-1], f"{short}, {attack.system}, q = {attack.averages}", colour))
        highest = max(highest, *values)
    axes.set(xlabel="queries an image", ylabel="expected accuracy, %", xscale="log")
    axes.set_ylim(0, min(100, 1.05 * highest + 1))
    label_ends(axes, ends)
    return figure


def curve_of(attack: Attack) -> tuple[list[int], list[float]]:
    points = attack.curve or []
    return [queries for queries, _ in points], [100 * accuracy for _, accuracy in points]


def choose_examples(run: AuditRun) -> list[Example]:
    """The first images with their riskiest forms at the headline epsilon."""
    system, labels = run.systems[0], run.data.labels
    count = min(EXAMPLES, len(run.data))
    best, right = run.data.pixels[:count].clone(), run.clean(system).right[:count].clone()
    for outcome in run.outcomes:
        if outcome.step.epsilon <= run.epsilons.headline:
            n = min(count, outcome.step.images)
            lower = run.scores(system, outcome).right[:n] < right[:n]
            best[:n][lower] = outcome.pixels[:n][lower]
            right[:n] = torch.minimum(right[:n], run.scores(system, outcome).right[:n])
    return [
        Example(
            label=run.library.classes[int(labels[i])],
            clean=round(float(run.clean(system).right[i]), 4),
            attacked=round(float(right[i]), 4),
            pictures=(
                data_uri(run.data.pixels[i]),
                data_uri(best[i]),
                data_uri(amplify_change(run.data.pixels[i], best[i])),
            ),
        )
        for i in range(count)
    ]


def amplify_change(clean: Tensor, attacked: Tensor) -> Tensor:
    return (128 + AMPLIFICATION * (attacked.int() - clean.int())).clamp(0, 255).to(torch.uint8)


def data_uri(pixels: Tensor) -> str:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    stream = io.BytesIO()
    size = (image.width * ZOOM, image.height * ZOOM)
    image.resize(size, Image.Resampling.NEAREST).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def plot_frontier(laws: Sequence["LawFigures"], bound: float) -> str:
    """SVG: robust accuracy against cost. Laws that no cheaper one beats are joined; a line is what none exceeds."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(6.4, 3.6)
        others = [law for law in laws if not law.frontier]
        axes.scatter([law.cost for law in others], [100 * law.robust.value for law in others], s=9, color=MINOR)
        best = sorted((law for law in laws if law.frontier), key=lambda law: law.cost)
        axes.plot([law.cost for law in best], [100 * law.robust.value for law in best], "o-", ms=4, color=COLOURS[0])
        served = laws[0]
        axes.scatter([served.cost], [100 * served.robust.value], s=40, color=COLOURS[1], zorder=3)
        axes.annotate("served", (served.cost, 100 * served.robust.value), textcoords="offset points", xytext=(6, 6))
        axes.axhline(100 * bound, color=INK, linestyle=":", linewidth=1)
        axes.annotate("no law of these tickets", (0.02, 100 * bound), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_xscale("log")
        axes.set_xlabel("multiply-adds of an image, as a share of the served law's")
        axes.set_ylabel("robust accuracy, %")
        return svg(figure, themed=False)
