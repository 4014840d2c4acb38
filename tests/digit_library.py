"""A small library that has learnt something: adversarially trained tickets on the digits, made in seconds."""

from pathlib import Path

import torch

from model_store.library import Library, write_library
from model_store.structures import Structure
from model_store.ticket import Ticket
from tests.digits import digits
from tests.tickets import make_claim, make_provenance
from training.recipes import Recipe
from training.search import run

CLASSES = tuple(map(str, range(10)))
TICKETS = (("resnet18", 0.3), ("resnet18", 0.5), ("resnet34", 0.4), ("resnet34", 0.6))


def recipe(structure: Structure, density: float, seed: int) -> Recipe:
    dense = density == 1.0
    return Recipe(
        structure=structure,
        density=density,
        seed=seed,
        steps=120,
        batch=64,
        guards=0,
        precision="float32",
        mask_share=0.0 if dense else 0.4,
        low_resolution_until=0.0,
    )


def trained(folder: Path, name: str, density: float, seed: int) -> Ticket:
    folder.mkdir(parents=True)
    structure = Structure(name, 4, stem_stride=2)  # type: ignore[arg-type]
    return run(recipe(structure, density, seed), digits(), folder, lambda _: None, torch.device("cpu"))


def digit_library(folder: Path) -> Library:
    """Two tickets of each ResNet, and one dense baseline."""
    tickets = [trained(folder / f"search{seed}", *chosen, seed) for seed, chosen in enumerate(TICKETS)]
    baseline = trained(folder / "dense", "resnet18", 1.0, 9)
    items = [
        (ticket, make_provenance(seed), [make_claim(attack=None), make_claim()]) for seed, ticket in enumerate(tickets)
    ]
    others = [(baseline, make_provenance(9), [make_claim(attack=None), make_claim()])]
    return write_library(folder / "library", classes=CLASSES, data="digits", tickets=items, baselines=others)
