"""The torch backend, for any device: folded networks, channels last, float16 on CUDA."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_store.arithmetic import use_ieee_float32
from model_store.structures import Network
from service.engine.base import (
    HALF_TOLERANCE,
    TOLERANCE,
    Backend,
    FoldedTicket,
    Forward,
    Images,
    Logits,
    max_relative_error,
    reference_logits,
)

MAX_BATCH: Final = 512  # images of one forward pass; beyond it activations cost memory and gain nothing
BATCH_NUMBERS: Final = 2**23  # of the images of one forward pass, 32 MiB of floats: 55 images of 224x224


def build(tickets: Sequence[FoldedTicket], *, device: torch.device) -> Backend:
    """float16 on CUDA where the logits stay close enough for every ticket, else float32."""
    if device.type == "cuda":
        use_ieee_float32()  # TF32 would fail TOLERANCE
        half = on_device(tickets, device, torch.float16)
        worst = max(half_difference(half, index, ticket) for index, ticket in enumerate(tickets))
        if worst <= HALF_TOLERANCE:
            forward = rerun_overflow(half.forward, tickets)
            return Backend(forward, HALF_TOLERANCE, f"float16, logits within {worst:.1e} of float32's")
        return Backend(
            on_device(tickets, device, torch.float32).forward,
            TOLERANCE,
            f"float32: float16 would change logits by {worst:.1e}",
        )
    return Backend(on_device(tickets, device, torch.float32).forward, TOLERANCE, "float32")


def rerun_overflow(forward: Forward, tickets: Sequence[FoldedTicket]) -> Forward:
    """float16 overflows at 65,504. Images whose logits are not finite are run again in float32, on the CPU."""

    def safe(member: int, images: Images) -> Logits:
        logits = forward(member, images)
        overflowed = ~np.isfinite(logits).all(axis=1)
        if not overflowed.any():
            return logits
        exact = logits.copy()
        exact[overflowed] = reference_logits(tickets[member], images[overflowed])
        return exact

    return safe


class Networks:
    """Every ticket's folded network on one device, in one precision."""

    def __init__(self, networks: list[Network], temperatures: list[float], device: torch.device, dtype: torch.dtype):
        self.networks, self.temperatures, self.device, self.dtype = networks, temperatures, device, dtype

    def forward(self, member: int, images: Images) -> Logits:
        logits: Logits = self.forward_tensor(member, torch.from_numpy(images)).numpy()
        return logits

    @torch.inference_mode()
    def forward_tensor(self, member: int, pixels: Tensor) -> Tensor:
        """uint8 pixels on the CPU -> logits on the CPU."""
        on_device = pixels.to(self.device)
        return torch.cat(
            [self.run(member, chunk) for chunk in torch.split(on_device, images_of_pass(pixels[0].numel()))]
        ).cpu()

    def run(self, member: int, pixels: Tensor) -> Tensor:
        images = (pixels.float() / 255).to(self.dtype).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.networks[member](images)
        return logits.float() / self.temperatures[member]


def images_of_pass(numel: int) -> int:
    """Images of one forward pass, so that its memory does not grow with the pictures. numel: numbers of one."""
    return max(1, min(MAX_BATCH, BATCH_NUMBERS // numel))


def on_device(tickets: Sequence[FoldedTicket], device: torch.device, dtype: torch.dtype) -> Networks:
    networks = [
        deepcopy(ticket.network).to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for ticket in tickets
    ]
    return Networks(networks, [ticket.temperature for ticket in tickets], device, dtype)


def half_difference(half: Networks, index: int, ticket: FoldedTicket) -> float:
    numbers = torch.arange(2 * ticket.input.numel)
    images = numbers.mul(37).remainder(256).to(torch.uint8).view(2, *ticket.input.shape).numpy()
    return max_relative_error(half.forward(index, images), reference_logits(ticket, images))
