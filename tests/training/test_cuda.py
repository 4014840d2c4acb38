"""A search on CUDA. No GPU is needed: see tests/support/pretend_cuda.py. Its bits are those of the CPU."""

from pathlib import Path
from typing import Any, Final

import pytest
import torch

from model_store.structures import StructureName
from tests.support.digits import few_digits
from tests.support.pretend_cuda import pretend_cuda
from tests.support.searches import CPU, TINY, same
from training import evaluation
from training.evaluation import Measurement, measure
from training.recipes import PRESETS, TrainConfig
from training.search import Search

WIDTHS: Final[dict[StructureName, int]] = {"resnet18": 8, "wideresnet32": 1}


def recipe_of(preset: str, structure: StructureName) -> TrainConfig:
    """The preset's recipe on few small batches, adversarial from the first step."""
    changes: dict[str, Any] = {
        "batch": 4,
        "steps": 8,
        "clean_until": 0.0,
        "ramp_until": 0.0,
        "width": WIDTHS[structure],
    }
    return PRESETS[preset].recipe(structure, 0.3, 600, **changes)


def train(recipe: TrainConfig, device: torch.device, folder: Path) -> Search:
    """Two steps in each phase, and a checkpoint between them."""
    search = Search(recipe, few_digits(), device)
    search.train_step()
    search.train_step()
    search.save(folder / f"{device.type}.safetensors")
    resumed = Search(recipe, few_digits(), device)
    resumed.load(folder / f"{device.type}.safetensors")
    if recipe.mask_steps < recipe.steps:
        resumed.step = recipe.mask_steps
        resumed.train_step()
        resumed.train_step()
    return resumed


@pytest.mark.parametrize("structure", WIDTHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_search_step_runs_on_cuda(preset: str, precision: str, structure: StructureName, tmp_path: Path) -> None:
    recipe = recipe_of(preset, structure)
    recipe = TrainConfig(**{**vars(recipe), "precision": precision})
    cpu_state = train(recipe, CPU, tmp_path).state_dict()
    with pretend_cuda() as cuda:
        cuda_state = train(recipe, cuda, tmp_path).state_dict()
        on_cpu = {name for name, tensor in cuda_state.items() if tensor.device != cuda}
        assert {name.partition("/")[0] for name in on_cpu} <= {"mask"}  # packed into bytes
    assert cpu_state.keys() == cuda_state.keys()
    assert [name for name in cpu_state if not torch.equal(cpu_state[name], cuda_state[name])] == []


def test_the_guard_the_ticket_and_its_claims_run_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = evaluation.PGD20.model_copy(update={"steps": 2})
    monkeypatch.setattr(
        evaluation, "MEASUREMENTS", (Measurement("test", 20, None), Measurement("selection", 20, attacked))
    )

    def finish(device: torch.device) -> tuple[Search, Path]:
        search = Search(TINY, few_digits(), device)
        search.train_step()
        return search, tmp_path / f"{device.type}.json"

    search, memo = finish(CPU)
    expected, ticket = search.check_overfit(), search.ticket()
    claims = measure(ticket, few_digits(), "digits", CPU, memo)
    with pretend_cuda() as cuda:
        search, memo = finish(cuda)
        assert search.check_overfit() == expected
        assert same(search.ticket(), ticket)
        assert measure(ticket, few_digits(), "digits", cuda, memo) == claims
