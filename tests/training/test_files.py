from pathlib import Path

import pytest

from training.errors import SearchFailed
from training.files import remove_partial_files, write_text


def test_text_is_written_whole_or_refused_in_one_line(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "é")
    assert (tmp_path / "a.json").read_text("utf-8") == "é"
    with pytest.raises(SearchFailed, match="cannot be written"):
        write_text(tmp_path / "nowhere" / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_a_cut_off_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = {"a.json", ".hidden", "a.part", ".checkpoint.safetensors.0123456789abcdef.part"}
    for name in names:
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", ".hidden", "a.part"}
