"""Tickets and draws of theta -> logits, probabilities, and each image's exact chance of failure over the draws."""

from collections.abc import Callable, Sequence
from typing import Final, cast

import torch
from torch import Tensor

from model_store.structures import fold
from model_store.ticket import Ticket

Classifier = Callable[[Tensor], Tensor]
"""Float images [N, 3, H, W] in [0, 1] -> logits [N, classes]."""

MAX_CHUNK: Final = 2**23  # floats of ensemble logits held at once, 32 MiB


def calibrated(ticket: Ticket, device: torch.device | str = "cpu") -> Classifier:
    """The ticket's folded network on a device, its logits divided by its temperature."""
    network = fold(ticket.network()).to(device)
    return lambda images: cast("Tensor", network(images)) / ticket.temperature


def member_logits(members: Sequence[Classifier], images: Tensor) -> Tensor:
    """[M, N, classes]: one forward of each member. images: [N, 3, H, W] in [0, 1]."""
    return torch.stack([member(images) for member in members])


def combine(logits: Tensor, draws: Tensor) -> Tensor:
    """Eq. 1 for every draw: the sum of the drawn members' calibrated logits.

    logits: [M, N, classes].  draws: [R, M], one theta a row, as draw_matrix gives them.  Returns [R, N, classes].
    """
    return cast("Tensor", torch.tensordot(draws.to(logits), logits, dims=1))


def ensemble_logits(members: Sequence[Classifier], images: Tensor, draws: Tensor) -> Tensor:
    """[R, N, classes] under each of the R draws. Costs one forward of each member, whatever R is. Differentiable."""
    return combine(member_logits(members, images), draws)


def probabilities(summed_logits: Tensor, sizes: Tensor) -> Tensor:
    """Softmax of the members' mean, which has the sum's argmax and a confidence that does not grow with n.

    summed_logits: [R, ..., classes].  sizes: [R], the number of members behind each row.
    """
    column = sizes.to(summed_logits).view(-1, *[1] * (summed_logits.dim() - 1))
    return torch.softmax(summed_logits / column, dim=-1)


def predictions(logits: Tensor) -> Tensor:
    """The label of each [..., classes]: its argmax, the lowest index among equals."""
    return torch.argmax(logits, dim=-1)


@torch.no_grad()
def failure_probability(logits: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
    """float64 [N]: the share of the draws under which the ensemble's label is not the image's own.

    logits: [M, N, classes], calibrated.  labels: [N].  draws: [R, M]. Memory does not grow with R.
    Raises ValueError on a logit that is not finite: its argmax would mean nothing.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("failure_probability: a member's logits are not finite")
    failures = torch.zeros(labels.shape[0], dtype=torch.float64, device=logits.device)
    at_once = max(1, MAX_CHUNK // max(1, logits[0].numel()))
    for some in torch.split(draws, at_once):
        failures += (predictions(combine(logits, some)) != labels).sum(dim=0)
    return failures / draws.shape[0]
