"""What a network gets right, clean and under PGD, and the claims of a finished ticket."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from model_store import manifest
from model_store.attacks import ThreatModel, misclassified, pgd
from model_store.code_version import code_commit
from model_store.manifest import Attack, Claim, wilson
from model_store.structures import fold
from model_store.ticket import Ticket
from training.data import Images, Split, batch_of, batches
from training.files import write_text
from training.seeding import make_generator

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

    An interruption loses one batch.

    data: the data set's name in words.  memo: where the counts of finished batches are kept.
    """
    network = fold(ticket.network()).to(memory_format=torch.channels_last).to(device)
    counts: dict[str, list[int]] = json.loads(memo.read_text()) if memo.exists() else {}
    claims = []
    for measurement in MEASUREMENTS:
        part: Images = getattr(split, measurement.split)
        images = part.balanced(measurement.images)
        done = counts.setdefault(measurement.key, [])
        for index, (pixels, labels) in enumerate(batches(images, batch_of(images, BATCH))):
            if index >= len(done):
                done.append(count_correct(network, pixels.to(device), labels.to(device), measurement.attack, index))
                write_text(memo, json.dumps(counts))
        claims.append(make_claim(measurement, sum(done), images, data))
    return claims


def count_correct(
    network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, attack: Attack | None, index: int
) -> int:
    """How many of the batch are classified rightly, after the attack if there is one."""
    images = images.contiguous(memory_format=torch.channels_last)
    if attack is not None:
        images = attack_images(network, images, labels, attack, make_generator(SEED, index))
    with torch.no_grad():
        return len(labels) - int(misclassified(network(images), labels).sum())


def attack_images(
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


def make_claim(measurement: Measurement, count: int, images: Images, data: str) -> Claim:
    low, high = wilson(count, len(images))
    return Claim(
        metric="clean" if measurement.attack is None else "pgd",
        value=count / len(images),
        low=low,
        high=high,
        images=len(images),
        data=manifest.Images(name=data, digest=digest_of(images), split=measurement.split),  # type: ignore[arg-type]
        attack=measurement.attack,
        seed=SEED,
        commit=code_commit(),
        measured=datetime.now(UTC).date(),
    )


def digest_of(images: Images) -> str:
    """SHA-256 over pixels and labels of the images that were used, in order."""
    state = hashlib.sha256(images.pixels.numpy().tobytes())
    state.update(images.labels.numpy().tobytes())
    return state.hexdigest()


@torch.no_grad()
def accuracy(classifier: Callable[[Tensor], Tensor], images: Images, device: torch.device) -> float:
    right = sum(
        int((classifier(part.to(device)).argmax(1) == labels.to(device)).sum())
        for part, labels in batches(images, batch_of(images))
    )
    return right / len(images)


def robust_accuracy(
    classifier: Callable[[Tensor], Tensor],
    images: Images,
    epsilon: float,
    device: torch.device,
    *,
    steps: int = 10,
    step_size: float = 2 / 255,
    seed: int = 0,
) -> float:
    """Accuracy on PGD images (l-infinity, cross-entropy, one random start, best iterate)."""
    threat, right = ThreatModel("linf", epsilon), 0
    generator = make_generator(seed, 6)
    for part, labels in batches(images, batch_of(images)):
        part, labels = part.to(device, memory_format=torch.channels_last), labels.to(device)
        moved = pgd(classifier, part, labels, threat, steps=steps, step_size=step_size, generator=generator)
        with torch.no_grad():
            right += int((classifier(moved).argmax(1) == labels).sum())
    return right / len(images)


@torch.no_grad()
def with_temperature(ticket: Ticket, images: Images, device: torch.device) -> Ticket:
    """The ticket with the temperature that minimises cross-entropy on held-out images (convex in 1/T)."""
    network = ticket.network().to(device)
    logits = torch.cat([network(part.to(device)).cpu() for part, _ in batches(images, batch_of(images))])
    low, high = math.log(0.02), math.log(50.0)  # of 1/T
    for _ in range(60):
        third = (high - low) / 3
        losses = [
            float(functional.cross_entropy(logits * math.exp(at), images.labels)) for at in (low + third, high - third)
        ]
        low, high = (low, high - third) if losses[0] < losses[1] else (low + third, high)
    return replace(ticket, temperature=math.exp(-(low + high) / 2))
