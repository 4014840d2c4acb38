"""The commit and the version of the code that runs, for provenance."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_commit() -> str:
    """The commit; TOMBOLA_COMMIT where the code was copied out of its repository, else "unknown"."""
    if commit := os.environ.get("TOMBOLA_COMMIT"):
        return commit
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- a fixed command
    except OSError:
        return "unknown"
    return git.stdout.strip() if git.returncode == 0 else "unknown"


def product_version() -> str:
    """Of the installed package; "unknown" where it was not installed."""
    try:
        return version("tombola")
    except PackageNotFoundError:
        return "unknown"
