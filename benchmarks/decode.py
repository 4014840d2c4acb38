"""`python -m benchmarks.decode`: what it costs to decode a large picture to a network's input.

Pictures of 12 megapixels are drawn and saved as cameras and web pages have them. Each is decoded in turn, round after
round. Processor time is read, so that neighbours on a shared machine matter less; one that shares the core still does.
"""

import argparse
import io
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from model_store.files import write_atomically
from model_store.images import decode
from model_store.input_spec import CIFAR10_INPUT, parse_size
from service.benchmarks.command import machine

WIDTH, HEIGHT = 4000, 3000
QUALITY: Final = 85
KINDS: Final[dict[str, dict[str, Any]]] = {
    "JPEG 4:2:0": {"subsampling": "4:2:0"},
    "JPEG 4:4:4": {"subsampling": "4:4:4"},
    "JPEG 4:2:0, progressive": {"subsampling": "4:2:0", "progressive": True},
}


def photograph(seed: int = 0) -> Image.Image:
    """Smooth colours under noise of two scales, whose files are as long as a telephone's: 2 bits a pixel."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), np.uint8))
    smooth = np.asarray(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float32)
    coarse = rng.normal(0, 6, (HEIGHT // 2, WIDTH // 2, 1)).repeat(2, axis=0).repeat(2, axis=1)
    noisy = smooth + coarse + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, **options)
    return buffer.getvalue()


def measure(size: tuple[int, int], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time by kind: the median of the rounds, and the least."""
    spec = replace(CIFAR10_INPUT, height=size[0], width=size[1])
    image = photograph()
    files = {kind: encoded(image, options) for kind, options in KINDS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in files}
    for _ in range(rounds + 1):  # the first warms up
        for kind, data in files.items():
            began = time.process_time()
            decode(data, spec, max_pixels=WIDTH * HEIGHT)
            times[kind].append(1000 * (time.process_time() - began))
    return {
        kind: {
            "megabytes": round(len(files[kind]) / 1e6, 2),
            "median_ms": round(statistics.median(each[1:]), 1),
            "least_ms": round(min(each[1:]), 1),
        }
        for kind, each in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=(64, 64), help="of the result: 64, or 48x64 (64)")
    parser.add_argument("--rounds", type=int, default=15, help="of all pictures, one after the other (15)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    figures = measure(given.size, given.rounds)
    for kind, figure in figures.items():
        print(f"{kind}: {figure['megabytes']} MB, median {figure['median_ms']} ms, least {figure['least_ms']} ms")
    if given.json:
        write_atomically(given.json, json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
