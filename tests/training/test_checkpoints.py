from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from model_store.structures import convs
from tests.support.digits import digits
from tests.support.searches import CPU, TINY
from training import checkpoints
from training.errors import CheckpointRejected, SearchFailed
from training.search import Search


def test_a_checkpoint_of_another_recipe_or_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Search(TINY, digits(), CPU).save(path)
    with pytest.raises(CheckpointRejected, match="another recipe"):
        Search(replace(TINY, seed=8), digits(), CPU).load(path)
    with pytest.raises(CheckpointRejected, match="another recipe"):
        Search(replace(TINY, precision="bfloat16"), digits(), CPU).load(path)
    other = replace(digits(), search=digits().test)
    with pytest.raises(CheckpointRejected, match="another data set"):
        Search(TINY, other, CPU).load(path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    begun = Search(TINY, digits(), CPU)
    old = {key: value for key, value in begun.metadata().items() if key != "format"}
    save_file(begun.state_dict(), path, metadata=old)
    with pytest.raises(CheckpointRejected, match="of format 1; expected 2"):
        begun.load(path)


@pytest.mark.parametrize(("steps", "most"), [(1, 8.0), (13, 0.3 * 8 + 1 / 8)])
def test_a_checkpoint_has_eight_bytes_a_weight_and_then_eight_a_kept_one(
    steps: int, most: float, tmp_path: Path
) -> None:
    path, begun = tmp_path / "checkpoint.safetensors", Search(TINY, digits(), CPU)
    for _ in range(steps):
        begun.train_step()
    begun.save(path)
    weights = sum(layer.weight.numel() for layer in convs(begun.network).values())
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert (path.stat().st_size - header) / weights == pytest.approx(most, rel=0.01)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Search(TINY, digits(), CPU).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointRejected, match="unreadable checkpoint"):
        Search(TINY, digits(), CPU).load(path)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Search(TINY, digits(), CPU).save(path)
    before = path.read_bytes()

    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(SearchFailed, match=r"No space left on device.*the one before it is kept"):
        Search(TINY, digits(), CPU).save(path)
    assert path.read_bytes() == before
    path.unlink()  # as `good.safetensors` is once a job is done
    with pytest.raises(SearchFailed, match=r"No space left on device.*there is none before it"):
        Search(TINY, digits(), CPU).save(path)
