"""The one reader of labelled data: layouts, links, names, numbers, and what is said of files that are not read."""

import io
import os
import re
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image

from model_store.data_files import LOCAL, UNTRUSTED, Limits
from model_store.data_layout import ordered
from model_store.errors import DataRejected
from model_store.images import DATA_FORMATS
from model_store.input_spec import CIFAR10_INPUT
from model_store.labelled_images import (
    DataSet,
    Part,
    class_indices,
    decode_part,
    open_data,
)
from model_store.quiet_imports import import_dataset
from tools.wild.data_sets import WildSet, wild_sets
from tools.wild.pictures import encoded, photo

PNG: Final = encoded(photo().resize((32, 32)), "PNG")


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def listing(path: Path, limits: Limits = LOCAL) -> dict[str, list[str]]:
    """Each part's pictures by id, with every one of them decoded."""
    with open_data(path, limits) as data:
        for part in data.parts.values():
            decode_all(data, part)
        return {name: sorted(part.ids) for name, part in data.parts.items()}


def decode_all(data: DataSet, part: Part, *, skip_damaged: bool = False) -> list[int]:
    out = np.empty((len(part), *CIFAR10_INPUT.shape), np.uint8)
    return decode_part(data, part, range(len(part)), CIFAR10_INPUT, out, skip_damaged=skip_damaged)


# As people send them


@pytest.mark.parametrize("example", wild_sets(), ids=lambda example: example.name)
def test_a_data_set_as_people_send_it_is_read_or_refused_in_one_line_that_names_it(
    example: WildSet, tmp_path: Path
) -> None:
    path = example.write(tmp_path)
    if example.read is None:
        with pytest.raises(DataRejected, match=example.message) as refused:
            listing(path)
        assert str(refused.value).startswith(f"{path.name}: ")
        assert "\n" not in str(refused.value)
        return
    with open_data(path, LOCAL) as data:
        for part in data.parts.values():
            assert decode_all(data, part) == list(range(len(part)))
            assert len(set(part.ids)) == len(part)
        counts = {name: Counter(part.labels) for name, part in data.parts.items()}
        assert counts == example.read
        if data.classes is not None:
            expected = [kind for kinds in example.read.values() for kind in kinds]
            assert list(data.classes) == list(dict.fromkeys(expected))
        lines = data.notes.lines(CIFAR10_INPUT)
    assert any(re.search(example.message, line) for line in lines) == bool(example.message), lines


def test_data_sets_have_names_of_their_own() -> None:
    names = [example.name for example in wild_sets()]
    assert len(set(names)) == len(names) > 90


FILES: Final = {"train/cat/1.png": PNG, "train/dog/2.png": PNG, "test/cat/3.png": PNG}


@pytest.mark.parametrize("prefix", ["", "set/", "a/b/"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_every_container_reads_as_every_other_does(kind: str, prefix: str, tmp_path: Path) -> None:
    files = {prefix + name: data for name, data in FILES.items()}
    path = tmp_path / f"data.{kind}"
    {"folder": write_tree, "zip": write_zip, "tar.gz": write_tar}[kind](path, files)
    assert listing(path) == {"train": ["train/cat/1.png", "train/dog/2.png"], "test": ["test/cat/3.png"]}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/1.png", "dog/2.png"], {"all": ["cat/1.png", "dog/2.png"]}),
        (["set/cat/1.png", "set/dog/2.png"], {"all": ["cat/1.png", "dog/2.png"]}),
        (["set/cat/1.png"], {"all": ["cat/1.png"]}),
        (["train/cat/a/1.png", "train/cat/b/1.png"], {"train": ["train/cat/a/1.png", "train/cat/b/1.png"]}),
        (["Train/cat/1.png", "valid/cat/2.png"], {"train": ["train/cat/1.png"], "val": ["val/cat/2.png"]}),
        (["test/train/1.png", "test/bus/1.png"], {"test": ["test/bus/1.png", "test/train/1.png"]}),
    ],
)
def test_parts_and_classes_come_from_the_path(names: list[str], expected: dict[str, list[str]], tmp_path: Path) -> None:
    assert listing(write_zip(tmp_path / "set.zip", dict.fromkeys(names, PNG))) == expected


def test_every_format_that_pillow_reads_is_read(tmp_path: Path) -> None:
    files = {f"cat/{kind.lower()}.{kind.lower()}": encoded(photo(), kind) for kind in DATA_FORMATS}
    files |= {"cat/a.jfif": encoded(photo(), "JPEG"), "dog/b.tif": encoded(photo(), "TIFF")}
    assert len(listing(write_tree(tmp_path, files))["all"]) == len(files)


# Links


def linked(root: Path) -> Path:
    """Two classes, of which dog is a link to a folder elsewhere."""
    write_tree(root / "elsewhere", {"2.png": PNG})
    write_tree(root / "set", {"test/cat/1.png": PNG})
    (root / "set/test/dog").symlink_to(root / "elsewhere", target_is_directory=True)
    return root / "set"


