import torch

from training.optimizers import orthogonalize
from training.seeding import make_generator


def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values() -> None:
    for shape in ((16, 27), (64, 16), (32, 32)):
        matrix = torch.randn(shape, generator=make_generator(9))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        levelled = left.T @ orthogonalize(matrix) @ right.T
        assert torch.allclose(levelled, torch.diag(levelled.diag()), atol=1e-4)
        assert 0.5 < float(levelled.diag().min()) <= float(levelled.diag().max()) < 1.3
