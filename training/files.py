"""Small text files that several commands write, and what cut-off writers leave."""

from pathlib import Path

from model_store.files import PART, write_atomically
from training.errors import SearchFailed


def write_text(path: Path, text: str) -> None:
    """The old text or the new one, whatever happens in between. Raises SearchFailed where nothing can be written."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise SearchFailed(f"{path}: cannot be written ({error}); free some space, or choose another folder") from None


def remove_partial_files(folder: Path) -> None:
    """Removes what writers that were killed left in the folder. Only for a folder that nobody else writes to."""
    for path in folder.iterdir():
        if PART.match(path.name):
            path.unlink(missing_ok=True)
