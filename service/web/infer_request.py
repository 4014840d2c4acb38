"""An inference request of the Open Inference Protocol, from untrusted bytes: JSON, binary tensors, or one raw image.

Sizes are computed as Python integers and compared with what arrived before anything is allocated. Names, shapes and
types are compared with the model's and never used to look something up.
"""

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import numpy as np

from model_store.images import Pixels
from model_store.input_spec import InputSpec
from model_store.json_object import Json
from service.errors import BadRequest, ContentTooLarge, ErrorMessage
from service.web.body import parse_json, whole_number
from service.web.decoder import sniff

HEADER_LENGTH: Final = b"inference-header-content-length"
MAX_ID: Final = 256
MAX_PARAMETERS: Final = 64
ITEM_BYTES: Final = {"UINT8": 1, "FP32": 4}
BASE64_STARTS: Final = (b"ivbo", b"/9j/", b"_9j_", b"uklg", b"data:")  # of PNG, JPEG and WebP, in lower case
URL_SAFE_AS_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
SPACES: Final = b" \t\r\n"
INPUT_KEYS: Final = frozenset(("name", "shape", "datatype", "parameters", "data"))


@dataclass(frozen=True)
class RequestedOutput:
    """One requested output. classes: of the classification extension; 0 for the tensor itself."""

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """images: encoded files, or uint8 [N, 3, H, W].  timeout_s: None for the server's."""

    images: Sequence[bytes] | Pixels
    outputs: tuple[RequestedOutput, ...]
    id: str | None = None
    timeout_s: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """What a request is checked against. outputs: the names on offer."""

    outputs: tuple[str, ...]
    classes: int
    max_images: int
    input: InputSpec


def read_inference(body: bytes, headers: Mapping[bytes, bytes], model: ModelSpec) -> InferRequest:
    """Raises BadRequest, TooLarge."""
    length = len(body)
    if HEADER_LENGTH in headers:
        value = whole_number(headers[HEADER_LENGTH])
        if value is None or value > length:
            raise BadRequest(ErrorMessage.V2_HEADER_LENGTH)
        length = value
    if not body:
        raise BadRequest(ErrorMessage.EMPTY_BODY)
    if length == 0:
        return InferRequest([body], tuple(RequestedOutput(name, binary=True) for name in model.outputs))
    return from_json(parse_json(body[:length]), memoryview(body)[length:], model)


def from_json(header: Json, tail: memoryview, model: ModelSpec) -> InferRequest:
    parameters = parameters_of(header)
    binary = flag(parameters, "binary_data_output", default=False)
    return InferRequest(
        images=read_input(header.get("inputs"), tail, model),
        outputs=read_outputs(header.get("outputs"), binary, model),
        id=read_id(header),
        timeout_s=read_timeout(parameters),
    )


def read_id(header: Json) -> str | None:
    value = header.get("id")
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_ID or not encodable(value):
        raise BadRequest(ErrorMessage.V2_ID, limit=MAX_ID)
    return value


