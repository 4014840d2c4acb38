"""How different a library's tickets are: overlap of their masks, and one's adversarial images shown to another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from model_store.library import Library
from model_store.structures import fold
from model_store.ticket import Ticket
from training.data import Images, batch_of, batches
from training.evaluation import BATCH, PGD20, SEED, attack_images
from training.seeding import make_generator
from training.sparsity import overlap

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Differences:
    """names: of the M tickets.  overlaps[i][j]: masks' intersection over union, None between structures.

    accuracy[i][j]: of ticket j on PGD-20 images made on ticket i; accuracy[i][i] is its white-box accuracy.
    clean[j]: of ticket j on the same images before the attack.
    """

    names: tuple[str, ...]
    images: int
    overlaps: tuple[tuple[float | None, ...], ...]
    accuracy: tuple[tuple[float, ...], ...]
    clean: tuple[float, ...]


def differences(library: Library, images: Images, device: torch.device, progress: Callable[[int], None]) -> Differences:
    """progress: called with the number of tickets that have been attacked."""
    networks = [fold(t.network()).to(memory_format=torch.channels_last).to(device) for t in library.tickets]
    rows = []
    for index, source in enumerate(networks):
        rows.append(tuple(target_accuracies(networks, images, device, source)))
        progress(index + 1)
    return Differences(
        tuple(ticket.name for ticket in library.tickets),
        len(images),
        tuple(tuple(mask_overlap(first, second) for second in library.tickets) for first in library.tickets),
        tuple(rows),
        tuple(target_accuracies(networks, images, device, None)),
    )


def mask_overlap(first: Ticket, second: Ticket) -> float | None:
    if first.structure != second.structure:
        return None
    return overlap(first.masks, second.masks, first.masks)


def target_accuracies(
    targets: Sequence[Classifier], images: Images, device: torch.device, source: Classifier | None
) -> list[float]:
    """Each target's accuracy on the images, after PGD-20 against `source` if there is one."""
    counts = [0] * len(targets)
    for index, (pixels, labels) in enumerate(batches(images, batch_of(images, BATCH))):
        inputs, expected = pixels.to(device, memory_format=torch.channels_last), labels.to(device)
        if source is not None:
            inputs = attack_images(source, inputs, expected, PGD20, make_generator(SEED, index))
        with torch.no_grad():
            for j, target in enumerate(targets):
                counts[j] += int((target(inputs).argmax(1) == expected).sum())
    return [count / len(images) for count in counts]


def summary(result: Differences) -> str:
    """Four lines for the lab book."""
    count = range(len(result.names))
    pairs = [result.overlaps[i][j] for i in count for j in count if i < j]
    own = fmean(result.accuracy[i][i] for i in count)
    average = f"clean {100 * fmean(result.clean):.1f} %, white-box PGD-20 {100 * own:.1f} %"
    lines = [f"{len(result.names)} tickets, {result.images} images: {average}"]
    if same := [value for value in pairs if value is not None]:
        lines.append(f"mask IoU within a structure: mean {fmean(same):.3f}, {min(same):.3f} to {max(same):.3f}")
    for text, chosen in (("same structure", True), ("another structure", False)):
        cells = [
            result.accuracy[i][j]
            for i in count
            for j in count
            if i != j and (result.overlaps[i][j] is not None) == chosen
        ]
        if cells:
            lines.append(
                f"PGD-20 made on one, accuracy of another, {text}: mean {100 * fmean(cells):.1f} %, "
                f"{100 * min(cells):.1f} to {100 * max(cells):.1f}"
            )
    return "\n".join(lines)
