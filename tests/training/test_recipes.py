import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from model_store.input_spec import CIFAR10_INPUT
from model_store.structures import STRUCTURES, multiply_adds
from tests.support.searches import TINY
from training.errors import TrainingError
from training.recipes import DENSITIES, PRESETS, TrainConfig, mask_phase


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask_share": 1.0}, "never trained"),
        ({"mask_share": 0.0}, "never trained"),
        ({"parent": "0" * 64}, "went on from another ticket"),
        ({"mask_share": 0.3, "low_resolution_until": 0.0}, "before epsilon and resolution were whole"),
    ],
)
def test_a_recipe_without_a_whole_mask_phase_has_no_scratch_ticket(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        mask_phase(replace(TINY, **changes))  # type: ignore[arg-type]


def test_recipes_survive_json() -> None:
    for preset in PRESETS.values():
        recipe = preset.recipe("resnet34", 0.12, 49_000)
        assert TrainConfig.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    ("size", "compact", "paper"),
    [
        ((28, 28), (2, 1), (1, 1)),
        ((32, 32), (2, 1), (1, 1)),
        ((48, 64), (2, 2), (2, 1)),
        ((64, 64), (2, 2), (2, 1)),
        ((96, 96), (4, 2), (2, 2)),
        ((224, 224), (4, 4), (4, 2)),
        ((1024, 1024), (4, 16), (4, 8)),
        ((8, 8), (1, 1), (1, 1)),
    ],
)
def test_stems_keep_the_cost_of_any_size_near_that_of_32x32(
    size: tuple[int, int], compact: tuple[int, int], paper: tuple[int, int]
) -> None:
    spec = replace(CIFAR10_INPUT, height=size[0], width=size[1])
    for preset, stem in ((PRESETS["compact"], compact), (PRESETS["paper"], paper)):
        for name in STRUCTURES:
            structure = preset.structure(name, 10, spec)
            assert (structure.stem_stride, structure.stem_pool) == stem
            if size[0] <= 224:
                assert multiply_adds(structure, size) < 2.5 * multiply_adds(preset.structure(name), (32, 32))


def test_a_stem_that_is_given_by_hand_stays() -> None:
    spec = replace(CIFAR10_INPUT, height=64, width=64)
    recipe = PRESETS["compact"].recipe("resnet18", 0.1, 100, 10, spec, stem_stride=4, stem_pool=1)
    assert str(recipe.structure) == "resnet18·16/4"


def test_the_recipes_of_cifar_10_have_the_digests_that_they_always_had() -> None:
    """Checkpoints go on only under them."""
    structures = {
        name: preset.recipe("resnet34", 0.12, 49_000).as_dict()["structure"] for name, preset in PRESETS.items()
    }
    assert structures["compact"] == {"name": "resnet34", "width": 16, "classes": 10, "stem_stride": 2}
    assert structures["paper"] == {"name": "resnet34", "width": 64, "classes": 10, "stem_stride": 1}


def test_no_two_tickets_of_a_preset_share_a_seed() -> None:
    make: Callable[..., TrainConfig] = PRESETS["compact"].recipe
    seeds = {make(name, density, 49_000).seed for name in STRUCTURES for density in DENSITIES}
    assert len(seeds) == 40