def encodable(text: str) -> bool:
    """Whether it is Unicode: JSON can spell half a surrogate pair, which no answer can carry."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def parameters_of(owner: Json) -> Json:
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or len(parameters) > MAX_PARAMETERS:
        raise BadRequest(ErrorMessage.V2_PARAMETERS, limit=MAX_PARAMETERS)
    if not all(isinstance(value, str | int | float) for value in parameters.values()):
        raise BadRequest(ErrorMessage.V2_PARAMETERS, limit=MAX_PARAMETERS)
    return parameters


def flag(parameters: Json, name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(ErrorMessage.V2_BINARY_FLAG)
    return value


def read_timeout(parameters: Json) -> float | None:
    """Microseconds on the wire, 0 for none, as Triton has it."""
    value = parameters.get("timeout", 0)
    if not is_whole(value) or value < 0:
        raise BadRequest(ErrorMessage.V2_TIMEOUT)
    return min(value, 10**12) / 1e6 if value else None


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Inputs


def read_input(inputs: Any, tail: memoryview, model: ModelSpec) -> Sequence[bytes] | Pixels:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise BadRequest(ErrorMessage.V2_INPUTS)
    tensor: Json = inputs[0]
    parameters = parameters_of(tensor)
    if any(name.startswith("shared_memory") for name in parameters):
        raise BadRequest(ErrorMessage.V2_SHARED_MEMORY)
    if not set(tensor) <= INPUT_KEYS:
        raise BadRequest(ErrorMessage.V2_INPUT_KEYS)
    size = parameters.get("binary_data_size")
    if (size is None) == ("data" not in tensor):
        raise BadRequest(ErrorMessage.V2_DATA_TWICE)
    expected = 0 if size is None else size
    if not is_whole(expected) or expected != len(tail):
        raise BadRequest(ErrorMessage.V2_BINARY_SIZE)
    source = tensor["data"] if size is None else tail
    if tensor.get("name") == "image":
        return read_images(tensor, source, model.max_images)
    if tensor.get("name") == "pixels":
        return read_pixels(tensor, source, model)
    raise BadRequest(ErrorMessage.V2_INPUTS)


def rows_of(tensor: Json, rest: Sequence[tuple[int, ...]], wrong: BadRequest, max_images: int) -> int:
    """N of a shape [N, *rest], for one of the given rests; 1 <= N <= max_images."""
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or not all(is_whole(size) for size in shape):
        raise wrong
    if shape[0] < 1 or tuple(shape[1:]) not in rest:
        raise wrong
    if shape[0] > max_images:
        raise ContentTooLarge(ErrorMessage.IMAGES_TOO_MANY, limit=max_images)
    return int(shape[0])


def read_images(tensor: Json, source: Any, max_images: int) -> list[bytes]:
    if tensor.get("datatype") != "BYTES":
        raise BadRequest(ErrorMessage.V2_DATATYPE)
    count = rows_of(
        tensor, [(), (1,)], BadRequest(ErrorMessage.V2_SHAPE_IMAGE), max_images
    )  # [N, 1]: clients that add a batch dimension
    if isinstance(source, memoryview):
        return [as_file(element) for element in split_elements(source, count)]
    texts = flatten(source, tensor["shape"])
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest(ErrorMessage.V2_DATA_BYTES)
    return [from_base64(text) for text in texts]


def split_elements(data: memoryview, count: int) -> list[bytes]:
    """`count` elements of a 4-byte little-endian length and as many bytes, which fill `data` exactly."""
    elements, at = [], 0
    for _ in range(count):
        if at + 4 > len(data):
            raise BadRequest(ErrorMessage.V2_BINARY_BYTES)
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if length > len(data) - at:
            raise BadRequest(ErrorMessage.V2_BINARY_BYTES)
        elements.append(bytes(data[at : at + length]))
        at += length
    if at != len(data):
        raise BadRequest(ErrorMessage.V2_BINARY_BYTES)
    return elements


def as_file(element: bytes) -> bytes:
    """Some clients send the base64 of their JSON as a binary element; no image begins with such characters."""
    if sniff(element) is None and element[:64].lstrip()[:5].lower().startswith(BASE64_STARTS):
        return from_base64(element)
    return element


def from_base64(text: str | bytes) -> bytes:
    """What base64 holds: of either alphabet (RFC 4648), in lines or in one, padded or not, or as a data URL (RFC 2397).

    Raises BadRequest.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
        data = data.translate(URL_SAFE_AS_STANDARD, SPACES)
        if data[:5].lower() == b"data:":
            data = data_of_url(data)
        if not data.endswith(b"="):
            data += b"=" * (-len(data) % 4)
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise BadRequest(ErrorMessage.BASE64) from None


def data_of_url(url: bytes) -> bytes:
    """The base64 of a data URL. Raises ValueError if it is encoded otherwise."""
    head, comma, data = url.partition(b",")
    if not comma or not head.lower().endswith(b";base64"):
        raise ValueError("no base64")
    return unquote_to_bytes(data).translate(URL_SAFE_AS_STANDARD, SPACES) if b"%" in data else data


