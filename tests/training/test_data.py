import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_store import images
from model_store.input_spec import CIFAR10_INPUT
from tests.support.digits import digits
from training.data import Images, as_floats, batches, load_arrays, read_split, save_arrays, split_of
from training.errors import DataRejected

CLASSES = ("ant", "bee")


def png(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def files(train: int = 104, test: int = 3) -> dict[str, bytes]:
    """A tiny image folder: the red channel is the image's number, the green one its class."""
    return {
        f"{part}/{kind}/{number:04d}.png": png((number, label, 0))
        for part, count in (("train", train), ("test", test))
        for label, kind in enumerate(CLASSES)
        for number in range(count)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in files().items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files().items():
            out.writestr(f"some-root/{name}", data)
        out.writestr("some-root/README.txt", "not an image")
    return path


def test_a_folder_and_a_zip_of_it_are_the_same_data(folder: Path, archive: Path, tmp_path: Path) -> None:
    from_folder, from_zip = (read_split(path, cache=tmp_path / "cache") for path in (folder, archive))
    assert from_folder.classes == CLASSES
    assert from_folder.digest == from_zip.digest
    assert [len(part) for part in (from_zip.search, from_zip.selection, from_zip.test)] == [8, 200, 6]


def test_the_cache_gives_back_the_same_data(archive: Path, tmp_path: Path) -> None:
    first = read_split(archive, cache=tmp_path / "cache")
    again = read_split(archive, cache=tmp_path / "cache")
    assert first.digest == again.digest
    assert first.search.names == again.search.names


def test_search_selection_and_test_images_never_overlap(folder: Path, tmp_path: Path) -> None:
    split = read_split(folder, cache=tmp_path)
    names = [set(part.names) for part in (split.search, split.selection, split.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 2 * (104 + 3)


def test_selection_is_fixed_by_file_name_and_equal_for_every_class(folder: Path, tmp_path: Path) -> None:
    split = read_split(folder, cache=tmp_path)
    assert split.selection.labels.bincount().tolist() == [100, 100]
    # the red channel is the file's number: the first hundred of each class are held out, the last four searched
    assert sorted(split.search.pixels[:, 0, 0, 0].tolist()) == [100, 100, 101, 101, 102, 102, 103, 103]


def test_pixels_and_labels_stay_together(folder: Path, tmp_path: Path) -> None:
    split = read_split(folder, cache=tmp_path)
    for part in (split.search, split.selection, split.test):
        assert part.pixels[:, 1, 0, 0].tolist() == part.labels.tolist()


def test_the_original_layout_is_read_through_torchvision(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataRejected, match="fetch"):
        read_split(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b"PK\x03\x04 not a zip"), "not a readable zip"),
        (lambda path: path.mkdir(), "0 classes under train/"),
    ],
)
def test_what_is_no_data_set_is_refused_with_what_was_expected(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "given"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataRejected, match=message) as raised:
        read_split(path, cache=tmp_path / "cache")
    assert str(path) in str(raised.value)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files().items():
            out.writestr(name, data[:40] if name == "train/bee/0007.png" else data)
    with pytest.raises(DataRejected, match=r"train/bee/0007\.png: not a readable image"):
        read_split(path, cache=tmp_path / "cache")


def test_too_few_images_to_hold_any_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files(train=50).items():
            out.writestr(name, data)
    with pytest.raises(DataRejected, match="'ant': 50 training images; expected more than 100"):
        read_split(path, cache=tmp_path / "cache")


def test_a_class_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in {**files(), "test/wasp/0000.png": png((0, 0, 0))}.items():
            out.writestr(name, data)
    with pytest.raises(DataRejected, match="test/wasp has no counterpart"):
        read_split(path, cache=tmp_path / "cache")


def test_another_size_is_resized() -> None:
    assert images.decode(png((10, 20, 30), (48, 64)), CIFAR10_INPUT).pixels.shape == (3, 32, 32)


def test_balanced_deals_every_class_its_share() -> None:
    assert digits().search.balanced(100).labels.bincount().tolist() == [10] * 10


def test_batches_are_floats_in_the_unit_interval() -> None:
    parts = list(batches(digits().test, 150))
    assert [len(labels) for _, labels in parts] == [150, 150, 100]
    assert all(images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1 for images, _ in parts)
    assert torch.equal(as_floats(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([0.0, 1.0]))


def test_the_digest_changes_with_one_pixel_and_one_label() -> None:
    split = digits()
    pixels = split.search.pixels.clone()
    pixels[0, 0, 0, 0] ^= 1
    changed = split_of(split.classes, Images(pixels, split.search.labels, split.search.names), split.test, per_class=1)
    plain = split_of(split.classes, split.search, split.test, per_class=1)
    assert len({split.digest, changed.digest, plain.digest}) == 3


def test_the_cache_file_holds_no_objects(tmp_path: Path) -> None:
    save_arrays(tmp_path / "digits.npz", digits())
    with np.load(tmp_path / "digits.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    assert load_arrays(tmp_path / "digits.npz").digest == digits().digest
