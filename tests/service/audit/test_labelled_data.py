"""Labelled images from files that are not believed."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_store.image_sample import LabelledImages
from model_store.input_spec import CIFAR10_INPUT
from service.audit import labelled_data
from service.audit.config import Audit, read_audit
from service.audit.epsilons import epsilons_of
from service.audit.errors import AuditRejected, DataRejected
from service.audit.labelled_data import generated

CLASSES = ("cat", "dog", "ship")


def read_data(path: Path, classes: Sequence[str], images: int, *, skip_damaged: bool = False) -> LabelledImages:
    return labelled_data.read_data(path, classes, images, CIFAR10_INPUT, skip_damaged=skip_damaged)


def png(value: int, size: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(stream, format="PNG")
    return stream.getvalue()


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def arrays(path: Path, **named: Any) -> Path:
    np.savez_compressed(path, **named)
    return path


def tree(part: str = "test/") -> dict[str, bytes]:
    """Six images; a cat's pixels are 0, 1, a dog's 10, 11, a ship's 20, 21."""
    return {f"set/{part}{name}/{n}.png": png(10 * i + n) for i, name in enumerate(CLASSES) for n in (0, 1)}


def test_a_zip_is_dealt_class_by_class_and_only_its_test_images_are_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", tree() | tree("train/") | {"set/readme.txt": b"hello"})
    data = read_data(path, CLASSES, 4)
    assert data.labels.tolist() == [0, 1, 2, 0]
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 1]
    assert data.ids == ("test/cat/0.png", "test/dog/0.png", "test/ship/0.png", "test/cat/1.png")
    assert data.held_out
    assert read_data(path, CLASSES, 100).first(4).digest == data.digest


def test_what_an_audit_does_not_measure_is_said(tmp_path: Path) -> None:
    """A class without a picture, and pictures that lie beside the part that is read."""
    files = {"test/cat/1.png": png(1), "val/cat/1.png": png(2), "val/dog/1.png": png(3), "train/dog/1.png": png(4)}
    notes = read_data(zipped(tmp_path / "set.zip", files), CLASSES, 4).notes
    assert notes == (
        "2 files passed over: pictures of val/, since test/ is read, such as val",
        "no pictures of 2 of the library's 3 classes, such as dog, ship: not measured",
    )


def test_a_folder_reads_as_a_zip_of_it_does(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", tree())
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folder")
    assert read_data(tmp_path / "folder", CLASSES, 6).digest == read_data(path, CLASSES, 6).digest


def test_a_folder_without_a_split_is_read_but_not_called_held_out(tmp_path: Path) -> None:
    data = read_data(zipped(tmp_path / "set.zip", tree("")), CLASSES, 6)
    assert len(data) == 6
    assert not data.held_out


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_npz_is_read_in_both_layouts(tmp_path: Path, channels_last: bool) -> None:
    images = np.arange(4 * 3 * 32 * 32, dtype=np.uint32).astype(np.uint8).reshape(4, 3, 32, 32)
    stored = images.transpose(0, 2, 3, 1) if channels_last else images
    data = read_data(arrays(tmp_path / "set.npz", images=stored, labels=np.array([2, 1, 0, 0])), CLASSES, 4)
    assert data.labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(data.pixels, torch.from_numpy(images[[2, 1, 0, 3]]))
    assert data.ids == ("set/2", "set/1", "set/0", "set/3")


IMAGES = np.zeros((3, 32, 32, 3), np.uint8)
LABELS = np.array([0, 1, 2])
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"images": IMAGES}, "no array 'labels'"),
    "no images": ({"labels": LABELS}, "no array 'images'"),
    "floats": ({"images": IMAGES / 255, "labels": LABELS}, "expected whole numbers"),
    "wider numbers": ({"images": IMAGES.astype(np.int32), "labels": LABELS}, "expected uint8"),
    "another size": ({"images": np.zeros((3, 28, 28, 3), np.uint8), "labels": LABELS}, "expected uint8 \\[N, 32"),
    "one image": ({"images": IMAGES[0], "labels": LABELS}, "expected uint8"),
    "fewer labels": ({"images": IMAGES, "labels": LABELS[:2]}, "3 images, 2 labels"),
    "nothing": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "at least one"),
    "another class count": ({"images": IMAGES, "labels": np.array([0, 1, 9])}, "the library has 3 classes"),
    "negative labels": ({"images": IMAGES, "labels": np.array([0, 1, -1])}, "labels from -1"),
    "one-hot labels": ({"images": IMAGES, "labels": np.eye(3, dtype=np.int64)}, "expected \\[N\\]"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    fields, text = BAD_ARRAYS[name]
    with pytest.raises(DataRejected, match=text):
        read_data(arrays(tmp_path / "set.npz", **fields), CLASSES, 3)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, Any]:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "set.npz"
    np.savez(path, images=np.array([Trap()], dtype=object), labels=LABELS)
    with pytest.raises(DataRejected, match="whole numbers"):
        read_data(path, CLASSES, 3)
    assert not (tmp_path / "sprung").exists()


