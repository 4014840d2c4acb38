"""Claims: a finished ticket's accuracy, clean and under PGD; an interruption loses one batch of the measuring."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from model_store import manifest
from model_store.attacks import ThreatModel, misclassified, pgd
from model_store.manifest import Attack, Claim, wilson
from model_store.structures import fold
from model_store.ticket import Ticket
from training.data import Images, Split, batches
from training.files import commit, write_atomically
from training.search import generator_of

SEED: Final = 20
BATCH: Final = 125
PGD20: Final = Attack(
    norm="linf", epsilon=8 / 255, steps=20, step_size=2 / 255, restarts=1, momentum=0.0, loss="cross-entropy"
)
CLEAN_IMAGES: Final = 2_000
PGD_IMAGES: Final = 1_000
SELECTION_IMAGES: Final = 250


@dataclass(frozen=True)
class Measurement:
    """Which images, how many, and under which attack (none: clean)."""

    split: str
    images: int
    attack: Attack | None

    @property
    def key(self) -> str:
        return f"{self.split}/{'clean' if self.attack is None else 'pgd'}/{self.images}"


MEASUREMENTS: Final = (
    Measurement("test", CLEAN_IMAGES, None),
    Measurement("test", PGD_IMAGES, PGD20),
    Measurement("selection", SELECTION_IMAGES, None),
    Measurement("selection", SELECTION_IMAGES, PGD20),
)


def measure(ticket: Ticket, split: Split, data: str, device: torch.device, memo: Path) -> list[Claim]:
    """The claims of a ticket: clean and PGD-20 on test images, and both on selection images (to choose by).

    data: the data set's name in words.  memo: where the counts of finished batches are kept.
    """
    network = fold(ticket.network()).to(memory_format=torch.channels_last).to(device)
    counts: dict[str, list[int]] = json.loads(memo.read_text()) if memo.exists() else {}
    claims = []
    for asked in MEASUREMENTS:
        part: Images = getattr(split, asked.split)
        images = part.balanced(asked.images)
        done = counts.setdefault(asked.key, [])
        for index, (pixels, labels) in enumerate(batches(images, BATCH)):
            if index >= len(done):
                done.append(right(network, pixels.to(device), labels.to(device), asked.attack, index))
                write_atomically(memo, json.dumps(counts))
        claims.append(claim(asked, sum(done), images, data))
    return claims


def right(
    network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, attack: Attack | None, index: int
) -> int:
    """How many of the batch are classified rightly, after the attack if there is one."""
    images = images.contiguous(memory_format=torch.channels_last)
    if attack is not None:
        images = attacked(network, images, labels, attack, generator_of(SEED, index))
    with torch.no_grad():
        return len(labels) - int(misclassified(network(images), labels).sum())


def attacked(
    network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, attack: Attack, generator: torch.Generator
) -> Tensor:
    return pgd(
        network,
        images,
        labels,
        ThreatModel(attack.norm, attack.epsilon),
        steps=attack.steps,
        step_size=attack.step_size,
        restarts=attack.restarts,
        momentum=attack.momentum,
        generator=generator,
    )


def claim(asked: Measurement, count: int, images: Images, data: str) -> Claim:
    low, high = wilson(count, len(images))
    return Claim(
        metric="clean" if asked.attack is None else "pgd",
        value=count / len(images),
        low=low,
        high=high,
        images=len(images),
        data=manifest.Images(name=data, digest=digest_of(images), split=asked.split),  # type: ignore[arg-type]
        attack=asked.attack,
        seed=SEED,
        commit=commit(),
        measured=datetime.now(UTC).date(),
    )


def digest_of(images: Images) -> str:
    """SHA-256 over pixels and labels of the images that were used, in order."""
    state = hashlib.sha256(images.pixels.numpy().tobytes())
    state.update(images.labels.numpy().tobytes())
    return state.hexdigest()
