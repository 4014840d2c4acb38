"""Tickets in 8 bits as an attacker sees them: rounded as the engine rounds, with straight-through gradients.

Rounding is flat nearly everywhere, so that its own gradient is zero. The attacker's passes through it unchanged, and
stops where a value is cut off (Bengio et al., 2013). What is scored are the engine's own answers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from model_store.library import Library
from model_store.ticket import Ticket
from service.audit.errors import AuditRejected
from service.audit.evaluation.members import CandidateSet, Member, candidates_of, member_of
from service.audit.evaluation.threads import WorkerThreads
from service.audit.labelled_data import read_data
from service.engine.errors import EngineRejected
from service.engine.factory import CALIBRATION_IMAGES, open_engine
from service.engine.levels import LEVELS, SMALLEST, WEIGHT_LEVELS, with_zero
from service.settings import Settings


class RoundedConvolution(nn.Module):
    """A convolution whose input and weights have 256 levels."""

    def __init__(self, convolution: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        self.convolution, (self.low, self.high) = convolution, with_zero(low, high)
        largest = convolution.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(SMALLEST)
        convolution.weight = nn.Parameter(to_levels(convolution.weight, -largest, largest, WEIGHT_LEVELS), False)

    def forward(self, values: Tensor) -> Tensor:
        inside = values.clamp(self.low, self.high)
        rounded = to_levels(inside.detach(), self.low, self.high, LEVELS)
        return cast("Tensor", self.convolution(inside + (rounded - inside.detach())))


def to_levels(values: Tensor, low: Any, high: Any, count: int) -> Tensor:
    """The nearest of so many levels from low to high; of two as near, the even one."""
    steps = (values - low) * ((count - 1) / (high - low))
    return cast("Tensor", steps.round() * ((high - low) / (count - 1)) + low)


@torch.no_grad()
def round_network(network: nn.Module, images: Tensor) -> nn.Module:
    """Changes a folded network, and returns it. images: floats in [0, 1], whose extremes are the ranges."""
    extremes: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            low, high = extremes.get(name, (0.0, 0.0))
            extremes[name] = min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))

        return see

    convolutions = {name: each for name, each in network.named_modules() if isinstance(each, nn.Conv2d)}
    hooks = [each.register_forward_pre_hook(watch(name)) for name, each in convolutions.items()]
    for part in torch.split(images, 32):
        network(part)
    for hook in hooks:
        hook.remove()
    for name, each in convolutions.items():
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, RoundedConvolution(each, *extremes[name]).eval())
    return network


def rounded_candidates(
    library: Library, int8_images: Path, folder: Path, outside: Library | None = None, threads: int = 1
) -> CandidateSet:
    """The library's tickets as a service in 8 bits runs them; its dense networks, and those of others, as they are.

    Args:
      int8_images: what the service is calibrated on.
      folder: for the engine's compiled models.
      outside: a surrogate library of the attacker's own.
      threads: cores to use.

    Raises:
      AuditRejected: the engine refuses to run in 8 bits here.
    """
    calibration = read_data(int8_images, library.classes, CALIBRATION_IMAGES, library.input)
    settings = Settings(state_dir=folder, threads=threads, device="cpu", int8_images=int8_images)
    try:
        engine = open_engine(library, settings, calibration.pixels.numpy())
    except EngineRejected as error:
        raise AuditRejected(f"the service runs in 8 bits, which this machine cannot: {error}") from None
    served = {entry.name for entry in library.entries}
    images = calibration.pixels.float() / 255

    def build(ticket: Ticket, name: str, device: torch.device) -> Member:
        member = member_of(ticket, name, device)
        return replace(member, network=round_network(member.network, images)) if name in served else member

    workers = WorkerThreads(threads)

    def answer(pixels: Tensor) -> Tensor:
        each = workers.map(lambda index: engine.forward(index, pixels.numpy()), range(len(library.tickets)))
        return torch.from_numpy(np.stack(list(each)))

    exact = candidates_of(library, "cpu", outside, build, threads)
    return replace(exact, answer=answer, rounded_on=calibration.digest)
