"""The OpenVINO backend, for CPUs: each ticket compiled for one core, for one image and for two.

The batch is fixed: a graph with a dynamic batch pays about a millisecond whenever the batch changes. The input stays in
place, which saves most of a call's overhead.

Two images at most, because most of the gain is there. On AVX2 cores a compact ticket costs a tenth to a fifth less per
image in pairs, and a twentieth less again in fours. On AVX-512 cores the batch hardly matters. Every further batch is
another copy of all weights, in memory and in the cache: with two or three images a ticket, fours were no faster.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from model_store.quiet_imports import import_openvino
from model_store.structures import BasicBlock, Norm, WideBlock
from service.engine.base import (
    BFLOAT16_TOLERANCE,
    INT8_TOLERANCE,
    TOLERANCE,
    Backend,
    FoldedTicket,
    Images,
    Logits,
    Precision,
)
from service.engine.errors import EngineRejected
from service.engine.int8 import quantize

openvino = import_openvino()
ops = openvino.opset13
Node = Any  # openvino.Node and openvino.Output, which have no stubs

BATCHES: Final = (1, 2)
ONE_CORE: Final[dict[str, Any]] = {
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",  # never left to OpenVINO, which would choose by the processor
    "ENABLE_CPU_PINNING": False,
}
TOLERANCES: Final[Mapping[Precision, float]] = {
    "float32": TOLERANCE,
    "bfloat16": BFLOAT16_TOLERANCE,
    "int8": INT8_TOLERANCE,
}


def build(
    tickets: Sequence[FoldedTicket],
    *,
    cache: Path | None,
    threads: int,
    precision: Precision = "float32",
    calibration: Images | None = None,
) -> Backend:
    """Compiles every ticket.

    cache: a folder of compiled models, read and added to. OpenVINO tells them apart by weights, options and version.
        A model from there is checked like any other.
    calibration: images to choose the ranges of 8 bits by; needed for int8 alone.
    """
    core = openvino.Core()
    options = ONE_CORE | ({"INFERENCE_PRECISION_HINT": "bf16"} if precision == "bfloat16" else {})
    if cache is not None:
        options["CACHE_DIR"] = str(cache)
    with ThreadPoolExecutor(threads, "compile") as pool:
        models = list(pool.map(lambda ticket: Compiled(core, ticket, options, calibration), tickets))
    note = f"{precision}, OpenVINO {version()}"
    return Backend(lambda member, images: models[member].forward(images), TOLERANCES[precision], note)


def version() -> str:
    return str(openvino.__version__).split("-", maxsplit=1)[0]


class Compiled:
    """One ticket, compiled for each of BATCHES. Its lock is contended only when two batches run the same ticket."""

    def __init__(self, core: Any, ticket: FoldedTicket, options: dict[str, Any], calibration: Images | None) -> None:
        model = graph(ticket)
        try:
            if calibration is not None:
                model = quantize(core, model, calibration, ONE_CORE)
            name_nodes(model)
            self.batches = {size: Batch(core, model, size, ticket.input.shape, options) for size in BATCHES}
        except RuntimeError as error:  # the first line of OpenVINO's text says where in its sources it failed
            raise EngineRejected(f"OpenVINO cannot compile {ticket.name}: {str(error).splitlines()[0]}") from error
        self.classes = self.batches[1].output.shape[1]
        self.lock = threading.Lock()

    def forward(self, images: Images) -> Logits:
        logits = np.empty((len(images), self.classes), np.float32)
        with self.lock:
            for start, size in split(len(images)):
                logits[start : start + size] = self.batches[size].forward(images[start : start + size])
        return logits


def split(count: int) -> Iterator[tuple[int, int]]:
    """So many images cut into BATCHES, the largest first: (index of the first, size)."""
    start = 0
    for size in sorted(BATCHES, reverse=True):
        while count - start >= size:
            yield start, size
            start += size


class Batch:
    """A compiled graph of a fixed batch, with an input and an output that stay in place."""

    def __init__(self, core: Any, model: Any, size: int, shape: tuple[int, int, int], options: dict[str, Any]) -> None:
        model.reshape([size, *shape])
        self.request = core.compile_model(model, "CPU", options).create_infer_request()
        self.input = np.zeros((size, *shape), np.uint8)
        self.request.set_input_tensor(openvino.Tensor(self.input, shared_memory=True))
        self.output = self.request.get_output_tensor().data

    def forward(self, images: Images) -> Logits:
        """What is returned is overwritten by the next call."""
        self.input[:] = images
        self.request.infer()
        output: Logits = self.output
        return output


# From torch's module to OpenVINO's graph, layer by layer. `openvino.convert_model` gives the same graph, but traces
# through torch.jit: two or three seconds a ticket against 20 ms.


def graph(ticket: FoldedTicket) -> Any:
    """uint8 [1, 3, H, W] -> calibrated logits float32 [1, classes]."""
    network = ticket.network
    pixels = ops.parameter([1, *ticket.input.shape], np.uint8)
    images = ops.divide(ops.convert(pixels, np.float32), ops.constant(np.float32(255)))
    images = ops.divide(ops.subtract(images, constant(network.pixel_mean)), constant(network.pixel_std))
    features = layer(network.head, layer(network.stages, layer(network.stem, images)))
    pooled = ops.reduce_mean(features, np.array([2, 3]), keep_dims=True)
    logits = ops.reshape(layer(network.classifier, pooled), np.array([0, -1]), special_zero=True)
    return openvino.Model([ops.divide(logits, ops.constant(np.float32(ticket.temperature)))], [pixels])


def name_nodes(model: Any) -> None:
    """Gives every node a name that is the same in every process.

    OpenVINO's own names count all nodes of the process, and it finds compiled models on disk by their names, too.
    """
    for number, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(str(number))
    model.input().get_tensor().set_names({"pixels"})
    model.output().get_tensor().set_names({"logits"})


def layer(module: nn.Module, x: Node) -> Node:
    """`module` on the node x. A kind of layer that is not listed is a KeyError."""
    return LAYERS[type(module)](module, x)


def constant(tensor: Tensor) -> Node:
    return ops.constant(tensor.detach().numpy())


def convolution(conv: nn.Conv2d, x: Node) -> Node:
    pads = list(cast("tuple[int, int]", conv.padding))
    y = ops.convolution(x, constant(conv.weight), list(conv.stride), pads, pads, list(conv.dilation))
    return y if conv.bias is None else ops.add(y, constant(conv.bias.view(1, -1, 1, 1)))


def max_pool(module: nn.MaxPool2d, x: Node) -> Node:
    stride, pad, kernel = ([int(side)] * 2 for side in (module.stride, module.padding, module.kernel_size))  # type: ignore[arg-type]
    return ops.max_pool(x, stride, [1, 1], pad, pad, kernel).output(0)


def norm(module: Norm, x: Node) -> Node:
    scale = torch.rsqrt(module.get_buffer("running_var") + module.eps).view(1, -1, 1, 1)
    shift = -module.get_buffer("running_mean").view(1, -1, 1, 1) * scale
    return ops.add(ops.multiply(x, constant(scale)), constant(shift))


def basic_block(block: BasicBlock, x: Node) -> Node:
    inside = ops.relu(layer(block.norm1, layer(block.conv1, x)))
    inside = layer(block.norm2, layer(block.conv2, inside))
    return ops.relu(ops.add(inside, layer(block.shortcut, x)))


def wide_block(block: WideBlock, x: Node) -> Node:
    active = ops.relu(layer(block.norm1, x))
    inside = ops.relu(layer(block.norm2, layer(block.conv1, active)))
    shortcut = x if block.shortcut is None else layer(block.shortcut, active)
    return ops.add(layer(block.conv2, inside), shortcut)


LAYERS: Final[Mapping[type[nn.Module], Callable[[Any, Node], Node]]] = {
    nn.Conv2d: convolution,
    Norm: norm,
    nn.ReLU: lambda _, x: ops.relu(x),
    nn.MaxPool2d: max_pool,
    nn.Identity: lambda _, x: x,
    nn.Sequential: lambda modules, x: reduce(lambda y, module: layer(module, y), modules, x),
    BasicBlock: basic_block,
    WideBlock: wide_block,
}
