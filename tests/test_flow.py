"""From images to an answer: a search, an export, a real server, a POST, and how often it is right."""

import base64
import io
import json
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model_store.ensemble import calibrated
from model_store.library import open_library
from model_store.structures import Structure
from service.outbound import open_url
from tests.support.digits import digits
from tests.support.serving import serving
from tombola import Client
from tombola.cli import main
from training.data import Images, as_floats
from training.export import export
from training.jobs import Job
from training.recipes import TrainConfig
from training.run_job import run_job

pytestmark = pytest.mark.usefixtures("warm_start")

ROOT = Path(__file__).parents[1]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10-jpeg.zip"


def png(pixels: torch.Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny tickets, searched on digits; few images are measured, since no claim is looked at."""
    folder, data = tmp_path_factory.mktemp("flow"), digits()
    data = replace(data, selection=data.selection.balanced(40), test=data.test.balanced(20))
    for density in (0.3, 0.5):
        recipe = TrainConfig(
            Structure("resnet18", 8, stem_stride=2),
            density,
            5,
            steps=140,
            batch=32,
            guards=1,
            precision="float32",
            muon_rate=0.05,
            clean_until=0.6,
            ramp_until=0.9,
        )
        job = Job(recipe, folder / "state" / recipe.name, data="digits", classes=data.classes)
        run_job(job, data, torch.device("cpu"))
    export(folder / "library", [folder / "state"])
    return folder / "library"


def test_a_search_s_tickets_answer_pictures_over_http(library: Path, tmp_path: Path) -> None:
    images = digits().test.balanced(200)
    with serving(library, tmp_path / "state", "--engine", "auto") as server:
        answers = [answer for part in range(0, 200, 50) for answer in classify(server.public, library, images, part)]
        assert server.end() == 0, (tmp_path / "log.jsonl").read_text()
    right = sum(answer["index"] == label for answer, label in zip(answers, images.labels.tolist(), strict=True))
    print(f"\nan ensemble of one or two tickets of {library}: {right} of 200 test digits right")
    assert right > 120  # chance is 20; 60 % is far beyond it and far below what the tickets reach


def classify(address: str, library: Path, images: Images, start: int) -> list[dict[str, object]]:
    body = json.dumps({"images": [png(pixels) for pixels in images.pixels[start : start + 50]]}).encode()
    request = urllib.request.Request(f"{address}/v1/classify", body, {"Content-Type": "application/json"})
    with open_url(request, 60) as response:
        answer = json.load(response)
    assert answer["library"] == open_library(library).digest
    predictions: list[dict[str, object]] = answer["predictions"]
    return predictions


def test_a_thousand_classes_go_from_a_search_to_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four pictures of each class in one colour of its own, through every command; one ticket is its own ensemble."""
    names = [str(number) for number in range(1000)]
    colours = np.array([[25 * (n // 100), 25 * (n // 10 % 10), 25 * (n % 10)] for n in range(1000)], np.uint8)
    pixels = np.broadcast_to(colours[:, None, None], (1000, 12, 16, 3))
    arrays = tmp_path / "colours.npz"
    np.savez(arrays, images=np.concatenate([pixels] * 4), labels=np.tile(np.arange(1000), 4))
    state, path = str(tmp_path / "run"), tmp_path / "library"
    search = ["search", "--data", str(arrays), "--state", state, "--only", "resnet18-30", "--workers", "1"]
    assert main([*search, "--size", "12x16", "--set", "width=4", "steps=4", "batch=64", "precision=float32"]) == 0
    assert main(["export", str(path), "--state", state]) == 0
    capsys.readouterr()
    library = open_library(path)
    (ticket,) = library.tickets
    assert library.classes == tuple(names)
    tried = torch.from_numpy(pixels[::25].copy()).permute(0, 3, 1, 2)
    with torch.no_grad():
        own = calibrated(ticket)(as_floats(tried)).argmax(dim=1).tolist()
    body = {"images": [png(each) for each in tried]}
    words = ["--engine", "auto", "--precision", "float32", "--top-k", "1000"]
    with serving(path, tmp_path / "state", *words) as server, Client(server.public) as client:
        answers = httpx.post(f"{server.public}/v1/classify", json=body, trust_env=False, timeout=60).json()
        first = client.classify(tried[0].permute(1, 2, 0).numpy())
        outputs = httpx.get(f"{server.public}/v2/models/tombola", trust_env=False).json()["outputs"]
        assert server.end() == 0
    assert outputs[0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 1000]}
    predictions = answers["predictions"]
    assert [answer["index"] for answer in predictions] == own
    assert [answer["label"] for answer in predictions] == [names[index] for index in own]
    assert all({row["label"] for row in answer["top"]} == set(names) for answer in predictions)
    assert first.label == names[own[0]]


def embedded_accuracy(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Of the mean of all the embedded library's tickets. images: floats [N, 3, 32, 32] in [0, 1]."""
    with torch.no_grad():
        logits = torch.stack([calibrated(ticket)(images) for ticket in open_library().tickets]).mean(dim=0)
    return float((logits.argmax(1) == labels).float().mean())


def test_the_embedded_library_reads_foolbox_s_cifar_samples_better_than_chance() -> None:
    """Twenty images: by chance six or more are right in one of ninety runs; the images and the library are fixed."""
    package_spec = find_spec("foolbox")  # its pictures alone: no need to run it
    assert package_spec is not None
    assert package_spec.origin is not None
    files = sorted((Path(package_spec.origin).parent / "data").glob("cifar10_*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([int(file.stem.split("_")[-1]) for file in files])
    assert len(files) == 20
    assert embedded_accuracy(as_floats(torch.from_numpy(pixels).permute(0, 3, 1, 2)), labels) > 0.3


@pytest.mark.skipif(not CIFAR.exists(), reason="the CIFAR-10 zip is not beside the checkout")
def test_the_embedded_library_reads_cifar_test_images_about_as_well_as_it_claims() -> None:
    from training.data import read_split

    images = read_split(CIFAR).test.balanced(500)
    claims = [claim.value for entry in open_library().entries for claim in entry.claims if claim.metric == "clean"]
    accuracy = embedded_accuracy(as_floats(images.pixels), images.labels)
    print(f"\nmean of all tickets on 500 test images: {100 * accuracy:.1f} %")
    assert accuracy > min(claims) - 0.05
