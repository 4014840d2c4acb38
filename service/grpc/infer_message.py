"""An inference request of the Open Inference Protocol as a gRPC message, and its answer.

Names, shapes and types are read by the code of the REST form. Sizes are compared before anything is converted.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from model_store.images import Pixels
from model_store.json_object import Json
from service.errors import BadRequest, ErrorMessage
from service.grpc.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from service.web import infer_request
from service.web.infer_request import InferRequest, ModelSpec

CONTENTS: Final = {
    "BYTES": "bytes_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
}
LIMITS: Final = {"UINT8": (255, ErrorMessage.V2_DATA_UINT8), "FP32": (1, ErrorMessage.V2_DATA_FP32)}


def parse(data: bytes) -> Any:
    """Raises BadRequest."""
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError:
        raise BadRequest(ErrorMessage.GRPC_MESSAGE) from None


def read_inference(message: Any, model: ModelSpec) -> InferRequest:
    """Raises BadRequest, ContentTooLarge."""
    parameters = infer_request.parameters_of({"parameters": parameters_of(message)})
    binary = len(message.raw_input_contents) > 0
    outputs = [{"name": output.name, "parameters": parameters_of(output)} for output in message.outputs]
    return InferRequest(
        images=read_input(message, model),
        outputs=infer_request.read_outputs(outputs, binary, model),
        id=infer_request.read_id({"id": message.id or None}),
        timeout_s=infer_request.read_timeout(parameters),
    )


def parameters_of(owner: Any) -> Json:
    """As the REST form has them."""
    values = {name: each.WhichOneof("parameter_choice") for name, each in owner.parameters.items()}
    return {name: getattr(owner.parameters[name], kind) for name, kind in values.items() if kind is not None}


def read_input(message: Any, model: ModelSpec) -> Sequence[bytes] | Pixels:
    if len(message.inputs) != 1 or message.inputs[0].name not in ("image", "pixels"):
        raise BadRequest(ErrorMessage.V2_INPUTS)
    (tensor,) = message.inputs
    described = {"datatype": tensor.datatype, "shape": list(tensor.shape), "parameters": parameters_of(tensor)}
    if any(name.startswith("shared_memory") for name in infer_request.parameters_of(described)):
        raise BadRequest(ErrorMessage.V2_SHARED_MEMORY)
    if tensor.HasField("contents") == bool(message.raw_input_contents) or len(message.raw_input_contents) > 1:
        raise BadRequest(ErrorMessage.GRPC_CONTENTS)
    if message.raw_input_contents:
        source = memoryview(message.raw_input_contents[0])
        if tensor.name == "image":
            return infer_request.read_images(described, source, model.max_images)
        return infer_request.read_pixels(described, source, model)
    values = typed_contents(tensor)
    if tensor.name == "image":
        return typed_images(described, values, model.max_images)
    return typed_pixels(described, values, model)


def typed_contents(tensor: Any) -> Sequence[Any]:
    """The one list of contents that the datatype calls for."""
    if tensor.datatype in ("FP16", "BF16"):
        raise BadRequest(ErrorMessage.V2_HALF_JSON)
    name = CONTENTS.get(tensor.datatype)
    if name is None or [field.name for field, _ in tensor.contents.ListFields()] not in ([name], []):
        raise BadRequest(ErrorMessage.V2_DATATYPE)
    values: Sequence[Any] = getattr(tensor.contents, name)
    return values


def typed_images(described: Json, values: Sequence[bytes], max_images: int) -> list[bytes]:
    if described["datatype"] != "BYTES":
        raise BadRequest(ErrorMessage.V2_DATATYPE)
    count = infer_request.rows_of(described, [(), (1,)], BadRequest(ErrorMessage.V2_SHAPE_IMAGE), max_images)
    if len(values) != count:
        raise BadRequest(ErrorMessage.V2_DATA)
    return [infer_request.as_file(value) for value in values]


def typed_pixels(described: Json, values: Sequence[float], model: ModelSpec) -> Pixels:
    """uint8 [N, 3, H, W]."""
    datatype, shape = described["datatype"], model.input.shape
    if datatype not in LIMITS:
        raise BadRequest(ErrorMessage.V2_DATATYPE)
    wrong = BadRequest(ErrorMessage.V2_SHAPE_PIXELS, height=shape[1], width=shape[2])
    count = infer_request.rows_of(described, [shape], wrong, model.max_images)
    if len(values) != count * math.prod(shape):
        raise BadRequest(ErrorMessage.V2_DATA)
    flat = np.fromiter(values, np.uint32 if datatype == "UINT8" else np.float32, len(values))
    most, text = LIMITS[datatype]
    if not ((flat >= 0) & (flat <= most)).all():  # NaN is neither
        raise BadRequest(text)
    pixels = flat.astype(np.uint8) if datatype == "UINT8" else infer_request.quantise(flat)
    return pixels.reshape(count, *shape)


def describe(head: Json, tensors: Iterable[tuple[str, np.ndarray[Any, Any], str, bytes | None]]) -> Any:
    """The answer. tensors: name, values, datatype, and the values' bytes where the client sent raw contents, too."""
    response = ModelInferResponse(**head)
    for name, values, datatype, raw in tensors:
        output = response.outputs.add(name=name, datatype=datatype, shape=values.shape)
        if raw is not None:
            response.raw_output_contents.append(raw)
            continue
        rows = values.ravel().tolist()
        items = [str(row).encode() for row in rows] if datatype == "BYTES" else rows
        getattr(output.contents, CONTENTS[datatype]).extend(items)
    return response
