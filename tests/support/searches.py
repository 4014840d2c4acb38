"""A search that takes a second, and comparisons of what searches give."""

import torch
from torch import Tensor

from model_store.structures import Structure
from model_store.ticket import Ticket
from training.recipes import TrainConfig
from training.search import OverfitCheck, Step

CPU = torch.device("cpu")
TINY = TrainConfig(
    structure=Structure("resnet18", 4),
    density=0.3,
    seed=7,
    steps=24,
    batch=32,
    guards=0,
    precision="float32",
    mask_share=0.5,
)


def ignore(_event: Step | OverfitCheck) -> None:
    pass


def tensors_of(ticket: Ticket) -> dict[str, Tensor]:
    parts = {"mask": ticket.masks, "value": ticket.values, "statistic": ticket.statistics}
    return {f"{kind}/{name}": value for kind, group in parts.items() for name, value in group.items()}


def same(first: Ticket, second: Ticket) -> bool:
    one, other = tensors_of(first), tensors_of(second)
    return first.temperature == second.temperature and all(torch.equal(one[name], other[name]) for name in one)


def same_masks(first: Ticket, second: Ticket) -> bool:
    return all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
