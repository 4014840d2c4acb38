"""The strongest rivals of a law that its own tickets can form, chosen on images that nothing is reported on.

A law should be held against the best that the same tickets can do without chance. Claims say which is best by so few
images that chance chooses among them. Here the tickets are attacked on held-out images, and a fixed set is built from
them one by one, by what the set keeps together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from model_store.attacks import ThreatModel
from model_store.files import write_atomically
from model_store.image_sample import LabelledImages
from model_store.policy import expected_size
from service.audit.attacks.simple import SingleModelPgd, attack_member
from service.audit.evaluation.members import CandidateSet, as_floats, logits_of
from service.audit.evaluation.pixel_grid import quantize_to_uint8

FINALISTS: Final = 12  # the most robust to FGSM, which are attacked in earnest
FIRST: Final = SingleModelPgd(steps=0)
SECOND: Final = SingleModelPgd(steps=10)
SWAPS: Final = 4  # the most that a set is bettered by, one ticket for another
STORED: Final = "rivals.json"


@dataclass(frozen=True)
class Rivals:
    """best: the ticket most robust alone.  fixed: as many as a draw has on average, most robust together.

    best_accuracy, fixed_accuracy: left of each by the attacks that chose it. None where claims chose.  images: that
    they were attacked on; 0 where claims chose.
    """

    best: int
    fixed: tuple[int, ...]
    best_accuracy: float | None = None
    fixed_accuracy: float | None = None
    images: int = 0


def choose_rivals(
    candidates: CandidateSet, crafting: CandidateSet, data: LabelledImages, threat: ThreatModel, seed: int
) -> Rivals:
    """Attacks tickets, then sets of them, and keeps what stands longest.

    1. FGSM on each ticket. The FINALISTS most robust go on.
    2. PGD with ten steps on each of those. `best` is the one that keeps most of its own.
    3. `fixed` grows from `best`: the ticket joins that leaves the sum right on most images, under all attacks so far.
       Then the new set is attacked itself, so that the next choice knows its weakness.
    4. Single tickets are exchanged while that keeps more.

    Args:
      candidates: whose tickets are chosen from.
      crafting: the same, as attacks are crafted: perhaps in bfloat16.
      data: held-out images.
      threat: of the audit's headline.
      seed: of the attacks.
    """
    return RivalChoice(candidates, crafting, data, threat, seed).choose()


def rival_size(candidates: CandidateSet) -> int:
    """How many tickets a draw has on average, rounded: what a fixed set of the same cost may have."""
    return min(candidates.tickets, max(1, round(expected_size(candidates.policy))))


class RivalChoice:
    """The attacks of one choice, and what each finalist says of their images."""

    def __init__(
        self, candidates: CandidateSet, crafting: CandidateSet, data: LabelledImages, threat: ThreatModel, seed: int
    ) -> None:
        self.candidates, self.crafting, self.data, self.threat = candidates, crafting, data, threat
        self.generator = torch.Generator().manual_seed(seed)
        self.images = as_floats(data.pixels, candidates.device)
        self.labels = data.labels.to(candidates.device)
        self.finalists: tuple[int, ...] = ()
        self.logits: list[Tensor] = []  # of each attack's images: float32 [finalists, N, classes]

    def choose(self) -> Rivals:
        count = rival_size(self.candidates)
        everyone = range(self.candidates.tickets)
        ranked = sorted(everyone, key=lambda index: -self.alone(index, FIRST))
        self.finalists = tuple(sorted(ranked[: max(FINALISTS, count)]))
        accuracies = {index: self.attack((index,)) for index in self.finalists}
        best = max(self.finalists, key=lambda index: accuracies[index])
        chosen: tuple[int, ...] = (best,)
        while len(chosen) < count:
            chosen = self.strongest([(*chosen, index) for index in self.finalists if index not in chosen])
            self.attack(chosen)
        chosen = self.exchange(chosen)
        return Rivals(best, tuple(sorted(chosen)), accuracies[best], self.left(chosen), len(self.data))

    def exchange(self, chosen: tuple[int, ...]) -> tuple[int, ...]:
        """The set that no exchange of one ticket betters, under all attacks, each new set's own among them."""
        for _ in range(SWAPS):
            others = [index for index in self.finalists if index not in chosen]
            exchanged = [
                (*chosen[:place], *chosen[place + 1 :], index) for place in range(len(chosen)) for index in others
            ]
            if not exchanged or self.left(better := self.strongest(exchanged)) <= self.left(chosen):
                break
            self.attack(better)
            if self.left(better) <= self.left(chosen):
                break
            chosen = better
        return chosen

    def strongest(self, sets: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return max(sets, key=self.left)

    def left(self, members: Sequence[int]) -> float:
        """The share of images that a set reads right under every attack so far, and clean."""
        places = [self.finalists.index(index) for index in members]
        right = torch.ones(len(self.data), dtype=torch.bool)
        for logits in self.logits:
            right &= logits[places].sum(dim=0).argmax(dim=1) == self.data.labels
        return float(right.double().mean())

    def attack(self, members: Sequence[int]) -> float:
        """Attacks a set, and keeps what all finalists say of the images. Returns what the attack left of the set."""
        pixels = self.reached(members, SECOND)
        self.logits.append(self.read(self.finalists, pixels))
        places = [self.finalists.index(index) for index in members]
        return float((self.logits[-1][places].sum(dim=0).argmax(dim=1) == self.data.labels).double().mean())

    def alone(self, index: int, attack: SingleModelPgd) -> float:
        logits = self.read((index,), self.reached((index,), attack))
        return float((logits[0].argmax(dim=1) == self.data.labels).double().mean())

    def reached(self, members: Sequence[int], attack: SingleModelPgd) -> Tensor:
        """uint8 [N, 3, H, W]: what an attack on the sum of some members makes of the images."""
        reached = attack_member(
            self.summed(members),
            self.images,
            self.labels,
            self.threat,
            attack,
            self.generator,
            threads=self.candidates.threads,
        )
        return quantize_to_uint8(reached, self.data.pixels, self.threat.norm, self.threat.epsilon)

    def summed(self, members: Sequence[int]) -> Callable[[Tensor], Tensor]:
        networks = [self.crafting.members[index] for index in members]
        return lambda images: torch.stack([network(images) for network in networks]).sum(dim=0)

    def read(self, members: Sequence[int], pixels: Tensor) -> Tensor:
        """float32 [M, N, classes]."""
        chosen = [self.candidates.members[index] for index in members]
        return logits_of(chosen, pixels, self.candidates.device, self.candidates.threads)


def stored_rivals(folder: Path, key: str) -> Rivals | None:
    """What an interrupted audit had chosen already, by the same images, library and attacks."""
    try:
        stored = STORED_READER.validate_json((folder / STORED).read_bytes())
    except (OSError, ValidationError):
        return None
    return stored.rivals if stored.key == key else None


def store_rivals(folder: Path, key: str, rivals: Rivals) -> None:
    write_atomically(folder / STORED, STORED_READER.dump_json(StoredRivals(key, rivals)))


@dataclass(frozen=True)
class StoredRivals:
    """key: of everything that the choice depends on."""

    key: str
    rivals: Rivals


STORED_READER: Final = TypeAdapter(StoredRivals)
