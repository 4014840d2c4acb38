"""What the processor can do."""

from pathlib import Path
from typing import Final

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
