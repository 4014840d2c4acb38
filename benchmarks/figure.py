"""The comparison as one figure: throughput and tail latency by clients, for every server; the raw engine as a line."""

from pathlib import Path
from typing import Any

from model_store.files import replacing
from model_store.quiet_imports import import_matplotlib

matplotlib = import_matplotlib()


def draw(whole: dict[str, Any], path: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "tombola"
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    for name, row in whole["servers"].items():
        for form, measured in row["forms"].items():
            clients = [entry["clients"] for entry in measured["closed"]]
            label = f"{name} ({form})"
            throughput.plot(clients, [entry["images_per_s"] for entry in measured["closed"]], marker="o", label=label)
            latency.plot(clients, [entry["p99_ms"] for entry in measured["closed"]], marker="o", label=label)
    throughput.axhline(whole["raw"]["engine_images_per_s"], linestyle="--", color="grey", label="raw engine")
    for axes, title, unit in ((throughput, "Throughput", "images/s"), (latency, "99th percentile", "ms")):
        axes.set(title=title, xlabel="clients (closed loop)", ylabel=unit, xscale="log")
        axes.grid(alpha=0.3)
    latency.set_yscale("log")
    throughput.legend(fontsize=7)
    figure.suptitle(f"{whole['machine']['cpu']}, {whole['machine']['cores']} cores", fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
