"""CUDA's rules of placement on a machine without a GPU.

Tensors keep their values, on the CPU, and carry a mark that says where they would be. Every call of torch is looked at
before it runs: operands that CUDA would refuse to mix raise as they would there. Since values are real, code that
looks at them runs to its end, and what it gives can be compared with the CPU's. FakeTensorMode knows the same rules
and no values; tests/support/test_pretend_cuda.py compares the two.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU: Final = torch.device("cpu")
CUDA: Final = torch.device("cuda", 0)
MARK: Final = "pretended_device"
FREE_BYTES: Final = 2**31  # of the pretended card's memory

MOVES: Final = {"to", "cpu", "cuda", "copy_", "type_as", "load_state_dict"}  # these may mix devices
OF_MODULE_TO: Final = ("_parse_to", "_has_compatible_shallow_copy_type")
LEAVES: Final = {"numpy", "__array__"}  # these need the CPU
Handler = Callable[..., Any]


class DeviceMismatch(RuntimeError):
    """What CUDA would have refused."""


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor would be."""
    return getattr(tensor, MARK, CPU)


class PretendCuda(TorchFunctionMode):
    """Inside it `device="cuda"` can be used. As all modes of torch do, it holds for the thread that entered it."""

    def __torch_function__(
        self, function: Handler, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        descriptor = getattr(function, "__self__", None)  # of a property such as Tensor.device
        kind, name = getattr(function, "__name__", ""), getattr(descriptor, "__name__", "")
        if kind == "__get__" and name in ("device", "is_cuda"):
            place = device_of(args[0])
            return place if name == "device" else place == CUDA
        if kind == "__set__" and name == "data":
            function(*args)
            setattr(args[0], MARK, device_of(args[1]))
            return None
        if kind in OF_MODULE_TO or function is torch.device:
            return function(*args, **kwargs)
        return run(function, kind, args, kwargs)


def run(function: Handler, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    place = destination(name, args, kwargs)
    if name in LEAVES and device_of(args[0]) == CUDA:
        raise DeviceMismatch(f"{name}: cannot convert a CUDA tensor to numpy; copy it to the CPU first")
    if place is None:
        place = common_device(name, args, operands)
    if (generator := kwargs.get("generator")) is not None and generator.device.type != place.type:
        raise DeviceMismatch(f"{name}: expected a {place.type!r} generator, found {generator.device.type!r}")
    result = function(*on_cpu(args), **on_cpu_by_name(kwargs))
    if name == "__iter__":
        return iter([marked(row, place, operands) for row in result])
    return marked(result, place, operands)


def marked(result: Any, place: torch.device, operands: Sequence[Tensor]) -> Any:
    """The result with its tensors marked. One that is an operand of another device becomes a copy."""
    if isinstance(result, Tensor):
        if any(result is operand for operand in operands):
            if device_of(result) == place:
                return result
            with torch._C.DisableTorchFunction():
                result = result.clone()
        setattr(result, MARK, place)
        return result
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            setattr(leaf, MARK, place)
    return result


def destination(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names, if it names one."""
    if name == "cpu":
        return CPU
    if name == "cuda":
        return CUDA
    if kwargs.get("device") is not None:
        return placed(kwargs["device"])
    if name == "to":
        other = kwargs.get("other", args[1] if len(args) > 1 else None)
        if isinstance(other, Tensor):
            return device_of(other)
        if isinstance(other, str | torch.device):
            return placed(other)
    if name == "type_as":
        return device_of(args[1])
    return None


def common_device(name: str, args: tuple[Any, ...], operands: Sequence[Tensor]) -> torch.device:
    """Where an operation runs. Raises DeviceMismatch."""
    if name in MOVES and args and isinstance(args[0], Tensor):
        return device_of(args[0])
    if name in ("__getitem__", "__setitem__", "index_put_"):
        return indexed_device(name, args)
    places = {device_of(tensor) for tensor in operands if tensor.dim() > 0}
    scalars = {device_of(tensor) for tensor in operands if tensor.dim() == 0}
    if len(places) > 1 or (places == {CPU} and CUDA in scalars):
        shapes = ", ".join(f"{device_of(t).type} {list(t.shape)}" for t in operands)
        raise DeviceMismatch(f"{name}: expected all tensors to be on the same device, found {shapes}")
    return CUDA if CUDA in places | scalars else CPU


def indexed_device(name: str, args: tuple[Any, ...]) -> torch.device:
    """Indices may be on the CPU, values of an assignment only where they are copied as a block."""
    place = device_of(args[0])
    indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
    if place == CPU and any(device_of(index) == CUDA for index in indices):
        raise DeviceMismatch(f"{name}: indices should be on the CPU, as the indexed tensor is")
    value = args[2] if len(args) > 2 else None
    advanced = any(index.dim() > 0 for index in indices)
    if isinstance(value, Tensor) and value.dim() > 0 and advanced and device_of(value) != place:
        raise DeviceMismatch(f"{name}: expected a value on {place.type}, found one on {device_of(value).type}")
    return place


def placed(device: Any) -> torch.device:
    return CUDA if torch.device(device).type == "cuda" else CPU


def on_cpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, each name of a device replaced by the CPU's."""
    return tuple(CPU if is_cuda_name(value) else value for value in args)


def on_cpu_by_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: CPU if is_cuda_name(value) else value for name, value in kwargs.items()}


def is_cuda_name(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


@contextmanager
def pretend_cuda() -> Iterator[torch.device]:
    """A GPU for the calling thread and for pools of threads: its device, its memory, and CPU autocast for CUDA's."""
    autocast, submit, subclass = torch.autocast, ThreadPoolExecutor.submit, Tensor._make_subclass

    def submit_there(pool: ThreadPoolExecutor, function: Handler, /, *args: Any, **kwargs: Any) -> Future[Any]:
        def call() -> Any:
            with PretendCuda():
                return function(*args, **kwargs)

        return submit(pool, call)

    def cpu_autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def make_subclass(cls: type, data: Tensor, requires_grad: bool = False) -> Tensor:
        made: Tensor = subclass(cls, data, requires_grad)
        setattr(made, MARK, device_of(data))
        return made

    def cuda_method(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor.to(CUDA)

    with (
        patch.object(torch, "autocast", cpu_autocast),
        patch.object(Tensor, "cuda", cuda_method),
        patch.object(Tensor, "_make_subclass", make_subclass),
        patch.object(ThreadPoolExecutor, "submit", submit_there),
        patch.object(torch.cuda, "mem_get_info", lambda _=None: (FREE_BYTES, FREE_BYTES)),
        PretendCuda(),
    ):
        yield CUDA
