"""Random numbers by (seed, step, use), so that a search has no generator's state to store."""

import torch


def make_generator(*parts: int) -> torch.Generator:
    """A generator of its own for each combination of numbers, such as a seed, a step and a use."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part) % (2**63)
    return torch.Generator().manual_seed(seed)
