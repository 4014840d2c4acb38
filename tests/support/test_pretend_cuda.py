"""The rules of placement that tests pretend are CUDA's: FakeTensorMode, which torch keeps, refuses the same calls."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tests.support.pretend_cuda import CUDA, DeviceMismatch, pretend_cuda

Operation = Callable[[Tensor, Tensor], Any]


def assign(target: Tensor, index: Any, value: Any) -> Tensor:
    target[index] = value
    return target


def whole(tensor: Tensor) -> Tensor:
    """Indices of rows, on the tensor's device."""
    return torch.zeros(3, dtype=torch.int64, device=tensor.device)


OPERATIONS: dict[str, Operation] = {
    "sum": lambda a, b: a + b,
    "scalar": lambda a, b: a + b[0, 0],
    "scalar on the left": lambda a, b: b[0, 0] * a,
    "in place": lambda a, b: a.add_(b),
    "in place, scalar": lambda a, b: a.mul_(b[0, 0]),
    "product": lambda a, b: a @ b,
    "stack": lambda a, b: torch.stack([a, b]),
    "cat": lambda a, b: torch.cat([a, b]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where, condition": lambda a, b: torch.where(b > 0, a, a),
    "where, scalar": lambda a, b: torch.where(a > 0, a, b[0, 0]),
    "maximum": torch.maximum,
    "gather": lambda a, b: a.gather(0, whole(b).view(1, 3)),
    "index_add": lambda a, b: a.index_add_(0, whole(a), b),
    "assign a block": lambda a, b: assign(a, slice(0, 3), b),
    "assign rows": lambda a, b: assign(a, whole(a), b),
    "assign a scalar": lambda a, b: assign(a, whole(a), b[0, 0]),
    "copy": lambda a, b: a.copy_(b),
    "move": lambda a, b: a.to(b) + b,
    "new": lambda a, b: a.new_zeros(3, 3) + b,
    "like": lambda a, b: torch.zeros_like(a) + b,
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "cross entropy": lambda a, b: functional.cross_entropy(a, whole(b)),
    "linear": functional.linear,
    "batch norm": lambda a, b: functional.batch_norm(a, b[0], b[0].abs() + 1),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("places", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_torch_s_own_fake_tensors_refuse_the_same_calls(name: str, places: tuple[str, str]) -> None:
    operation, devices = OPERATIONS[name], []
    for mode in (FakeTensorMode(), pretend_cuda()):
        with mode:
            first, second = (torch.rand(3, 3).to(place) for place in places)
            try:
                devices.append(operation(first, second).device.type)
            except RuntimeError:
                devices.append("refused")
    assert devices[0] == devices[1]


def test_indices_are_on_the_cpu_or_where_the_indexed_tensor_is() -> None:
    """Real CUDA tensors refuse the last of these; fake ones do not."""
    with pretend_cuda() as cuda:
        values, index = torch.ones(2), torch.zeros(1, dtype=torch.int64)
        assert values.to(cuda)[index].device == values.to(cuda)[index.to(cuda)].device == cuda
        assert values.to(cuda)[values > 0].device == cuda
        with pytest.raises(DeviceMismatch, match="indices should be on the CPU"):
            values[index.to(cuda)]


def test_what_needs_the_cpu_is_refused() -> None:
    with pretend_cuda() as cuda:
        tensor = torch.ones(2, device=cuda)
        for use in (Tensor.numpy, np.asarray):
            with pytest.raises(DeviceMismatch, match="copy it to the CPU"):
                use(tensor)
        assert tensor.cpu().numpy().tolist() == tensor.tolist() == [1, 1]
        with pytest.raises(DeviceMismatch, match="generator"):
            torch.rand(2, device=cuda, generator=torch.Generator())


def test_parameters_gradients_rows_and_copies_are_where_their_tensors_are() -> None:
    with pretend_cuda() as cuda:
        layer = nn.Conv2d(3, 4, 3)
        assert layer.weight.device.type == "cpu"
        layer = deepcopy(layer.to(memory_format=torch.channels_last).to(cuda)).double()
        images = torch.rand(2, 3, 8, 8, dtype=torch.float64).to(cuda).requires_grad_(True)
        layer(images).sum().backward()
        (gradient,) = torch.autograd.grad(layer(images).sum(), images)
        tensors = [layer.weight, layer.weight.grad, layer.weight.data, gradient, *gradient, *gradient.max(dim=0)]
        tensors += [images.detach(), nn.Parameter(gradient), layer.state_dict()["bias"]]
        assert {tensor.device for tensor in tensors if tensor is not None} == {CUDA}


def test_nothing_of_it_is_left_behind() -> None:
    with pretend_cuda() as cuda:
        tensor = torch.ones(2, device=cuda)
    assert tensor.device.type == "cpu"
    assert "_make_subclass" not in vars(Tensor)
    assert isinstance(torch.autocast, type)
