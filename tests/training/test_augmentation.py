import torch

from training.augmentation import augment
from training.seeding import make_generator


def test_crops_and_mirror_images_are_the_image_s_own_pixels() -> None:
    images = torch.arange(2 * 32 * 32, dtype=torch.float32).view(2, 1, 32, 32) + 1
    out = augment(images, make_generator(5))
    assert out.shape == images.shape
    for before, after in zip(images, out, strict=True):
        shown = after[after > 0]
        assert set(shown.tolist()) <= set(before.flatten().tolist())
        assert len(set(shown.tolist())) == shown.numel()  # no pixel twice
