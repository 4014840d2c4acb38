"""tombola bench rounding: what bfloat16 and 8 bits change in accuracy and save in time, by ticket and together.

The attack is PGD-20 on the float32 ticket. All precisions answer the same images, so that differences are paired.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.attacks import ThreatModel
from model_store.image_sample import LabelledImages
from model_store.library import Library
from service.audit.attacks.simple import SingleModelPgd, attack_member
from service.audit.evaluation.members import Member, as_floats, candidates_of
from service.audit.evaluation.pixel_grid import quantize_to_uint8
from service.audit.labelled_data import read_data
from service.audit.stats import paired_difference
from service.engine.base import Engine, Images
from service.engine.factory import CALIBRATION_IMAGES

THREAT: Final = ThreatModel("linf", 8 / 255)
BATCH: Final = 50
TIMED_ROWS: Final = 32
REPEATS: Final = 10
KINDS: Final = ("clean", "pgd")
Right = NDArray[np.float64]  # [N], 1 or 0
Answers = Callable[[int, Images], NDArray[np.float32]]


def measured_images(path: Path, library: Library, images: int) -> tuple[LabelledImages, Images]:
    """The first `images`, and the CALIBRATION_IMAGES after them, which are never measured."""
    data = read_data(path, library.classes, images + CALIBRATION_IMAGES, library.input)
    return data.first(len(data) - CALIBRATION_IMAGES), data.pixels[-CALIBRATION_IMAGES:].numpy()


def compare(library: Library, exact: Engine, rounded: Mapping[str, Engine], data: LabelledImages) -> dict[str, Any]:
    """Accuracy of each precision on the same clean and attacked images, and the time of an image in pairs.

    rounded: an engine for each precision.
    """
    clean, labels = data.pixels.numpy(), data.labels.numpy()
    engines = {"float32": exact.forward, **{name: engine.forward for name, engine in rounded.items()}}
    rows: list[dict[str, Any]] = []
    sums = {name: np.zeros((len(labels), len(library.classes)), np.float32) for name in engines}
    for member, ticket in enumerate(candidates_of(library).members[: len(library.tickets)]):
        images = {"clean": clean, "pgd": attacked(ticket, data, seed=member)}
        logits = {
            kind: {name: in_batches(forward, member, pixels) for name, forward in engines.items()}
            for kind, pixels in images.items()
        }
        for name, total in sums.items():
            total += logits["clean"][name]
        times = {name: image_ms(forward, member, clean) for name, forward in engines.items()}
        rows.append({"ticket": ticket.name, **{kind: accuracies(logits[kind], labels) for kind in images}, "ms": times})
    return {
        "images": len(labels),
        "data": data.name,
        "tickets": rows,
        "mean_of_logits": accuracies(sums, labels),
        "mean": {name: means(rows, name) for name in rounded},
    }


def attacked(member: Member, data: LabelledImages, seed: int) -> Images:
    """PGD-20 images of one ticket, as 8-bit files carry them."""
    generator = torch.Generator().manual_seed(seed)
    moved = attack_member(member, as_floats(data.pixels), data.labels, THREAT, SingleModelPgd(), generator)
    return quantize_to_uint8(moved, data.pixels, THREAT.norm, THREAT.epsilon).numpy()


def in_batches(forward: Answers, member: int, images: Images) -> NDArray[np.float32]:
    return np.concatenate([forward(member, images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


def right(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Right:
    result: Right = (logits.argmax(axis=1) == labels).astype(np.float64)
    return result


def accuracies(logits: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64]) -> dict[str, Any]:
    """In percent: float32's accuracy, and of each other precision its own and what it changes, with a 95 % interval."""
    exact = right(logits["float32"], labels)
    result: dict[str, Any] = {"float32": round(100 * exact.mean(), 3)}
    for name in logits.keys() - {"float32"}:
        other = right(logits[name], labels)
        points = {part: round(100 * value, 3) for part, value in paired_difference(other, exact)._asdict().items()}
        result[name] = {"accuracy": round(100 * other.mean(), 3), "difference": points}
    return result


def means(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Over all tickets: points that a precision changes, and how many times as fast as float32 it is."""
    changes = {kind: np.mean([row[kind][name]["difference"]["value"] for row in rows]) for kind in KINDS}
    speed = sum(row["ms"]["float32"] for row in rows) / sum(row["ms"][name] for row in rows)
    return {kind: round(float(value), 3) for kind, value in changes.items()} | {"speed": round(speed, 3)}


def image_ms(forward: Answers, member: int, images: Images) -> float:
    """Milliseconds of an image, one thread, the best of several."""
    some, seconds = images[:TIMED_ROWS], []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        forward(member, some)
        seconds.append(time.perf_counter() - begun)
    return round(1000 * min(seconds) / len(some), 4)


def table(figures: dict[str, Any]) -> str:
    """Markdown: for each precision all tickets together, then the ones that change most."""
    lines = [
        "<!-- tombola bench rounding -->",
        "| | float32, % | rounded, % | difference, points [95 %] |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in figures["mean"]:
        lines.append(row_of(f"{name}: mean of all tickets' logits, clean", figures["mean_of_logits"], name))
        for kind in KINDS:
            worst = max(figures["tickets"], key=lambda row: abs(row[kind][name]["difference"]["value"]))
            lines.append(row_of(f"{name}: {worst['ticket']}, {kind}, changes most", worst[kind], name))
    return "\n".join([*lines, "", *(sentence(name, figures) for name in figures["mean"]), conditions(figures)])


def sentence(name: str, figures: dict[str, Any]) -> str:
    mean = figures["mean"][name]
    return (
        f"{name}, on average over {len(figures['tickets'])} tickets: {mean['clean']:+.2f} points clean, "
        f"{mean['pgd']:+.2f} under PGD-20 made on the float32 ticket; {mean['speed']:.2f} times as fast."
    )


def conditions(figures: dict[str, Any]) -> str:
    return (
        f"n = {figures['images']} images of {figures['data']}, ranges of 8 bits from {CALIBRATION_IMAGES} others; "
        f"library {figures['library'][:12]}, {figures['machine']['cpu']}, "
        f"load {figures['machine']['load_before']} before."
    )


def row_of(title: str, accuracies: dict[str, Any], name: str) -> str:
    value, low, high = (accuracies[name]["difference"][part] for part in ("value", "low", "high"))
    return (
        f"| {title} | {accuracies['float32']:.1f} | {accuracies[name]['accuracy']:.1f} "
        f"| {value:+.2f} [{low:+.2f}, {high:+.2f}] |"
    )
