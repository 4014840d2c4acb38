"""The report's figures, from its JSON, as SVG text; and example images as data URIs."""

import base64
import io
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_store.quiet_imports import import_matplotlib
from service.audit.attack_runner import AuditRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

matplotlib = import_matplotlib()

STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "tombola",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "path",
}
EXAMPLES: Final = 8
ZOOM: Final = 3
AMPLIFIED: Final = 8  # the perturbation is shown so many times larger, around grey
Json = dict[str, Any]


def drawn(width: float, height: float) -> "tuple[Figure, Axes]":
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: "Figure") -> str:
    """Without a date, so that equal figures are equal bytes."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def all_figures(report: Json) -> dict[str, str]:
    """Title -> SVG, of those that the report has data for."""
    with matplotlib.rc_context(STYLE):
        found = {
            "Accuracy against epsilon": curves(report),
            "Transfer between tickets": heat_map(report),
            "Risk by step": traces(report, "accuracy", "accuracy, best so far"),
            "Loss by step": traces(report, "loss", "loss, best so far"),
            "Accuracy against queries": queries(report),
        }
        return {title: svg(figure) for title, figure in found.items() if figure is not None}


def curves(report: Json) -> "Figure":
    figure, axes = drawn(7, 3.6)
    for name, system in report["systems"].items():
        points = system["curve"]
        epsilons, values = [p["epsilon"] for p in points], [100 * p["value"] for p in points]
        line = axes.plot(
            epsilons, values, marker="o", markersize=3, linewidth=2.2 if name == "tombola" else 1, label=name
        )
        if name == "tombola":
            low, high = ([100 * p[end] for p in points] for end in ("low", "high"))
            axes.fill_between(epsilons, low, high, alpha=0.15, color=line[0].get_color())
    axes.set(xlabel=f"epsilon, 255ths ({report['audit']['norm']})", ylabel="expected accuracy, %", ylim=(0, 100))
    axes.legend(fontsize=7, ncols=2)
    return figure


def heat_map(report: Json) -> "Figure | None":
    if report["transfer"] is None:
        return None
    names, values = report["transfer"]["names"], np.array(report["transfer"]["accuracy"]) * 100
    side = min(11.0, 2 + 0.22 * len(names))
    figure, axes = drawn(side + 1, side)
    axes.grid(visible=False)
    picture = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set(xlabel="answers", ylabel="attacked")
    figure.colorbar(picture, ax=axes, label="accuracy, %", shrink=0.8)
    return figure


def traces(report: Json, field: str, label: str) -> "Figure | None":
    headline = report["audit"]["headline"]
    found = [a for a in report["attacks"] if a["trace"] and a["system"] == "tombola" and a["epsilon"] == headline]
    if not found:
        return None
    figure, axes = drawn(7, 3.2)
    for attack in found:
        values = np.array(attack["trace"][field]) * (100 if field == "accuracy" else 1)
        axes.plot(values, label=f"{attack['name']} ({attack['settings']['steps']} steps)")
    axes.set(xlabel="step", ylabel=label + (", %" if field == "accuracy" else ""))
    axes.legend(fontsize=7)
    return figure


def queries(report: Json) -> "Figure | None":
    found = [a for a in report["attacks"] if "curve" in a]
    if not found:
        return None
    figure, axes = drawn(7, 3.4)
    for attack in found:
        spent, accuracy = zip(*attack["curve"], strict=True)
        label = f"{attack['name']} on {attack['system']} ({attack['oracle']}), q = {attack['averages']}"
        axes.plot(spent, [100 * value for value in accuracy], marker="o", markersize=3, label=label)
    axes.set(xlabel="queries an image", ylabel="expected accuracy, %", xscale="log", ylim=(0, 100))
    axes.legend(fontsize=7)
    return figure


def examples(run: AuditRun) -> list[Json]:
    """The first images with their riskiest forms at the headline epsilon: pictures and what became of p."""
    system, labels = run.systems[0], run.data.labels
    count = min(EXAMPLES, len(run.data))
    best, right = run.data.pixels[:count].clone(), run.clean(system).right[:count].clone()
    for outcome in run.outcomes:
        if outcome.step.epsilon <= run.audit.headline:
            n = min(count, outcome.step.images)
            lower = run.scores(system, outcome).right[:n] < right[:n]
            best[:n][lower] = outcome.pixels[:n][lower]
            right[:n] = torch.minimum(right[:n], run.scores(system, outcome).right[:n])
    return [
        {
            "label": run.library.classes[int(labels[i])],
            "clean": round(float(run.clean(system).right[i]), 4),
            "attacked": round(float(right[i]), 4),
            "pictures": [picture(image) for image in (run.data.pixels[i], best[i], shift(run.data.pixels[i], best[i]))],
        }
        for i in range(count)
    ]


def shift(clean: Tensor, attacked: Tensor) -> Tensor:
    return (128 + AMPLIFIED * (attacked.int() - clean.int())).clamp(0, 255).to(torch.uint8)


def picture(pixels: Tensor) -> str:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    stream = io.BytesIO()
    image.resize((32 * ZOOM, 32 * ZOOM), Image.Resampling.NEAREST).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
