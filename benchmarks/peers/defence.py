"""What the peers share: decode, draw a theta for each image, run its members, add up.

Written as well as a user would who knows torch: networks folded, one thread for each worker, no gradients. Servers that
form batches are measured three times (BENCH_KIND):

- plain: a loop over images, as one writes it first;
- grouped: the batch's images grouped by ticket, as this project does;
- compiled: grouped, with this project's compiled tickets, so that only the server differs.
"""

import io
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model_store.ensemble import calibrated
from model_store.input_spec import CIFAR10_INPUT
from model_store.library import Library, open_library
from model_store.policy import Theta, draw_theta
from service.engine.factory import open_engine
from service.settings import Settings

CHANCE = secrets.SystemRandom()
Members = Callable[[int, Tensor], Tensor]
"""(ticket, pixels [N, 3, H, W] from 0 to 255) -> its calibrated logits"""


def decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        pixels: NDArray[np.uint8] = np.asarray(
            image.convert("RGB").resize((CIFAR10_INPUT.width, CIFAR10_INPUT.height))
        ).transpose(2, 0, 1)
    return pixels


def in_torch(library: Library) -> Members:
    networks = [calibrated(ticket) for ticket in library.tickets]
    return lambda member, pixels: networks[member](pixels.float() / 255)


def compiled(library: Library) -> Members:
    engine = open_engine(library, Settings(threads=1, state_dir=Path(os.environ["BENCH_STATE"])))
    return lambda member, pixels: torch.from_numpy(engine.forward(member, pixels.numpy()))


class Defence:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        folder, kind = os.environ.get("BENCH_LIBRARY"), os.environ.get("BENCH_KIND", "plain")
        self.library = open_library(Path(folder) if folder else None)
        self.members = compiled(self.library) if kind == "compiled" else in_torch(self.library)
        self.sums = self.one_by_one if kind == "plain" else self.by_ticket

    def answer(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """One answer for each image, each of a theta of its own."""
        pixels = torch.from_numpy(np.stack(images))
        thetas = [draw_theta(self.library.policy, CHANCE) for _ in images]
        with torch.inference_mode():
            sums = self.sums(pixels, thetas)
            probabilities = torch.softmax(sums / torch.tensor([[len(theta.members)] for theta in thetas]), dim=1)
        return [
            {"label": self.library.classes[int(row.argmax())], "probabilities": row.tolist()} for row in probabilities
        ]

    def one_by_one(self, pixels: Tensor, thetas: Sequence[Theta]) -> Tensor:
        rows = [
            torch.stack([self.members(member, image[None]) for member in theta.members]).sum(dim=0)
            for image, theta in zip(pixels, thetas, strict=True)
        ]
        return torch.cat(rows)

    def by_ticket(self, pixels: Tensor, thetas: Sequence[Theta]) -> Tensor:
        sums = torch.zeros(len(pixels), len(self.library.classes))
        for member in {member for theta in thetas for member in theta.members}:
            rows = [row for row, theta in enumerate(thetas) if member in theta.members]
            sums[rows] += self.members(member, pixels[rows])
        return sums
