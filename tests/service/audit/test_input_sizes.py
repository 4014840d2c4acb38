"""An audit of a library whose pictures are not CIFAR's: arrays of its size, others refused, queries of its shape."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from model_store.input_spec import InputSpec
from model_store.library import Library, write_library
from model_store.structures import multiply_adds
from service.audit.attacks.black_box import place_square, side_of
from service.audit.cost import multiply_adds_of
from service.audit.errors import DataRejected
from service.audit.labelled_data import read_data
from tests.support.tickets import items, make_ticket
from tombola.cli import main

SPEC = InputSpec(48, 64, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4), resize="cover")
CLASSES = ("circle", "cross", "square")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    tickets = [make_ticket("resnet18", density, classes=3, spec=SPEC, stem=(2, 2)) for density in (0.3, 0.5)]
    return write_library(tmp_path_factory.mktemp("library"), classes=CLASSES, data="random", tickets=items(tickets))


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    np.savez(tmp_path / "arrays.npz", images=pixels, labels=np.arange(12) % 3)
    return tmp_path / "arrays.npz"


def test_arrays_of_the_library_s_size_are_read_and_all_others_refused(library: Library, arrays: Path) -> None:
    data = read_data(arrays, library.classes, 12, library.input)
    assert data.pixels.shape == (12, 3, 48, 64)
    with pytest.raises(DataRejected, match=r"uint8 \[12, 48, 64, 3\]; expected uint8 \[N, 32, 32, 3\]"):
        read_data(arrays, library.classes, 12, dataclasses.replace(library.input, height=32, width=32))


def test_an_audit_runs_at_the_library_s_own_size(library: Library, arrays: Path, tmp_path: Path) -> None:
    words = ["audit", str(library.path), "--data", str(arrays), "--profile", "smoke", "--images", "4"]
    words += ["--attacks", "fgsm", "paper-eot", "--epsilons", "8", "--out", str(tmp_path / "report")]
    assert main(words) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["library"]["digest"] == library.digest
    assert report["data"]["images"] == 4


def test_cost_is_that_of_the_library_s_size(library: Library) -> None:
    expected = [multiply_adds(ticket.structure, (48, 64)) for ticket in library.tickets]
    assert multiply_adds_of(library) == expected
    assert expected != [multiply_adds(ticket.structure, (32, 32)) for ticket in library.tickets]


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (48, 64), (224, 224)])
def test_squares_stay_inside_pictures_of_any_size(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    clean = np.full((3, *size), 100, np.int16)
    for probe in (1, 50, 900):
        side = side_of(probe, 1000, size)
        assert 1 <= side < min(size)
        changed = (place_square(clean, clean, 8, side, rng) != clean).any(axis=0)
        assert changed.sum() == side * side
        if side < min(size) - 1:  # the share of the picture is the same, but for whole pixels
            assert side_of(probe, 1000, (32, 32)) / 32 == pytest.approx(side / (size[0] * size[1]) ** 0.5, abs=0.04)
