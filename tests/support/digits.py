"""scikit-learn's bundled handwritten digits as 32x32 colour images: real data that every machine has."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from training.data import Images, Split, split_of


@cache
def digits() -> Split:
    """1,797 images, ten classes; 1,397 training images of which ten a class are held out, 400 test images."""
    bunch = load_digits()
    pixels = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)).unsqueeze(1) * (255 / 16)
    pixels = functional.interpolate(pixels, size=32, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(np.asarray(bunch.target)).to(torch.int64)
    names = tuple(f"{label}/{i:04d}" for i, label in enumerate(labels.tolist()))
    everything = Images(pixels.contiguous(), labels, names)
    train, test = torch.arange(0, 1397), torch.arange(1397, 1797)
    return split_of(tuple(map(str, range(10))), everything.pick(train), everything.pick(test), per_class=10)


@cache
def few_digits() -> Split:
    """300 of them to search on, 30 to select by, 60 to test on: what is measured on all images costs a fifth."""
    parts = {"search": 300, "selection": 30, "test": 60}
    return replace(digits(), **{part: getattr(digits(), part).balanced(count) for part, count in parts.items()})
