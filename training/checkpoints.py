"""Checkpoint files of a search: one safetensors container, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model_store.files import write_atomically
from training.errors import CheckpointRejected, SearchFailed
from training.files import remove_partial_files

CHECKPOINT, GOOD = "checkpoint.safetensors", "good.safetensors"  # the last state, and the last that did not overfit
FORMAT: Final = "2"
FIELDS: Final = (("recipe", "recipe"), ("data", "data set"))  # of the metadata, with their names in words


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """After a crash at any point the file holds the checkpoint before this one, or this one. Raises SearchFailed."""
    try:
        data = save({name: value.contiguous() for name, value in tensors.items()}, {"format": FORMAT, **metadata})
        write_atomically(path, data)
    except (OSError, SafetensorError) as error:
        before = "the one before it is kept" if path.exists() else "there is none before it"
        raise SearchFailed(
            f"{path}: the checkpoint could not be written ({error}); {before}. Free some space."
        ) from None


def load_checkpoint(path: Path, expected: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors and metadata.

    expected: the metadata that the search would write now, of which `recipe` and `data` must be the same. Raises
    CheckpointRejected where they are not, and for a damaged file or one of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointRejected(
            f"{path}: unreadable checkpoint ({error}); delete it to start this ticket afresh"
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointRejected(
            f"{path}: checkpoint of format {metadata.get('format', '1')}; expected {FORMAT}. "
            "Delete it to start this ticket afresh, or go on with the version that began it."
        )
    for field, words in FIELDS:
        if metadata.get(field) != expected[field]:
            raise CheckpointRejected(
                f"{path}: checkpoint of another {words} ({str(metadata.get(field))[:12]}); expected "
                f"{expected[field][:12]}. "
                "Go on with the one that began it, or choose another --state folder."
            )
    return tensors, metadata


def delete_checkpoints(folder: Path) -> None:
    """Removes what a finished job has no more use for."""
    for name in (CHECKPOINT, GOOD):
        (folder / name).unlink(missing_ok=True)
    remove_partial_files(folder)