def read_pixels(tensor: Json, source: Any, model: ModelSpec) -> Pixels:
    datatype = tensor.get("datatype")
    if datatype in ("FP16", "BF16"):
        raise BadRequest(ErrorMessage.V2_HALF_JSON)
    if datatype not in ("UINT8", "FP32"):
        raise BadRequest(ErrorMessage.V2_DATATYPE)
    shape = model.input.shape
    wrong = BadRequest(ErrorMessage.V2_SHAPE_PIXELS, height=shape[1], width=shape[2])
    count = rows_of(tensor, [shape], wrong, model.max_images)
    if isinstance(source, memoryview):
        if len(source) != count * model.input.numel * ITEM_BYTES[datatype]:
            raise BadRequest(ErrorMessage.V2_BINARY_SIZE)
        flat = np.frombuffer(source, np.uint8 if datatype == "UINT8" else "<f4")
    else:
        flat = from_numbers(flatten(source, tensor["shape"]), datatype)
    return (flat if datatype == "UINT8" else quantise(flat)).reshape(count, *shape)


def from_numbers(values: list[Any], datatype: str) -> np.ndarray[Any, Any]:
    """Types are checked one by one: numpy would read strings as numbers, cut fractions off and wrap around."""
    limit, wrong = (255, ErrorMessage.V2_DATA_UINT8) if datatype == "UINT8" else (1, ErrorMessage.V2_DATA_FP32)
    if not set(map(type, values)) <= {int, float} or min(values) < 0 or max(values) > limit:
        raise BadRequest(wrong)
    value = np.array(values, np.float32)
    if datatype == "FP32":
        return value
    if (value != np.rint(value)).any():  # 110.0 is fine: some clients write every number so
        raise BadRequest(wrong)
    return value.astype(np.uint8)


def quantise(values: np.ndarray[Any, Any]) -> Pixels:
    """Floats in [0, 1] to the nearest of the 256 levels that tickets were measured on."""
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise BadRequest(ErrorMessage.V2_DATA_FP32)
    return np.rint(values * np.float32(255)).astype(np.uint8)


def flatten(data: Any, shape: Sequence[int]) -> list[Any]:
    """The elements of `data`, flat already or nested exactly as `shape` says, in row-major order."""
    if not isinstance(data, list):
        raise BadRequest(ErrorMessage.V2_DATA)
    if len(data) == math.prod(shape) and not isinstance(data[0], list):
        return data
    level: list[Any] = [data]
    for size in shape:
        if not all(isinstance(part, list) and len(part) == size for part in level):
            raise BadRequest(ErrorMessage.V2_DATA)
        level = list(chain.from_iterable(level))
    return level


# Outputs


def read_outputs(outputs: Any, binary: bool, model: ModelSpec) -> tuple[RequestedOutput, ...]:
    """Those asked for, in that order; all of them where none are named."""
    if outputs is None or outputs == []:
        return tuple(RequestedOutput(name, binary) for name in model.outputs)
    if not isinstance(outputs, list) or len(outputs) > len(model.outputs):
        raise BadRequest(ErrorMessage.V2_OUTPUTS)
    value = tuple(read_output(output, binary, model) for output in outputs)
    if len({output.name for output in value}) != len(value):
        raise BadRequest(ErrorMessage.V2_OUTPUTS)
    return value


def read_output(output: Any, binary: bool, model: ModelSpec) -> RequestedOutput:
    if not isinstance(output, dict) or output.get("name") not in model.outputs:
        raise BadRequest(ErrorMessage.V2_OUTPUTS)
    parameters = parameters_of(output)
    if any(name.startswith("shared_memory") for name in parameters):
        raise BadRequest(ErrorMessage.V2_SHARED_MEMORY)
    classes = parameters.get("classification", 0)
    if not is_whole(classes) or classes < 0 or (classes and output["name"] != "probabilities"):
        raise BadRequest(ErrorMessage.V2_CLASSIFICATION)
    return RequestedOutput(output["name"], flag(parameters, "binary_data", default=binary), min(classes, model.classes))
