import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_store import images
from model_store.held_out import selection_places
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from tests.support.digits import digits
from training.data import (
    CIFAR10_CLASSES,
    INDEX,
    NOTES,
    Images,
    as_floats,
    batch_of,
    batches,
    measured_input,
    read_split,
    split_of,
)
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
    assert [len(part) for part in (from_zip.search, from_zip.selection, from_zip.test)] == [168, 40, 6]


def test_pictures_that_a_search_does_not_read_are_counted_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A validation part beside a test part, and a class beside the parts."""
    for name in ("val/cat/1.png", "val/dog/1.png", "dog/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(next(iter(files().values())))
    read_split(folder, cache=tmp_path / "cache")
    lines = capsys.readouterr().err
    assert "2 files passed over: pictures of val/, since test/ and train/ is read, such as val" in lines
    assert "1 files passed over: pictures beside the parts, since test/ and train/ is read" in lines


def test_the_cache_sees_what_changes_behind_a_link(folder: Path, tmp_path: Path) -> None:
    kind = next(path for path in sorted((folder / "train").iterdir()) if path.is_dir())
    kind.rename(tmp_path / "elsewhere")
    kind.symlink_to(tmp_path / "elsewhere")

    def training_images() -> int:
        split = read_split(folder, cache=tmp_path / "cache")
        return len(split.search) + len(split.selection)

    before = training_images()
    picture = next(iter((tmp_path / "elsewhere").iterdir()))
    (tmp_path / "elsewhere" / "zz-new.png").write_bytes(picture.read_bytes())
    assert training_images() == before + 1


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
    assert split.selection.labels.bincount().tolist() == [20, 20]
    # the red channel is the file's number: the first fifth of each class is held out, the others are searched
    assert sorted(split.search.pixels[:, 0, 0, 0].tolist()) == sorted([*range(20, 104)] * 2)


@pytest.mark.parametrize(("count", "selected"), [(2, 1), (9, 1), (104, 20), (499, 99), (500, 100), (5000, 100)])
def test_a_fifth_of_a_small_class_and_a_hundred_of_a_large_one_are_for_selection(count: int, selected: int) -> None:
    names = [f"{place:04d}" for place in range(count)]
    kept, chosen = selection_places(["only"], torch.zeros(count, dtype=torch.int64), names)
    assert chosen.tolist() == list(range(selected))
    assert kept.tolist() == list(range(selected, count))


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
        for name, data in files(train=1).items():
            out.writestr(name, data)
    with pytest.raises(DataRejected, match="'ant': 1 training images; expected more than 1"):
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
    unchanged = split_of(split.classes, split.search, split.test, per_class=1)
    assert len({split.digest, changed.digest, unchanged.digest}) == 3


def test_the_cache_holds_no_objects_and_gives_back_the_digest_of_the_arrays(archive: Path, tmp_path: Path) -> None:
    split = read_split(archive)
    stored = read_split(archive, cache=tmp_path)
    (index,) = tmp_path.glob(f"*/{INDEX}")
    with np.load(index, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    assert sorted(path.name for path in index.parent.iterdir()) == sorted(
        [INDEX, NOTES, "search.npy", "selection.npy", "test.npy"]
    )
    assert stored.stored_digest == split.digest
    assert replace(stored, stored_digest=None).digest == split.digest
    assert stored.input == split.input


# Anyone's pictures


def noisy_classes(folder: Path, counts: dict[str, int], size: tuple[int, int] = (80, 60), part: str = "") -> Path:
    """Pictures of noise over a colour of their class. size: width and height."""
    rng = np.random.default_rng(0)
    for label, (kind, count) in enumerate(counts.items()):
        (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 100, (size[1], size[0], 3), np.uint8)
            pixels[..., label % 3] += 100
            Image.fromarray(pixels).save(folder / part / kind / f"{number:03d}.png")
    return folder


def test_pictures_get_the_size_asked_for_and_statistics_of_their_own_training_images(tmp_path: Path) -> None:
    path = noisy_classes(tmp_path / "shapes", {"a": 20, "b": 10, "c": 10})
    spec = InputSpec(48, 64, mean=(0, 0, 0), std=(1, 1, 1), resize="cover", interpolation="bicubic")
    for cache in (None, tmp_path / "cache"):
        split = read_split(path, cache, spec)
        assert split.search.pixels.shape == (31, 3, 48, 64)
        training = torch.cat([split.search.pixels, split.selection.pixels]).double() / 255
        mean, std = training.mean(dim=(0, 2, 3)), training.std(dim=(0, 2, 3), correction=0)
        assert split.input.mean == tuple(round(value, 4) for value in mean.tolist())
        assert split.input.std == tuple(round(value, 4) for value in std.tolist())
        assert replace(split.input, mean=spec.mean, std=spec.std) == spec


def test_cifar_10_keeps_its_published_statistics_at_its_own_size_alone() -> None:
    pixels, rows = torch.full((4, 3, 32, 32), 100, dtype=torch.uint8), torch.arange(4)
    assert measured_input(CIFAR10_CLASSES, pixels, rows, CIFAR10_INPUT) == CIFAR10_INPUT
    assert measured_input(("a", "b"), pixels, rows, CIFAR10_INPUT).mean == (0.3922,) * 3
    assert measured_input(CIFAR10_CLASSES, pixels, rows, replace(CIFAR10_INPUT, resize="cover")).mean == (0.3922,) * 3


def test_without_parts_a_tenth_of_each_class_is_for_the_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = noisy_classes(tmp_path / "shapes", {"a": 30, "b": 20, "c": 20})
    split = read_split(path, tmp_path / "cache")
    assert split.test.labels.bincount().tolist() == [3, 2, 2]
    assert split.selection.labels.bincount().tolist() == [5, 3, 3]
    names = [set(part.names) for part in (split.search, split.selection, split.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 70
    assert "no test/ and no val/: a tenth of each class, 7 images, is kept apart" in capsys.readouterr().err


def test_what_was_done_to_pictures_and_unbalanced_classes_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = noisy_classes(tmp_path / "shapes", {"rare": 4, "common": 20}, part="train")
    noisy_classes(path, {"rare": 2, "common": 2}, part="test")
    Image.new("L", (20, 20)).save(path / "train" / "common" / "grey.png")
    Image.new("CMYK", (90, 70)).save(path / "train" / "common" / "print.jpg")
    Image.new("RGBA", (90, 70)).save(path / "test" / "common" / "clear.png")
    read_split(path, tmp_path / "cache", replace(CIFAR10_INPUT, height=48, width=64))
    enlarged, converted, unbalanced = capsys.readouterr().err.splitlines()
    assert enlarged == "shapes: 1 pictures are smaller than 64x48 and were enlarged"
    assert converted == "shapes: pictures converted to RGB: 1 of mode CMYK, 1 of mode L, 1 of mode RGBA"
    assert unbalanced.startswith("shapes: unbalanced classes: 4 training images of 'rare', 22 of 'common'; accuracy")


def test_a_thousand_classes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    images_of = np.repeat(np.arange(1000, dtype=np.uint8)[:, None, None, None] % 251, 3, axis=3)
    pixels = np.broadcast_to(images_of, (1000, 32, 32, 3))
    x_train, y_train = np.concatenate([pixels] * 3), np.tile(np.arange(1000), 3)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=pixels, y_test=np.arange(1000))
    split = read_split(path, tmp_path / "cache")
    assert len(split.classes) == 1000
    assert [len(part) for part in (split.search, split.selection, split.test)] == [2000, 1000, 1000]
    assert split.classes[999] == "999"


def test_a_class_s_name_that_no_library_can_hold_is_refused(tmp_path: Path) -> None:
    path = noisy_classes(tmp_path / "shapes", {"a": 2, "b" * 201: 2})
    with pytest.raises(DataRejected, match=r"class 'b{40}'\.\.\.: 201 characters; at most 200"):
        read_split(path)


def test_arrays_of_a_search_are_mapped_and_not_read(tmp_path: Path) -> None:
    path = noisy_classes(tmp_path / "shapes", {"a": 20, "b": 20})
    split = read_split(path, tmp_path / "cache", replace(CIFAR10_INPUT, height=224, width=224))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert sum(str(tmp_path / "cache") in line for line in maps.read_text().splitlines()) == 3
    assert split.search.pixels[torch.tensor([0, 5])].shape == (2, 3, 224, 224)


def test_large_images_are_run_in_smaller_batches() -> None:
    def images(side: int) -> Images:
        return Images(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))

    assert [batch_of(images(side)) for side in (28, 32, 64, 96, 224, 1024)] == [250, 250, 250, 250, 55, 2]
