"""The commit and the version of the code that runs, for provenance."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_commit() -> str:
    """The commit; TOMBOLA_COMMIT where the code was copied out of its repository, else "unknown"."""
    if commit := os.environ.get("TOMBOLA_COMMIT"):
        return commit
    return commit_of(Path(__file__))


def commit_of(file: Path) -> str:
    """The commit that is checked out around a file; "unknown" where that commit does not hold the file.

    An installed wheel may lie within a repository of its user, whose commits say nothing of this code.
    """
    command = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- a fixed command
    except OSError:
        return "unknown"
    return git.stdout.split()[0] if git.returncode == 0 else "unknown"


def product_version() -> str:
    """Of the installed package; "unknown" where it was not installed."""
    try:
        return version("tombola")
    except PackageNotFoundError:
        return "unknown"
