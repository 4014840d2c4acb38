"""tombola bench precision: how well one answer tells the ensemble that gave it, by how much an answer says.

The attacker of this measurement has the library, and so knows what every ensemble would answer to the image. It sees
one answer of the Open Inference Protocol: all classes' probabilities, rounded, and the label. It names the likeliest of
the ensembles that agree with that, and is right as often as these figures say.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.ensemble import calibrated, combine, member_logits, probabilities
from model_store.library import Library
from model_store.policy import Theta, draw_theta, matrix, states

DECIMALS: Final = (1, 2, 3, 4, 6)
DRAWS: Final = 20_000  # of theta, for each image; with far fewer than the law has states the figures are too high
OutputDetail = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def details() -> dict[str, OutputDetail]:
    """What an answer shows of probabilities [T, classes]: by name, a function to rows that are equal or not."""
    rounded = {f"{digits} decimals": lambda p, digits=digits: np.round(p, digits) for digits in DECIMALS}
    return {"label": lambda p: p.argmax(1)[:, None].astype(np.float64), **rounded, "full": lambda p: p}


def disclosure(library: Library, images: Tensor, seed: int = 0) -> dict[str, Any]:
    """How often theta and n are named right, for each detail, on average over images: floats [N, 3, H, W]."""
    rng = random.Random(seed)
    thetas = [draw_theta(library.policy, rng) for _ in range(DRAWS)]
    with torch.inference_mode():
        logits = member_logits([calibrated(ticket) for ticket in library.tickets], images)
        draws = matrix(thetas, len(library.tickets))
        sums = combine(logits, draws)  # [T, N, classes]
    sizes = [len(theta.members) for theta in thetas]
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"theta": [], "n": []})
    for image in range(len(images)):
        answers = probabilities(sums[:, image], torch.tensor(sizes)).double().numpy()
        for name, shown in details().items():
            seen = [row.tobytes() for row in shown(answers)]
            scores[name]["theta"].append(guess_accuracy(seen, thetas))
            scores[name]["n"].append(guess_accuracy(seen, sizes))
    return {
        "images": len(images),
        "draws": DRAWS,
        "states": states(library.policy),
        "by_prior": {"theta": guess_accuracy([b""] * DRAWS, thetas), "n": guess_accuracy([b""] * DRAWS, sizes)},
        "guess_accuracy": {
            name: {what: round(float(np.mean(rates)), 4) for what, rates in rows.items()}
            for name, rows in scores.items()
        },
    }


def guess_accuracy(seen: list[bytes], truths: list[Theta] | list[int]) -> float:
    """How often the likeliest truth of each answer is the true one."""
    groups: dict[bytes, Counter[Any]] = defaultdict(Counter)
    for answer, truth in zip(seen, truths, strict=True):
        groups[answer][truth] += 1
    return sum(max(group.values()) for group in groups.values()) / len(seen)


def table(figures: dict[str, Any]) -> str:
    """Markdown: one row for each detail."""
    prior = figures["by_prior"]
    lines = [
        "<!-- tombola bench precision -->",
        "| the answer shows | names θ | names n |",
        "| --- | ---: | ---: |",
        f"| nothing | {100 * prior['theta']:.1f} % | {100 * prior['n']:.1f} % |",
    ]
    for name, rates in figures["guess_accuracy"].items():
        lines.append(f"| {name} | {100 * rates['theta']:.1f} % | {100 * rates['n']:.1f} % |")
    about = f"One answer, all classes; library {figures['library'][:12]}, {figures['states']:,} states of θ; "
    about += f"n = {figures['images']} images of {figures['data']}, {figures['draws']:,} draws each."
    return "\n".join([*lines, "", about])
