"""Small things that several commands write, and the commit that wrote them."""

import os
import subprocess
from pathlib import Path

from model_store import files
from training.errors import SearchFailed


def write_atomically(path: Path, text: str) -> None:
    """The old text or the new one, whatever happens in between. Raises SearchFailed where nothing can be written."""
    try:
        files.write_atomically(path, text)
    except OSError as error:
        raise SearchFailed(f"{path}: cannot be written ({error}); free some space, or choose another folder") from None


def commit() -> str:
    """The commit of the code that runs; TRAINING_COMMIT where it was copied out of its repository, else "unknown"."""
    if given := os.environ.get("TRAINING_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"
