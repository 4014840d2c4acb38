"""What a device can do: bfloat16."""

from dataclasses import replace
from pathlib import Path
from typing import Final

from training.recipes import TrainConfig

CPUINFO: Final = Path("/proc/cpuinfo")
BFLOAT16_FLAGS: Final = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's


def has_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether every core multiplies in bfloat16. False where the system does not say."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    cores = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return bool(cores) and all(flags & BFLOAT16_FLAGS for flags in cores)


def resolve_precision(recipe: TrainConfig, device: str) -> TrainConfig:
    """The recipe with `auto` replaced: bfloat16 on a GPU and on a CPU that has it, else float32."""
    if recipe.precision != "auto":
        return recipe
    kind = device.partition(":")[0]
    fast = kind == "cuda" or (kind == "cpu" and has_bfloat16())
    return replace(recipe, precision="bfloat16" if fast else "float32")
