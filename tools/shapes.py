"""`python -m tools.shapes FOLDER`: pictures of five shapes to walk through docs/TRAINING.md with.

Each is a shape of a random colour, size and place on a noisy ground of another colour. They are PNG or JPEG, 80 to 200
pixels wide.
They are drawn, not copied, so anybody may use them; the same arguments give the same pictures.
"""

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

Corners = list[tuple[float, float]]


def regular(corners: int, turn: float, inner: float = 1.0) -> Corners:
    """Points on the unit circle; every second one at `inner` of the radius."""
    angles = [turn + 2 * math.pi * place / corners for place in range(corners)]
    radii = [inner if place % 2 else 1.0 for place in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def cross(turn: float) -> Corners:
    arm = ((1.0, 0.3), (0.3, 0.3), (0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3))
    corners = [*arm, *((-x, -y) for x, y in arm)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


SHAPES: Final[dict[str, Callable[[float], Corners]]] = {
    "circle": lambda turn: regular(48, turn),
    "cross": cross,
    "square": lambda turn: regular(4, turn),
    "star": lambda turn: regular(10, turn, 0.4),
    "triangle": lambda turn: regular(3, turn),
}


def draw(kind: str, rng: random.Random) -> Image.Image:
    width, height = rng.randint(80, 200), rng.randint(80, 200)
    light = rng.random() < 0.5
    ground, colour = (
        tuple(rng.randint(*((150, 255) if bright else (0, 90))) for _ in range(3)) for bright in (light, not light)
    )
    image = Image.new("RGB", (width, height), ground)
    radius = rng.uniform(0.28, 0.42) * min(width, height)
    x, y = (rng.uniform(radius, side - radius) for side in (width, height))
    corners = [(x + radius * across, y + radius * down) for across, down in SHAPES[kind](rng.uniform(0, 2 * math.pi))]
    ImageDraw.Draw(image).polygon(corners, fill=colour)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def write_shapes(folder: Path, each: int, seed: int = 0) -> int:
    """`each` pictures of every shape, in folders named after it. Returns how many there are."""
    rng = random.Random(seed)
    for kind in SHAPES:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            draw(kind, rng).save(folder / kind / f"{number:04d}.{'jpg' if number % 2 else 'png'}")
    return each * len(SHAPES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.shapes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--each", type=int, default=200, help="pictures of each shape (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    given = parser.parse_args()
    count = write_shapes(given.folder, given.each, given.seed)
    print(f"{given.folder}: {count} pictures of {', '.join(SHAPES)}")


if __name__ == "__main__":
    main()
