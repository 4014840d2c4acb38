"""The two optimisers of a search: SGD, and Muon for layers that a norm layer follows."""

import torch
from torch import Tensor


class Momentum:
    """One momentum buffer a layer, by the layer's name."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.buffers: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> Tensor:
        """The layer's buffer, decayed and with this gradient in it. Changes the buffer in place."""
        before = self.buffers.get(name)
        self.buffers[name] = gradient if before is None else before.mul_(self.decay).add_(gradient)
        return self.buffers[name]

    def clear(self) -> None:
        self.buffers = {}


def sgd_step(value: Tensor, gradient: Tensor, momentum: Momentum, name: str, *, rate: float, decay: float) -> None:
    """SGD with momentum and weight decay. Changes `value` in place."""
    value.sub_(momentum.add(name, gradient.add(value, alpha=decay)), alpha=rate)


def muon_direction(gradient: Tensor, momentum: Momentum, name: str) -> Tensor:
    """Muon's direction (Jordan et al., 2024): the Nesterov momentum of a weight [out, in, h, w], orthogonalised."""
    ahead = gradient.add(momentum.add(name, gradient), alpha=momentum.decay)
    return orthogonalize(ahead.flatten(1)).view_as(gradient)


def relative_step(value: Tensor, direction: Tensor, share: float) -> None:
    """Moves `value` in place against the direction, by a share of its own norm."""
    value.sub_(direction, alpha=float(share * value.norm() / (direction.norm() + 1e-12)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the nearest matrix [m, n] with orthonormal rows or columns: every singular value near 1.

    Five steps of a Newton-Schulz iteration with Muon's coefficients, which trade exactness for speed: singular values
    end between 0.7 and 1.2 (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024). Only for
    IEEE float32: iterated on the small square, it goes astray in bfloat16 and in TF32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix) / (matrix.norm() + 1e-12)
    square = x @ x.T  # every step is a polynomial of it times x: iterated on the small square alone
    product = identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
    for _ in range(5):
        step = a * identity + b * square + c * square @ square
        product = step @ product
        square = step @ square @ step
    x = product @ x
    return x.T if tall else x
