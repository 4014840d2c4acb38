"""What audits are tried on: a small undefended network, and the same one with its gradients masked."""

import random
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from model_store.attacks import ThreatModel, pgd
from model_store.image_sample import LabelledImages
from model_store.library import Library, write_library
from model_store.policy import Policy
from service.audit.attack_runner import AuditRun
from service.audit.config import Audit
from service.audit.evaluation.draws import Defense, DrawSet
from service.audit.evaluation.members import AttackTarget, CandidateSet, Member
from tests.support.digits import digits
from tests.support.tickets import items, make_ticket

DIGITS = tuple(map(str, range(10)))


class Contrast(nn.Module):
    """Pixels around 0, spread over about one unit."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5) * 14


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        Contrast(),
        nn.Conv2d(3, 16, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def faint(pixels: Tensor) -> Tensor:
    """The digits at a seventh of their contrast, around grey: as easy to learn, and epsilon 8/255 is much to them, as
    it is to photographs."""
    return (110 + pixels.float() * 0.14).round().to(torch.uint8)


@cache
def undefended() -> nn.Sequential:
    """Trained on clean digits, about 95 % right on test images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_cnn()
    data, generator = digits().search, torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(150):
        index = torch.randint(len(data), (64,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(network(faint(data.pixels[index]) / 255), data.labels[index]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return network.eval()


@cache
def trained_on_the_others_images() -> tuple[nn.Sequential, nn.Sequential]:
    """A random pair that looks robust and is not (Dbouk and Shanbhag, 2022, on boosted adversarial training): the
    second network is trained on adversarial images of the undefended first, at 6/255."""
    first = undefended()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        second = small_cnn()
    data, generator, threat = digits().search, torch.Generator().manual_seed(1), ThreatModel("linf", 6 / 255)
    optimiser = torch.optim.Adam(second.parameters(), 3e-3)
    for _ in range(120):
        index = torch.randint(len(data), (48,), generator=generator)
        images, labels = faint(data.pixels[index]) / 255, data.labels[index]
        moved = pgd(first, images, labels, threat, steps=3, step_size=3 / 255, generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(second(moved), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for parameter in second.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return first, second.eval()


class Scaled(nn.Module):
    """Logits so large that cross-entropy's gradient is rounded to zero."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits * self.factor


class Quantised(nn.Module):
    """Pixels rounded to a few levels: nearly everywhere flat, so that gradients are zero."""

    def __init__(self, network: nn.Module, levels: int = 8) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images * self.levels).round() / self.levels)
        return logits


def alone(*networks: nn.Module) -> AttackTarget:
    """Each member alone, with equal probability."""
    count = len(networks)
    draws = DrawSet(torch.eye(count), torch.full((count,), 1 / count, dtype=torch.float64), exhaustive=True)
    return AttackTarget(tuple(Member(f"network {i}", network, 1.0) for i, network in enumerate(networks)), draws)


def faint_digits(count: int) -> LabelledImages:
    images = digits().test
    origin = "scikit-learn's digits, faint"
    return LabelledImages(
        "digits", origin, faint(images.pixels[:count]), images.labels[:count], images.names[:count], True
    )


def tiny(
    path: Path, structures: tuple[str, ...] = ("resnet18", "resnet34"), densities: tuple[float, ...] = (0.2, 0.5)
) -> Library:
    """Random tickets of the smallest width: they know nothing, and run fast."""
    tickets = [
        make_ticket(name, density, seed=10 * index + place)  # type: ignore[arg-type]
        for index, name in enumerate(structures)
        for place, density in enumerate(densities)
    ]
    return write_library(path, classes=DIGITS, data="random", tickets=items(tickets))


def run_on(network: nn.Module, folder: Path, audit: Audit, images: int) -> AuditRun:
    """An audit of one network in place of a library's only ticket."""
    library = tiny(folder / "library", ("resnet18",), (0.5,))
    candidates = CandidateSet(
        (Member("resnet18-50", network, 1.0),), 1, ("resnet18",), Policy.all(1), torch.device("cpu")
    )
    return AuditRun(folder / "audit", audit, library, faint_digits(images), candidates=candidates)


def system(policy: Policy) -> Defense:
    return Defense("tombola", "for a test", policy)


def seeded(seed: int = 0) -> random.Random:
    return random.Random(seed)
