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
    """Builds the classifier of one ticket.

    Args:
      ticket: the ticket.
      device: where its network runs.

    Returns:
      A function from float images [N, 3, H, W] in [0, 1] to logits [N, classes], divided by the ticket's temperature.
    """
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
    """Sums the members' calibrated logits under each draw (Eq. 1 of the paper). Differentiable.

    Args:
      members: M classifiers, as `calibrated` builds them.
      images: [N, 3, H, W], floats in [0, 1], not normalised.
      draws: [R, M], one draw of theta a row, as `draw_matrix` gives them.

    Returns:
      [R, N, classes]. It costs one forward pass of each member, whatever R is.
    """
    return combine(member_logits(members, images), draws)


def probabilities(summed_logits: Tensor, sizes: Tensor) -> Tensor:
    """Turns summed logits into the probabilities that are shown.

    They are the softmax of the members' mean: its argmax is the sum's, and confidence does not grow with n.

    Args:
      summed_logits: [R, ..., classes], as `ensemble_logits` gives them.
      sizes: [R], the number of members of each draw.

    Returns:
      [R, ..., classes], each row sums to 1.
    """
    column = sizes.to(summed_logits).view(-1, *[1] * (summed_logits.dim() - 1))
    return torch.softmax(summed_logits / column, dim=-1)


def predictions(logits: Tensor) -> Tensor:
    """The label of each [..., classes]: its argmax, the lowest index among equals."""
    return torch.argmax(logits, dim=-1)


@torch.no_grad()
def failure_probability(logits: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
    """Computes for each image how probable a wrong label is over the draws.

    Args:
      logits: [M, N, classes], each member's calibrated logits.
      labels: [N], the images' own classes.
      draws: [R, M], one draw of theta a row. Memory does not grow with R.

    Returns:
      float64 [N], the share of the draws under which the ensemble's label is wrong.

    Raises:
      ValueError: a logit is not finite; its argmax would mean nothing.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("failure_probability: a member's logits are not finite")
    failures = torch.zeros(labels.shape[0], dtype=torch.float64, device=logits.device)
    at_once = max(1, MAX_CHUNK // max(1, logits[0].numel()))
    for some in torch.split(draws, at_once):
        failures += (predictions(combine(logits, some)) != labels).sum(dim=0)
    return failures / draws.shape[0]
