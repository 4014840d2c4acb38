"""What is sent: the same images to every server, in the form that it takes."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_store.input_spec import CIFAR10_INPUT

INPUT: Final = CIFAR10_INPUT  # of the embedded library, from which every server of a benchmark answers
IMAGES: Final = 64
# wrk's own scripting: every thread goes round the prepared requests; at the end one line of JSON.
LUA: Final = """\
local bodies = {}
for number = 0, %(count)d - 1 do
  local file = io.open("%(folder)s/" .. number, "rb"); bodies[number] = file:read("*a"); file:close()
end
wrk.method = "POST"
%(headers)s
local prepared, at = {}, 0
function init() for number, body in pairs(bodies) do prepared[number] = wrk.format(nil, "%(path)s", nil, body) end end
function request() at = (at + 1) %% %(count)d; return prepared[at] end
function done(summary, latency, requests)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  local line = '{"answers": %%d, "seconds": %%f, "refused": %%d, "broken": %%d, '
    .. '"p50_ms": %%f, "p95_ms": %%f, "p99_ms": %%f}'
  print("JSON " .. string.format(line, summary.requests, summary.duration / 1e6, errors.status, broken,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Form:
    """One way to send an image: a path, headers, and a body for each of the images."""

    path: str
    headers: tuple[tuple[str, str], ...]
    bodies: tuple[bytes, ...]

    def script(self, folder: Path) -> Path:
        """The bodies as files, and wrk's script that sends them."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, body in enumerate(self.bodies):
            (folder / str(number)).write_bytes(body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in self.headers)
        script = folder / "post.lua"
        values = {"count": len(self.bodies), "folder": folder, "headers": headers, "path": self.path}
        script.write_text(LUA % values)
        return script

    def messages(self, place: str) -> list[bytes]:
        """Whole HTTP/1.1 requests, for the generator that needs no client library."""
        fixed = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        head = f"POST {self.path} HTTP/1.1\r\nHost: {place}\r\n{fixed}"
        return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in self.bodies]


def pictures(seed: int = 0) -> list[NDArray[np.uint8]]:
    """uint8 [H, W, 3] of INPUT: smooth colours under a little noise, which compress about as photographs do."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
            (INPUT.width, INPUT.height), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (*INPUT.size, 3))
        images.append(noisy.clip(0, 255).astype(np.uint8))
    return images


def png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def files(path: str, *headers: tuple[str, str]) -> Form:
    return Form(path, (("Content-Type", "image/png"), *headers), tuple(png(picture) for picture in pictures()))


def base64_json(path: str) -> Form:
    bodies = (json.dumps({"image": base64.b64encode(png(picture)).decode()}).encode() for picture in pictures())
    return Form(path, (("Content-Type", "application/json"),), tuple(bodies))


def tensors() -> Form:
    """Open Inference Protocol, binary: a JSON header, then the pixels."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "pixels",
                    "shape": [1, *INPUT.shape],
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": INPUT.numel},
                }
            ]
        }
    ).encode()
    bodies = tuple(header + picture.transpose(2, 0, 1).tobytes() for picture in pictures())
    kind = ("Content-Type", "application/octet-stream")
    return Form("/v2/models/tombola/infer", (kind, ("Inference-Header-Content-Length", str(len(header)))), bodies)


def several(count: int) -> Form:
    """One request with `count` images in JSON, for what a large request does to small ones."""
    images: Sequence[str] = [base64.b64encode(png(picture)).decode() for picture in pictures()]
    body = json.dumps({"images": [images[number % IMAGES] for number in range(count)]}).encode()
    return Form("/v1/classify", (("Content-Type", "application/json"),), (body,))
