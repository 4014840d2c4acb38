"""tombola bench int8: what 8 bits cost in accuracy and buy in time, ticket by ticket and together.

The attack is PGD-20 on the float32 ticket; both precisions answer the same images, so that differences are paired.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.attacks import ThreatModel
from model_store.library import Library
from service.audit.attacks.simple import SingleModelPgd, attack_member
from service.audit.evaluation.members import Member, as_floats, candidates_of
from service.audit.evaluation.pixel_grid import quantize_to_uint8
from service.audit.labelled_data import LabelledImages, read_data
from service.audit.stats import paired_difference
from service.engine.base import Engine, Images
from service.engine.factory import CALIBRATION_IMAGES

THREAT: Final = ThreatModel("linf", 8 / 255)
BATCH: Final = 50
TIMED_ROWS: Final = 32
REPEATS: Final = 10
Right = NDArray[np.float64]  # [N], 1 or 0
Answers = Callable[[int, Images], NDArray[np.float32]]


def measured_images(path: Path, library: Library, images: int) -> tuple[LabelledImages, Images]:
    """The first `images`, and the CALIBRATION_IMAGES after them, which are never measured."""
    data = read_data(path, library.classes, images + CALIBRATION_IMAGES, library.input)
    return data.first(len(data) - CALIBRATION_IMAGES), data.pixels[-CALIBRATION_IMAGES:].numpy()


def compare(library: Library, exact: Engine, rounded: Engine, data: LabelledImages) -> dict[str, Any]:
    """Accuracy of both engines on the same clean and attacked images, and the time of an image in pairs."""
    clean, labels = data.pixels.numpy(), data.labels.numpy()
    both = (exact.forward, rounded.forward)
    rows: list[dict[str, Any]] = []
    sums: list[NDArray[np.float32]] = [np.zeros((len(labels), len(library.classes)), np.float32) for _ in both]
    tickets = candidates_of(library).members[: len(library.tickets)]
    for member, ticket in enumerate(tickets):
        moved = attacked(ticket, data, seed=member)
        for total, forward in zip(sums, both, strict=True):
            total += in_batches(forward, member, clean)
        kinds = {
            kind: difference(*(right(in_batches(forward, member, images), labels) for forward in both))
            for kind, images in (("clean", clean), ("pgd", moved))
        }
        rows.append({"ticket": ticket.name, **kinds, "ms": [image_ms(forward, member, clean) for forward in both]})
    return {
        "images": len(labels),
        "data": data.name,
        "tickets": rows,
        "mean": {
            "clean": difference(*(right(total, labels) for total in sums)),
            **{f"{kind}_of_tickets": mean_difference(rows, kind) for kind in ("clean", "pgd")},
            "speed": round(sum(row["ms"][0] for row in rows) / sum(row["ms"][1] for row in rows), 3),
        },
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


def difference(exact: Right, rounded: Right) -> dict[str, Any]:
    """In percent: the accuracy of each, and the second less the first with its 95 % interval."""
    result = paired_difference(rounded, exact)
    points = {name: round(100 * value, 3) for name, value in result._asdict().items()}
    return {"float32": round(100 * exact.mean(), 3), "int8": round(100 * rounded.mean(), 3), "difference": points}


def mean_difference(rows: Sequence[dict[str, Any]], kind: str) -> float:
    return round(float(np.mean([row[kind]["difference"]["value"] for row in rows])), 3)


def image_ms(forward: Answers, member: int, images: Images) -> float:
    """Milliseconds of an image, one thread, the best of several."""
    some, seconds = images[:TIMED_ROWS], []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        forward(member, some)
        seconds.append(time.perf_counter() - begun)
    return round(1000 * min(seconds) / len(some), 4)


def table(figures: dict[str, Any]) -> str:
    """Markdown: all tickets together, then the ones that change most."""
    mean, rows = figures["mean"], figures["tickets"]
    whole = mean["clean"]
    worst = {kind: max(rows, key=lambda row: abs(row[kind]["difference"]["value"])) for kind in ("clean", "pgd")}
    about = (
        f"In the mean over {len(rows)} tickets: {mean['clean_of_tickets']:+.2f} points clean, "
        f"{mean['pgd_of_tickets']:+.2f} under PGD-20 (made on the float32 ticket); {mean['speed']:.2f} times as fast. "
        f"n = {figures['images']} images of {figures['data']}, calibrated on {CALIBRATION_IMAGES} others; library "
        f"{figures['library'][:12]}, {figures['machine']['cpu']}, load {figures['machine']['load_before']} before."
    )
    lines = [
        "<!-- tombola bench int8 -->",
        "| | float32, % | int8, % | difference, points [95 %] |",
        "| --- | ---: | ---: | ---: |",
        row_of("mean of all tickets, clean", whole),
        *(row_of(f"{row['ticket']}, {kind}: the largest change", row[kind]) for kind, row in worst.items()),
        "",
        about,
    ]
    return "\n".join(lines)


def row_of(name: str, difference: dict[str, Any]) -> str:
    value, low, high = (difference["difference"][part] for part in ("value", "low", "high"))
    return (
        f"| {name} | {difference['float32']:.1f} | {difference['int8']:.1f} | {value:+.2f} [{low:+.2f}, {high:+.2f}] |"
    )