def test_a_linked_class_is_read_as_image_folder_reads_it(tmp_path: Path) -> None:
    path = linked(tmp_path)
    seen = import_dataset("ImageFolder")(str(path / "test"))
    assert listing(path) == {"test": [f"test/{seen.classes[label]}/{Path(file).name}" for file, label in seen.samples]}


def test_a_link_out_of_a_folder_that_is_not_trusted_is_named(tmp_path: Path) -> None:
    path = linked(tmp_path)
    with pytest.raises(DataRejected, match=r"1 links out of the folder are not followed, such as test/dog"):
        listing(path, UNTRUSTED)


def test_a_link_inside_the_folder_is_followed_and_a_circle_ends(tmp_path: Path) -> None:
    write_tree(tmp_path, {"cat/1.png": PNG})
    (tmp_path / "dog").symlink_to(tmp_path / "cat", target_is_directory=True)
    (tmp_path / "cat/again").symlink_to(tmp_path, target_is_directory=True)
    with open_data(tmp_path, UNTRUSTED) as data:
        assert set(data.parts["all"].labels) == {"cat", "dog"}
        assert data.notes.passed_over["links to a folder above"] >= 1


# What is passed over


def test_files_passed_over_are_counted_by_reason_and_one_of_each_is_named(tmp_path: Path) -> None:
    others = {
        "__MACOSX/cat/._1.png": "files of an operating system or a notebook",
        "cat/._1.png": "files of an operating system or a notebook",
        "cat/.ipynb_checkpoints/1.png": "files of an operating system or a notebook",
        "cat/Thumbs.db": "files of an operating system or a notebook",
        "cat/.hidden.png": "hidden files",
        "cat/notes.txt": "files of a kind not read",
        "loose.png": "pictures in no class's folder",
    }
    files = {"cat/1.png": PNG, "dog/1.png": PNG} | dict.fromkeys(others, b"anything")
    with open_data(write_zip(tmp_path / "set.zip", files)) as data:
        assert data.parts["all"].ids == ("cat/1.png", "dog/1.png")
        assert sum(data.notes.passed_over.values()) == len(others)
        lines = data.notes.lines(CIFAR10_INPUT)
    assert "4 files passed over: files of an operating system or a notebook, such as __MACOSX/cat/._1.png" in lines
    assert "1 files passed over: files of a kind not read, such as cat/notes.txt" in lines


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, {"cat/1.png": PNG, "dog/2.png": PNG})
    (tmp_path / "dog").chmod(0)
    with open_data(tmp_path) as data:
        assert data.notes.examples["folders that this user cannot read"] == "dog"
    (tmp_path / "dog").chmod(0o755)


def test_a_table_of_labels_is_answered_with_what_to_do(tmp_path: Path) -> None:
    files = {"train.csv": b"id,label\n1,cat\n", "images/1.png": PNG} | {f"{n}.png": PNG for n in range(3)}
    del files["images/1.png"]
    with pytest.raises(DataRejected, match=r"a table train\.csv; tables are not read: move each picture"):
        listing(write_tree(tmp_path, files))


# Names and numbers


def test_names_that_are_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    files = {f"{number}/1.png": PNG for number in range(12)}
    with open_data(write_zip(tmp_path / "set.zip", files)) as data:
        assert data.classes == tuple(map(str, range(12)))
    assert ordered("set", ["10", "9", "b"]) == ("10", "9", "b")
    with pytest.raises(DataRejected, match="two spellings"):
        ordered("set", ["1", "01"])


def test_names_are_the_same_however_their_accents_are_written(tmp_path: Path) -> None:
    apart, together = (unicodedata.normalize(form, "Café") for form in ("NFD", "NFC"))
    assert apart != together
    files = {f"train/{apart}/1.png": PNG, "train/dog/1.png": PNG, f"test/{together}/2.png": PNG}
    with open_data(write_zip(tmp_path / "set.zip", files)) as data:
        assert data.classes == (together, "dog")
        assert class_indices("set", data.parts["test"], [apart, "dog"]).tolist() == [0]


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


IMAGES: Final = np.arange(3 * 32 * 32 * 3, dtype=np.int64).astype(np.uint8).reshape(3, 32, 32, 3)


