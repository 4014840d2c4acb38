import pytest
import torch

from training.augmentation import augment
from training.seeding import make_generator


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (48, 64), (96, 96)])
def test_crops_and_mirror_images_are_the_image_s_own_pixels(size: tuple[int, int]) -> None:
    images = torch.arange(2 * size[0] * size[1], dtype=torch.float32).view(2, 1, *size) + 1
    out = augment(images, make_generator(5))
    assert out.shape == images.shape
    for before, after in zip(images, out, strict=True):
        shown = after[after > 0]
        assert set(shown.tolist()) <= set(before.flatten().tolist())
        assert len(set(shown.tolist())) == shown.numel()  # no pixel twice


@pytest.mark.parametrize(("size", "most"), [((32, 32), (4, 4)), ((28, 28), (3, 3)), ((48, 64), (6, 8))])
def test_crops_are_shifted_by_up_to_an_eighth_of_each_side(size: tuple[int, int], most: tuple[int, int]) -> None:
    out = augment(torch.ones(400, 1, *size), make_generator(1))
    shifts = [(out.sum(dim=(1, 3 - axis)) == 0).sum(dim=1).max().item() for axis in (0, 1)]
    assert tuple(shifts) == most
