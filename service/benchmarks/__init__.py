"""Measurements of the service: the engine alone, what answers reveal, what 8 bits change, and what an image costs."""

from typing import Final

SETTINGS: Final = (
    "library",
    "device",
    "engine",
    "threads",
    "state_dir",
    "max_batch_size",
)  # those that benchmarks take
