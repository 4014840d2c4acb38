"""A ticket's graph in 8 bits: the input and the weights of every convolution are rounded to 256 levels.

OpenVINO does the rest. Ranges go from the smallest to the largest value that calibration images reach. Tickets lose
several points of accuracy where outliers are cut off, as NNCF does by default.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model_store.quiet_imports import import_openvino
from service.engine.base import Images
from service.engine.levels import LEVELS, SMALLEST, WEIGHT_LEVELS, with_zero

openvino = import_openvino()
ops = openvino.opset13
Node = Any  # openvino.Node and openvino.Output, which have no stubs

BATCH: Final = 32  # calibration images of one forward pass


def quantize(core: Any, model: Any, images: Images, options: dict[str, Any]) -> Any:
    """Changes the model and returns it. model: uint8 [1, 3, H, W] -> logits.  images: uint8 [N, 3, H, W]."""
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    sources = [node.input(0).get_source_output() for node in convolutions]
    inputs = {name_of(source): source for source in sources}  # a block's first convolution and its shortcut share one
    lows, highs = activation_ranges(core, model, list(inputs.values()), images, options)
    rounded = {
        name: fake_quantize(source, *with_zero(low, high), LEVELS)
        for (name, source), low, high in zip(inputs.items(), lows.tolist(), highs.tolist(), strict=True)
    }
    for node, source in zip(convolutions, sources, strict=True):
        node.input(0).replace_source_output(rounded[name_of(source)])
        weights = node.input(1).get_source_output()
        largest = np.abs(weights.get_node().data).max(axis=(1, 2, 3), keepdims=True).clip(SMALLEST)
        node.input(1).replace_source_output(fake_quantize(weights, -largest, largest, WEIGHT_LEVELS))
    model.validate_nodes_and_infer_types()
    return model


def name_of(output: Node) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


def activation_ranges(
    core: Any, model: Any, inputs: list[Node], images: Images, options: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest value of each node, over all images."""
    axes = np.array([0, 1, 2, 3])
    extremes = [reduce(node, axes) for reduce in (ops.reduce_min, ops.reduce_max) for node in inputs]
    probe = openvino.Model(extremes, model.get_parameters()).clone()
    probe.reshape([-1, *images.shape[1:]])
    request = core.compile_model(probe, "CPU", options).create_infer_request()
    ranges = []
    for start in range(0, len(images), BATCH):
        request.infer([np.ascontiguousarray(images[start : start + BATCH])])
        ranges.append([float(tensor.data) for tensor in request.output_tensors])
    values = np.array(ranges).reshape(len(ranges), 2, len(inputs))
    return values[:, 0].min(axis=0), values[:, 1].max(axis=0)


def fake_quantize(x: Node, low: Any, high: Any, count: int) -> Node:
    """x rounded to `count` values from low to high."""
    low, high = ops.constant(np.float32(low)), ops.constant(np.float32(high))
    return ops.fake_quantize(x, low, high, low, high, count).output(0)