def test_numbers_are_indices_of_the_manifest_unless_its_names_are_other_numbers(tmp_path: Path) -> None:
    with open_data(npz(tmp_path / "set.npz", images=IMAGES, labels=np.array([2, 0, 1]))) as data:
        part = data.parts["all"]
        assert class_indices("set", part, ["cat", "dog", "ship"]).tolist() == [2, 0, 1]
        assert class_indices("set", part, ["0", "1", "2"]).tolist() == [2, 0, 1]
        with pytest.raises(DataRejected, match="numbers in another order: '10' is class 2"):
            class_indices("set", part, ["0", "1", "10", "2"])


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": IMAGES, "y": [0, 1, 2]}, {"all"}),
        ({"x_train": IMAGES, "y_train": [0, 1, 2], "x_test": IMAGES[:1], "y_test": [[1]]}, {"train", "test"}),
        ({"images": IMAGES, "labels": [[0], [1], [2]]}, {"all"}),
        ({"images": IMAGES, "labels": [0.0, 1.0, 2.0]}, {"all"}),
        ({"images": IMAGES[..., :1], "labels": [0, 1, 2]}, {"all"}),
        ({"images": IMAGES[..., 0], "labels": [0, 1, 2]}, {"all"}),
        ({"images": IMAGES.transpose(0, 3, 1, 2), "labels": [0, 1, 2]}, {"all"}),
    ],
)
def test_arrays_are_read_under_their_usual_names_and_shapes(
    arrays: dict[str, Any], parts: set[str], tmp_path: Path
) -> None:
    with open_data(npz(tmp_path / "set.npz", **{name: np.asarray(value) for name, value in arrays.items()})) as data:
        assert set(data.parts) == parts
        for part in data.parts.values():
            picture = part.load(0, CIFAR10_INPUT).pixels
            assert (picture[0] == IMAGES[0, ..., 0]).all()


def test_labels_with_fractions_and_arrays_of_another_size_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataRejected, match="with fractions"):
        listing(npz(tmp_path / "a.npz", images=IMAGES, labels=np.array([0.5, 1, 2])))
    small = np.zeros((3, 28, 28, 1), np.uint8)
    with pytest.raises(DataRejected, match=r"expected uint8 \[N, 32, 32, 3\].*give the files they were made from"):
        listing(npz(tmp_path / "b.npz", images=small, labels=np.array([0, 1, 2])))


def test_cifar_s_own_folder_leads_to_torchvision_s_check(tmp_path: Path) -> None:
    """Whether the folder that holds it is given, or it itself, or an archive: its files are compared with their MD5."""
    for name in ("cifar-10-batches-py", "cifar-100-python"):
        folder = write_tree(tmp_path / name / name, {"test_batch": b"\x80\x04N."})
        for path in (
            folder,
            folder.parent,
            write_tar(tmp_path / f"{name}.tar.gz", {f"{name}/test_batch": b"\x80\x04N."}),
        ):
            with pytest.raises(DataRejected, match="fetch"):
                listing(path)


# Damage


def test_whatever_is_wrong_with_a_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    wrong_length = PNG[:33] + (1 << 30).to_bytes(4, "big") + PNG[37:]
    for data in (wrong_length, PNG[:60], b"not a picture", b""):
        files = {"cat/good.png": PNG, "dog/bad.png": data}
        with pytest.raises(DataRejected, match=r"^set\.zip: dog/bad\.png: not a readable image \(") as caught:
            listing(write_zip(tmp_path / "set.zip", files))
        assert "\n" not in str(caught.value)


def test_damaged_pictures_can_be_passed_over_and_are_listed(tmp_path: Path) -> None:
    files = {"cat/1.png": PNG, "cat/2.png": PNG[:60], "dog/1.png": b"", "dog/2.png": PNG}
    with open_data(write_zip(tmp_path / "set.zip", files)) as data:
        assert decode_all(data, data.parts["all"], skip_damaged=True) == [0, 3]
        lines = data.notes.lines(CIFAR10_INPUT)
    assert lines[0] == "2 damaged pictures passed over:"
    assert [line.split(": ")[1] for line in lines[1:]] == ["cat/2.png", "dog/1.png"]


def test_an_encrypted_zip_is_said_to_be_one(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"cat/1.png": PNG, "dog/1.png": PNG})
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + flags] |= 1
            place = data.find(mark, place + 4)
    path.write_bytes(bytes(data))
    with pytest.raises(DataRejected, match=r"set\.zip: cat/1\.png: encrypted; expected a zip without a password"):
        listing(path)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"cat/1.png": PNG, "dog/1.png": PNG})
    data = bytearray(path.read_bytes())
    data[data.index(PNG) + 50] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(DataRejected, match=r"set\.zip: cat/1\.png: cannot be unpacked"):
        listing(path)


def test_smaller_and_converted_pictures_are_counted(tmp_path: Path) -> None:
    grey = encoded(Image.new("L", (16, 16)), "PNG")
    with open_data(write_zip(tmp_path / "set.zip", {"cat/1.png": grey, "dog/1.png": PNG})) as data:
        decode_all(data, data.parts["all"])
        assert data.notes.lines(CIFAR10_INPUT) == [
            "1 pictures are smaller than 32x32 and were enlarged",
            "pictures converted to RGB: 1 of mode L",
        ]
