"""Coverage-guided fuzzing of everything that reads untrusted bytes: images, JSON, tensors, packing, headers.

    pip install "atheris>=3,<4"
    python tools/fuzz/fuzz_edge.py -max_total_time=600 -rss_limit_mb=4096 -timeout=5

The arguments are libFuzzer's. An input must lead to an answer, or to a refusal with a text of the catalogue. Otherwise
it ends with a message and a file `crash-*` (or `slow-unit-*`, `oom-*`).

From outside, over the routes of a running server and from its own description of them (`pip install schemathesis`):

    schemathesis run http://127.0.0.1:8000/openapi.json --max-examples 60 --phases examples,coverage,fuzzing \\
        --checks not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance
"""

import base64
import json
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["service", "model_store", "PIL", "json"]):
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401 -- loaded late otherwise

    from model_store.images import orientation
    from model_store.input_spec import CIFAR10_INPUT
    from service.errors import ServiceError
    from service.web.body import inflate, parse_json
    from service.web.classify import parse_json_images
    from service.web.decoder import decode
    from service.web.infer_request import HEADER_LENGTH, ModelSpec, read_inference
from tests.support.planes import encoded, one_of_the_catalogue, picture, png

MODEL: Final = ModelSpec(("probabilities", "index", "label"), classes=10, max_images=64, input=CIFAR10_INPUT)
MAX_PIXELS: Final = 250_000


def image(data: bytes) -> None:
    decoded = decode(data, CIFAR10_INPUT, MAX_PIXELS)
    assert decoded.shape == MODEL.input.shape, decoded.shape


def exif(data: bytes) -> None:
    assert isinstance(orientation(data), int)


def packed(data: bytes) -> None:
    assert len(inflate(data[1:], b"gzip" if data[:1] < b"\x80" else b"deflate", 1 << 20)) <= 1 << 20


def inference(data: bytes) -> None:
    """The first two bytes say how long the JSON is; a quarter of the values mean that there is no such header."""
    length = int.from_bytes(data[:2], "little")
    headers = {} if length % 4 == 0 else {HEADER_LENGTH: str(length // 4).encode()}
    request = read_inference(data[2:], headers, MODEL)
    assert 1 <= len(request.images) <= MODEL.max_images
    assert {output.name for output in request.outputs} <= set(MODEL.outputs)


def classify(data: bytes) -> None:
    assert parse_json_images(parse_json(data))


READERS: Final[tuple[Callable[[bytes], None], ...]] = (image, inference, classify, packed, exif)


def one(data: bytes) -> None:
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except ServiceError as error:
        if not (400 <= error.status < 500 and one_of_the_catalogue(error.message)):
            raise


def seeds(folder: Path) -> Path:
    """One good input of every kind for the fuzzer to begin from."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(png()).decode()]}
    shape, binary = [1, *MODEL.input.shape], {"binary_data_size": MODEL.input.numel}
    pixels = {"name": "pixels", "shape": shape, "datatype": "UINT8", "parameters": binary}
    whole = json.dumps({"id": "1", "inputs": [tensor], "outputs": [{"name": "index"}]}).encode()
    head = json.dumps({"inputs": [pixels]}).encode()
    good = [b"\0" + encoded(picture(), kind) for kind in ("PNG", "JPEG", "WEBP")]
    good += [b"\1\0\0" + whole, b"\1" + struct.pack("<H", 4 * len(head) + 1) + head + bytes(MODEL.input.numel)]
    good += [b"\2" + json.dumps({"images": [tensor["data"]]}).encode(), b"\4II*\0" + bytes(20)]
    for number, data in enumerate(good):
        (folder / f"seed-{number}").write_bytes(data)
    return folder


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    atheris.Setup([*sys.argv, str(seeds(Path("/tmp/tombola-fuzz")))], one)  # noqa: S108 -- a scratch folder
    atheris.Fuzz()