def test_an_array_whose_header_promises_more_than_it_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32, 3)})
    path = zipped(tmp_path / "set.npz", {"images.npy": stream.getvalue() + bytes(10), "labels.npy": b""})
    with pytest.raises(DataRejected, match="10 bytes for the shape"):
        read_data(path, CLASSES, 3)


BAD_FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "no labels": ({"a.png": png(0), "b.png": png(1)}, "without labels nothing is measured"),
    "no images": ({"test/cat/notes.txt": b"miaow"}, "no images in folders"),
    "another class": ({"test/cat/0.png": png(0), "test/cow/0.png": png(0)}, "'cow' is none of the library's 3"),
    "training images alone": ({"train/cat/0.png": png(0)}, "none under test/"),
    "not an image": ({"test/cat/0.png": b"not an image"}, "unsupported format"),
    "cut short": ({"test/cat/0.png": png(0)[:60]}, "damaged"),
    "a bomb": ({"test/cat/0.png": b"\0" * (9 << 20)}, "at most"),
    "an image of too many pixels": ({"test/cat/0.png": png(0, 2100)}, "pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_trees_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    files, text = BAD_FILES[name]
    with pytest.raises(DataRejected, match=text):
        read_data(zipped(tmp_path / "set.zip", files), CLASSES, 3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("set.zip", "set.npz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataRejected, match="not a readable"):
            read_data(tmp_path / name, CLASSES, 3)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataRejected, match="no such file"):
        read_data(tmp_path / "nothing.zip", CLASSES, 3)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "set/test/cat").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "set/test/cat/0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataRejected, match="no images in folders"):
        read_data(tmp_path / "set", CLASSES, 3)


def test_generated_images_are_the_seeds() -> None:
    def zeros(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), dtype=torch.int64)

    first, again, other = (generated(3, seed, CIFAR10_INPUT, zeros) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert "no measure of accuracy" in first.origin


# Requests


BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "expected a JSON object"),
    "no profile": ({}, "profile is missing"),
    "unknown profile": ({"profile": "quick"}, "profile 'quick'"),
    "unknown field": ({"profile": "smoke", "epsilon": 8}, "'epsilon' is no field"),
    "unknown attack": ({"profile": "smoke", "attacks": ["magic"]}, "attacks 'magic'"),
    "tickets as text": ({"profile": "smoke", "tickets": "resnet18-07"}, "expected a list"),
    "attacks as text": ({"profile": "smoke", "attacks": "arc"}, "expected a list"),
    "epsilon in pixel units": ({"profile": "smoke", "epsilons": [0.031]}, "8 is 8/255"),
    "epsilon too large": ({"profile": "smoke", "epsilons": [256]}, "1 to 255"),
    "negative epsilon": ({"profile": "smoke", "epsilons": [-8]}, "1 to 255|one above 0"),
    "only zero": ({"profile": "smoke", "epsilons": [0]}, "one above 0"),
    "epsilons of text": ({"profile": "smoke", "epsilons": ["8"]}, "expected numbers"),
    "no epsilons": ({"profile": "smoke", "epsilons": []}, "expected a list"),
    "unknown norm": ({"profile": "smoke", "norm": "l1"}, "norm 'l1'"),
    "one image": ({"profile": "smoke", "images": 1}, "from 2 to 10000"),
    "images as a fraction": ({"profile": "smoke", "images": 2.5}, "whole number"),
    "images as a truth": ({"profile": "smoke", "images": True}, "whole number"),
    "negative seed": ({"profile": "smoke", "seed": -1}, "seed -1"),
    "data as a number": ({"profile": "smoke", "data": 5}, "name of a data set"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_requests_of_other_kinds_are_refused(name: str) -> None:
    fields, text = BAD_REQUESTS[name]
    with pytest.raises(AuditRejected, match=text):
        read_audit(json.loads(json.dumps(fields)))


def test_a_request_becomes_an_audit() -> None:
    audit = read_audit({"profile": "full", "epsilons": [12, 4, 4], "images": 50, "seed": 3, "attacks": None})
    assert audit == Audit("full", epsilons=(4.0, 12.0), images=50, seed=3)
    assert epsilons_of(audit, 3072).headline == 12
    assert epsilons_of(Audit(), 3072).headline == 8
