import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from model_store.structures import STRUCTURES
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


def test_no_two_tickets_of_a_preset_share_a_seed() -> None:
    make: Callable[..., TrainConfig] = PRESETS["compact"].recipe
    seeds = {make(name, density, 49_000).seed for name in STRUCTURES for density in DENSITIES}
    assert len(seeds) == 40
