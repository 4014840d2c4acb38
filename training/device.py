"""The precision of a search on a device."""

from dataclasses import replace

from model_store.processor import has_bfloat16
from training.recipes import TrainConfig


def resolve_precision(recipe: TrainConfig, device: str) -> TrainConfig:
    """The recipe with `auto` replaced: bfloat16 on a GPU and on a CPU that has it, else float32."""
    if recipe.precision != "auto":
        return recipe
    kind = device.partition(":")[0]
    fast = kind == "cuda" or (kind == "cpu" and has_bfloat16())
    return replace(recipe, precision="bfloat16" if fast else "float32")
