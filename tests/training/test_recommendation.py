import pytest

from training.recipes import CIFAR10_SEARCH, PRESETS
from training.recommendation import LONGEST, MOST_PASSES, fewest_passes, recommend

WIDE, COMPACT = PRESETS["wide"], PRESETS["compact"]


@pytest.mark.parametrize(
    ("hours", "preset", "epochs", "taken"),
    [
        (3.9, None, 0, 0),
        (4, COMPACT, 1, 4),
        (11.9, COMPACT, 11 / 3, 11.9),
        (12, WIDE, 1, 12),
        (22, WIDE, 2, 22),
        (500, WIDE, LONGEST, 42),
    ],
)
def test_width_comes_first_then_epochs(hours: float, preset: object, epochs: float, taken: float) -> None:
    """Wide takes 2 hours of claims and 10 of steps, compact 1 and 3; epochs here are in the preset's own."""
    costs = [(WIDE, 2.0, 10.0), (COMPACT, 1.0, 3.0)]
    best = recommend(hours, costs, CIFAR10_SEARCH)
    if preset is None:
        assert best is None
        return
    assert best is not None
    assert best.preset is preset
    if preset is WIDE:
        assert best.epochs == pytest.approx(epochs * WIDE.epochs)
        assert WIDE.dense is not None
        assert best.dense_epochs == pytest.approx(epochs * WIDE.dense["epochs"])
        assert best.taken == pytest.approx(taken)
    else:
        assert best.dense_epochs is None
        assert best.taken == pytest.approx(min(hours, taken))


def test_small_data_sets_are_passed_over_more_often() -> None:
    assert fewest_passes(2 * CIFAR10_SEARCH) == 1
    assert fewest_passes(CIFAR10_SEARCH // 2) == pytest.approx(2)
    assert fewest_passes(100) == MOST_PASSES
    best = recommend(1000, [(COMPACT, 0.0, 1.0)], 100)
    assert best is not None
    assert best.epochs == pytest.approx(COMPACT.epochs * MOST_PASSES)
