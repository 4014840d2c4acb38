"""`python tools/choose_torch.py [auto|cpu|default]`: which build of torch to install, as a constraints file for pip.

auto: CPU wheels where this machine has no NVIDIA driver and the index in use lists them, else the index's default
build. cpu: CPU wheels, or an error. default: no constraint. The choice is printed to standard error. Standard library
only: it runs before anything is installed.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
DRIVER: Final = Path("/proc/driver/nvidia/version")
CHOICES: Final = ("auto", "cpu", "default")
OVERRIDE: Final = "TORCH=default or PIP_FLAGS=... choose another"


def has_nvidia_driver() -> bool:
    return DRIVER.exists() or shutil.which("nvidia-smi") is not None


def listed_versions(package: str) -> list[str]:
    """The versions that the index in use offers, newest first; none if pip cannot say."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    matches = re.search(r"^Available versions: (.*)$", shown.stdout, re.MULTILINE)
    return matches[1].split(", ") if matches else []


def release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); (0,) for a version of another form."""
    matches = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\+\w+)?", version)
    return tuple(int(part) for part in matches[1].split(".")) if matches else (0,)


def bounds(package: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lowest version that pyproject.toml allows, and the first that it does not."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    text = next(each for each in requirements if each.startswith(f"{package}>="))
    low, high = text.removeprefix(f"{package}>=").split(",<")
    return release(low), release(high)


def cpu_builds(package: str) -> list[str]:
    """The CPU builds that the index lists and pyproject.toml allows, newest first."""
    low, high = bounds(package)
    allowed = [each for each in listed_versions(package) if each.endswith("+cpu") and low <= release(each) < high]
    return sorted(allowed, key=release, reverse=True)


def cpu_constraints() -> list[str]:
    """The newest CPU builds of one release: torch 2.N belongs to torchvision 0.(N + 15).

    Both or none: a torchvision for CUDA cannot be imported beside a torch for the CPU.
    """
    visions = cpu_builds("torchvision")
    for torch in cpu_builds("torch"):
        for vision in visions:
            if release(vision)[1] == release(torch)[1] + 15:
                return [f"torch=={torch}", f"torchvision=={vision}"]
    return []


def choose(choice: str) -> tuple[list[str], str]:
    """The constraints, and the reason in one line."""
    if choice == "default":
        return [], "the index's default build of torch, as chosen"
    if choice == "auto" and has_nvidia_driver():
        return [], f"the index's default build of torch, as there is an NVIDIA driver; {OVERRIDE}"
    constraints = cpu_constraints()
    if constraints:
        reason = "as chosen" if choice == "cpu" else f"as there is no NVIDIA driver; {OVERRIDE}"
        return constraints, f"{' and '.join(constraints)}, {reason}"
    return (
        [],
        "the index's default build of torch, which may bring CUDA: the index lists no CPU wheels of both packages",
    )


def main() -> int:
    choice = sys.argv[1] if len(sys.argv) > 1 else "auto"
    if choice not in CHOICES:
        print(f"TORCH={choice}: expected one of {', '.join(CHOICES)}", file=sys.stderr)
        return 2
    constraints, reason = choose(choice)
    if choice == "cpu" and not constraints:
        print(
            "TORCH=cpu: the index in use lists no CPU wheels of torch and torchvision; name another in PIP_FLAGS",
            file=sys.stderr,
        )
        return 2
    print(f"installing {reason}", file=sys.stderr)
    print(*constraints, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
