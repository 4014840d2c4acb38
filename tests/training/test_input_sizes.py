"""Searches on pictures of other sizes than CIFAR's, from a folder to a library."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_store.data_files import LOCAL
from model_store.input_spec import CIFAR10_INPUT
from model_store.labelled_images import open_data
from model_store.library import EMBEDDED, open_library
from model_store.structures import STRUCTURES
from tests.support.searches import CPU
from tombola.cli import main
from training.data import list_parts, read_split
from training.jobs import find_jobs
from training.recipes import PRESETS
from training.recommendation import RECOMMENDED
from training.search import Search


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve pictures of 80x60, by colour."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "pictures"
    for label, kind in enumerate(("blue", "green", "red")):
        (folder / kind).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 120, (60, 80, 3), np.uint8)
            pixels[..., 2 - label] += 100
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOMBOLA_CACHE", raising=False)


@pytest.mark.parametrize("size", [(28, 28), (37, 53), (48, 64), (96, 96), (224, 224)])
def test_every_structure_takes_steps_at_every_size_and_leaves_a_ticket_that_is_itself(
    size: tuple[int, int], pictures: Path
) -> None:
    split = read_split(pictures, spec=replace(CIFAR10_INPUT, height=size[0], width=size[1]))
    for name in STRUCTURES:
        fields = {"width": 8 if name.startswith("resnet") else 1, "steps": 2, "batch": 4}
        recipe = PRESETS["compact"].recipe(
            name, 0.3, len(split.search), 3, split.input, mask_share=1.0, precision="float32", **fields
        )
        search = Search(recipe, split, CPU)
        losses = [search.train_step()[0] for _ in range(2)]
        assert all(0 < loss < 20 for loss in losses)
        ticket = search.ticket()
        images = split.test.pixels.float() / 255
        assert ticket.input == split.input
        with torch.no_grad():
            expected = search.network.cpu().eval()(images)
            logits = ticket.network()(images)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_becomes_a_library_of_its_own_size_and_goes_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, library = tmp_path / "run", tmp_path / "library"
    search = ["search", "--data", str(pictures), "--state", str(state), "--size", "48x64", "--resize", "cover"]
    search += ["--only", "resnet18-30", "--workers", "1", "--set", "width=4", "steps=3", "batch=8"]
    assert main(search) == 0
    assert main(search) == 0
    assert capsys.readouterr().out.count("\n1 jobs done in") == 2
    (job,) = find_jobs(state)
    assert (job.recipe.structure.stem_stride, job.recipe.structure.stem_pool) == (2, 2)
    assert main(["export", str(library), "--state", str(state)]) == 0
    opened = open_library(library)
    assert opened.manifest.version == 2
    assert opened.classes == ("blue", "green", "red")
    assert opened.input == job.input
    assert (opened.input.height, opened.input.width, opened.input.resize) == (48, 64, "cover")
    assert 0.2 < min(opened.input.mean) < max(opened.input.mean) < 0.4

    more = ["search", "--data", str(pictures), "--state", str(tmp_path / "more"), "--from", str(library)]
    assert main([*more, "--size", "64"]) == 2
    assert "--size: settled by the tickets of" in capsys.readouterr().err
    assert main([*more, "--workers", "1", "--epochs", "1", "--set", "batch=8"]) == 0
    (again,) = find_jobs(tmp_path / "more")
    assert again.input == opened.input
    both = tmp_path / "both"
    assert main(["export", str(both), "--state", str(tmp_path / "more"), "--base", str(library)]) == 0
    assert open_library(both).input == opened.input


def test_a_data_set_of_another_size_or_of_other_classes_is_no_reason_for_nonsense(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = tmp_path / "arrays.npz"
    pixels, labels = np.zeros((40, 64, 64, 3), np.uint8), np.arange(40) % 2
    np.savez(arrays, images=pixels, labels=labels)
    state = ["--state", str(tmp_path / "run")]
    assert main(["search", "--data", str(arrays), *state]) == 2
    refusal = "images are uint8 [40, 64, 64, 3]; expected uint8 [N, 32, 32, 3]"
    assert refusal in capsys.readouterr().err
    of_ten = tmp_path / "of_ten.npz"
    np.savez(of_ten, images=pixels, labels=np.arange(40) % 10)
    for words in (
        ["search", "--data", str(of_ten), *state, "--from", str(EMBEDDED)],
        ["compare", str(EMBEDDED), "--data", str(of_ten)],
        ["audit", str(EMBEDDED), "--data", str(of_ten), "--profile", "smoke", "--out", str(tmp_path / "audit")],
    ):
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert refusal in line
    assert main(["search", "--data", str(pictures), *state, "--from", str(EMBEDDED)]) == 2
    assert f"classes blue, green, red; the library {EMBEDDED} has airplane" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["7", "1025", "64x", "x64", "64x64x3", "large", "-64", "6.4"])
def test_a_size_that_no_network_takes_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", f"--size={size}"])
    assert ended.value.code == 2
    assert f"{size}: expected a side such as 64, or 48x64, each from 8 to 1024" in capsys.readouterr().err


def test_a_plan_measures_a_data_set_on_this_machine(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = [
        replace(preset, widths=dict.fromkeys(preset.widths, 4), base={**preset.base, "batch": 8})
        for preset in RECOMMENDED
    ]
    monkeypatch.setattr("training.commands.RECOMMENDED", narrow)
    words = ["plan", "--data", str(pictures), "--size", "48x64", "--seconds", "0.01", "--workers", "3"]
    assert main([*words, "--epochs", "200", "--set", "width=4", "batch=8"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("│ 10 ") == 4
    assert "36 pictures of 3 classes: 27 for search, 6 for selection, 3 for test" in shown
    assert "input   3x48x64, squash, bilinear, mean (0." in shown
    assert "GB of decoded arrays" in shown
    assert re.search(r"\n40 tickets: [0-9.]+ hours in 3 processes of one thread on cpu, measured", shown)
    assert "Recommended for all forty tickets" in shown
    assert re.search(r"│ 72 +│ --preset (wide|compact) --epochs [0-9.]+", shown)
    assert main(["plan", "--data", "/nowhere"]) == 2
    assert "/nowhere: no such file or folder" in capsys.readouterr().err


def test_what_a_plan_counts_is_what_a_search_gets(pictures: Path) -> None:
    split = read_split(pictures)
    with open_data(pictures, LOCAL) as data:
        listed = list_parts(pictures, data)
    assert listed.sizes() == {"search": len(split.search), "selection": len(split.selection), "test": len(split.test)}
    assert listed.pictures == sum(listed.sizes().values()) == 36
