"""An audit of a library whose pictures are not CIFAR's: arrays of its size, others refused, queries of its shape."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from model_store.input_spec import InputSpec
from model_store.library import Library, write_library
from model_store.structures import multiply_adds
from service.admin.audit_estimate import CostEstimator
from service.audit.api import audit
from service.audit.attacks.black_box import place_square, side_of
from service.audit.config import Audit
from service.audit.cost import multiply_adds_of
from service.audit.errors import DataRejected
from service.audit.labelled_data import read_data
from service.settings import Settings
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


def test_arrays_in_python_of_another_size_are_refused(library: Library) -> None:
    with pytest.raises(DataRejected, match="images of 32x32; the model takes 48x64: resize them"):
        audit(library, data=(np.zeros((2, 32, 32, 3), np.uint8), [0, 1]), profile="smoke")


def test_an_audit_runs_at_the_library_s_own_size(library: Library, arrays: Path, tmp_path: Path) -> None:
    words = ["audit", str(library.path), "--data", str(arrays), "--profile", "smoke", "--images", "4"]
    words += ["--attacks", "fgsm", "paper-eot", "--epsilons", "8", "--out", str(tmp_path / "report")]
    assert main(words) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["library"]["digest"] == library.digest
    assert report["data"]["images"] == 4


def test_an_l2_audit_says_the_epsilons_of_the_size_and_why(
    library: Library, arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", str(library.path), "--data", str(arrays), "--profile", "smoke", "--images", "4", "--norm", "l2"]
    assert main([*words, "--attacks", "fgsm", "eot-mean-loss", "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["audit"]["headline"], report["audit"]["epsilons"]) == (222, [0, 55, 111, 222, 333, 554])
    why = "1.73 times those of 32x32 pictures, for the same change of each pixel"
    assert report["threat_model"]["epsilon"].endswith(why)
    assert {attack["epsilon"] for attack in report["attacks"]} == {222, 1767, 3533, 255 * 9216**0.5}
    assert f"epsilons 222 in 255ths ({why}), about" in capsys.readouterr().out


def test_the_estimate_of_a_service_says_them_too(library: Library, tmp_path: Path) -> None:
    estimator = CostEstimator(Settings(state_dir=tmp_path))
    swept = [55, 111, 222, 333, 554]
    for audit_of, epsilons in ((Audit("smoke", norm="l2"), [222]), (Audit("standard", norm="l2"), swept)):
        cost = estimator.cost(audit_of, library)
        assert (cost.headline, list(cost.epsilons)) == (222, epsilons)
        assert cost.epsilons_about.startswith("1.73 times those of 32x32")


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
