"""Libraries of other inputs than CIFAR's: both engines, a process of its own, and what `check` finds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model_store.ensemble import calibrated
from model_store.input_spec import InputSpec
from model_store.library import Library, write_library
from model_store.structures import STRUCTURES
from service.benchmarks.library_check import figures
from service.engine.base import Images
from service.engine.factory import open_engine
from service.engine.launcher import start_fork_server
from service.engine.process_pool import open_in_processes
from service.settings import Settings
from tests.support.tickets import items, make_ticket

pytest.importorskip("service.engine.openvino_engine")
STEMS = {(28, 28): (2, 1), (37, 53): (2, 1), (48, 64): (2, 2), (64, 64): (2, 2), (96, 96): (4, 2), (224, 224): (4, 4)}


def library_of(path: Path, size: tuple[int, int], classes: int = 3) -> Library:
    """A ticket of each structure, its statistics those of no other data."""
    spec = InputSpec(*size, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4))
    tickets = [make_ticket(name, 0.5, classes=classes, spec=spec, stem=STEMS[size]) for name in STRUCTURES]
    return write_library(path, classes=[f"class {n}" for n in range(classes)], data="random", tickets=items(tickets))


def images_of(size: tuple[int, int]) -> Images:
    return np.random.default_rng(0).integers(0, 256, (3, 3, *size), np.uint8)


@pytest.mark.parametrize("size", STEMS)
def test_both_engines_give_the_tickets_own_logits_at_every_size(size: tuple[int, int], tmp_path: Path) -> None:
    library, images = library_of(tmp_path / "library", size), images_of(size)
    with torch.inference_mode():
        expected = [calibrated(ticket)(torch.from_numpy(images).float() / 255).numpy() for ticket in library.tickets]
    for name in ("torch", "openvino"):
        engine = open_engine(library, Settings(engine=name, precision="float32", state_dir=tmp_path, threads=1))
        assert engine.input_shape == (3, *size)
        for member, logits in enumerate(expected):
            scale = max(1.0, float(np.abs(logits).max()))
            np.testing.assert_allclose(engine.forward(member, images), logits, atol=1e-5 * scale, rtol=0)


def test_a_process_of_its_own_takes_pictures_of_the_library_s_size_alone(tmp_path: Path) -> None:
    library, images = library_of(tmp_path / "library", (64, 64)), images_of((64, 64))
    settings = Settings(engine="openvino", precision="float32", state_dir=tmp_path, threads=1)
    near, apart = (
        open_engine(library, settings),
        open_in_processes(library, settings, start_fork_server(library.path, settings)),
    )
    assert apart.input_shape == (3, 64, 64)
    assert apart.macs == near.macs
    np.testing.assert_allclose(apart.forward(2, images), near.forward(2, images), atol=1e-6)
    with pytest.raises(RuntimeError, match="ValueError"):
        apart.forward(2, np.zeros((4, 3, 32, 32), np.uint8))
    np.testing.assert_allclose(apart.forward(2, images), near.forward(2, images), atol=1e-6)


def test_check_runs_a_library_of_any_input(tmp_path: Path) -> None:
    library = library_of(tmp_path / "library", (48, 64))
    checked = figures(Settings(library=library.path, engine="openvino", state_dir=tmp_path, threads=1))
    assert checked["input"] == "3x48x64, squash, bilinear"
    assert checked["classes"] == 3
    assert all(ms > 0 for ms in checked["median_ms"].values())
