"""Libraries of other pictures and classes than CIFAR's, from a file to an answer and an audit, with real engines."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model_store.input_spec import InputSpec
from model_store.library import Library, write_library
from service.engine.errors import EngineRejected
from service.engine.factory import open_engine
from service.engine.torch_engine import BATCH_NUMBERS, MAX_BATCH, images_of_pass
from service.settings import Settings
from tests.support.planes import png
from tests.support.real_planes import Plane, with_plane
from tests.support.tickets import CLASSES, items, make_ticket
from tombola.cli import main

MODEL = "/v2/models/tombola"
STEMS = {(28, 28): (2, 1), (37, 53): (2, 1), (96, 96): (4, 2), (224, 224): (4, 4)}
MORE_BYTES = 96 << 20


def library_of(path: Path, size: tuple[int, int], classes: int = 3) -> Library:
    spec = InputSpec(*size, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4))
    stem = STEMS[size]
    tickets = [make_ticket("resnet18", density, classes=classes, spec=spec, stem=stem) for density in (0.3, 0.5)]
    return write_library(path, classes=[f"class {n}" for n in range(classes)], data="random", tickets=items(tickets))


@pytest.mark.parametrize("size", [(28, 28), (37, 53), (96, 96), (224, 224)])
def test_a_library_of_any_size_is_served_and_audited(size: tuple[int, int], tmp_path: Path) -> None:
    """37 and 53 are divided by no stride: a stage of stride 2 makes 19 of 37."""
    library, (height, width) = library_of(tmp_path / "library", size), size

    async def ask(plane: Plane) -> None:
        files = await plane.public.post("/v1/classify", content=png(size=(300, 200)))
        assert files.status_code == 200, files.text
        pixels = {"name": "pixels", "shape": [1, 3, height, width], "datatype": "UINT8"}
        right = {"inputs": [{**pixels, "data": [100] * (3 * height * width)}]}
        assert (await plane.public.post(f"{MODEL}/infer", json=right)).status_code == 200
        turned = {"inputs": [{**pixels, "shape": [1, 3, height + 1, width], "data": [0] * (3 * (height + 1) * width)}]}
        wrong = await plane.public.post(f"{MODEL}/infer", json=turned)
        assert wrong.status_code == 400
        assert f"[N, 3, {height}, {width}]" in wrong.json()["error"]

    with_plane(ask, library, tmp_path)
    arrays, rng = tmp_path / "arrays.npz", np.random.default_rng(0)
    np.savez(arrays, images=rng.integers(0, 256, (6, *size, 3), np.uint8), labels=np.arange(6) % 3)
    words = ["audit", str(library.path), "--data", str(arrays), "--profile", "smoke", "--images", "3"]
    assert main([*words, "--attacks", "fgsm", "--epsilons", "8", "--out", str(tmp_path / "report")]) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["data"]["images"] == 3


def test_a_thousand_classes_are_served_and_tried(tmp_path: Path) -> None:
    library = library_of(tmp_path / "library", (28, 28), classes=1000)

    async def ask(plane: Plane) -> None:
        (answer,) = (await plane.public.post("/v1/classify", content=png())).json()["predictions"]
        assert len(answer["top"]) == 1000
        assert {row["label"] for row in answer["top"]} == set(library.classes)
        outputs = (await plane.public.get(MODEL)).json()["outputs"]
        assert outputs[0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 1000]}
        tried = (await plane.admin.post("/admin/try", content=png())).json()
        assert len(tried["classes"]) == 1000
        assert sum(row["votes"] for row in tried["classes"]) == tried["draws"]
        assert (await plane.admin.get("/admin/overview")).json()["library"]["classes"] == 1000

    with_plane(ask, library, tmp_path, top_k=1000)


def test_a_pass_of_the_torch_engine_takes_as_many_pictures_as_its_memory_allows() -> None:
    assert images_of_pass(3 * 32 * 32) == MAX_BATCH
    for numel in (3 * 96 * 96, 3 * 224 * 224, 3 * 1024 * 1024):
        assert images_of_pass(numel) * numel <= BATCH_NUMBERS < (images_of_pass(numel) + 1) * numel


def test_a_library_whose_pictures_memory_cannot_hold_is_refused_in_one_line(tmp_path: Path) -> None:
    """The stem's output of two pictures of 1024x1024 alone needs 16 MiB a channel; torch's own allocator refuses."""
    spec = InputSpec(1024, 1024, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    tickets = [replace(make_ticket("resnet18", 0.3), input=spec)]
    library = write_library(tmp_path / "library", classes=CLASSES, data="random", tickets=items(tickets))
    settings = Settings(engine="torch", precision="float32", state_dir=tmp_path, threads=1)
    open_engine(library_of(tmp_path / "small", (28, 28)), settings)  # what torch loads at its first use
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    try:
        with pytest.raises(EngineRejected) as refusal:
            open_engine(library, settings)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    text = str(refusal.value)
    assert "cannot run pictures of 3x1024x1024, squash, bilinear: " in text
    assert "allocate" in text
    assert "\n" not in text
