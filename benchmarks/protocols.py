"""gRPC beside HTTP: the same pictures to one server, in turn, from one load generator (h2load, of nghttp2)."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Final

from benchmarks import requests
from benchmarks.requests import Form
from benchmarks.servers import Running, Server, free_port
from service.grpc import open_inference_pb2 as messages

CLIENTS: Final = 32
ROUNDS: Final = 5
PATH: Final = "/inference.GRPCInferenceService/ModelInfer"
HEADERS: Final = (("content-type", "application/grpc"), ("te", "trailers"))
ENDED: Final = re.compile(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout")
Figures = dict[str, Any]


def with_grpc(server: Server) -> tuple[Server, str]:
    """The server with gRPC, and host:port of it."""
    port = free_port()
    flags = ("--grpc", "--grpc-port", str(port))
    return replace(server, command=(*server.command, *flags)), f"127.0.0.1:{port}"


def measure_protocols(running: Running, grpc_place: str, seconds: float) -> Figures:
    """Images a second and the server's processor time an image, by protocol and form; medians over the rounds."""
    png, tensor = requests.files("/v1/classify"), requests.tensors()
    pixels = [picture.transpose(2, 0, 1).tobytes() for picture in requests.pictures()]
    cases = {
        "png": {"http": (running.place, png), "grpc": (grpc_place, infer_png())},
        "tensor": {
            "http": (running.place, tensor),
            "grpc": (grpc_place, infer("pixels", "UINT8", [1, *requests.INPUT.shape], pixels)),
        },
    }
    rounds = []
    for number in range(ROUNDS + 1):  # the first one warms up
        measured = {
            form: {name: measure(running, *case, seconds if number else 1) for name, case in both.items()}
            for form, both in cases.items()
        }
        rounds.append(measured)
    return {"clients": CLIENTS, "rounds": rounds[1:], "forms": {form: middle(rounds[1:], form) for form in cases}}


def middle(rounds: Sequence[Figures], form: str) -> Figures:
    figures: Figures = {
        name: {key: median(each[form][name][key] for each in rounds) for key in ("images_per_s", "cpu_ms")}
        for name in ("http", "grpc")
    }
    shares = [each[form]["grpc"]["images_per_s"] / each[form]["http"]["images_per_s"] for each in rounds]
    return {**figures, "grpc_over_http": round(median(shares), 3), "of_rounds": [round(share, 3) for share in shares]}


def prefixed(files: Sequence[bytes]) -> list[bytes]:
    """Elements of a BYTES tensor in raw form."""
    return [struct.pack("<I", len(data)) + data for data in files]


def infer(name: str, datatype: str, shape: Sequence[int], contents: Sequence[bytes]) -> Form:
    """ModelInfer as gRPC frames it."""
    bodies = []
    for data in contents:
        message = messages.ModelInferRequest(model_name="tombola", raw_input_contents=[data])
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        text = message.SerializeToString()
        bodies.append(struct.pack(">BI", 0, len(text)) + text)
    return Form(PATH, HEADERS, tuple(bodies))


def infer_png() -> Form:
    """The pictures of /v1/classify."""
    return infer("image", "BYTES", [1], prefixed(requests.files("/v1/classify").bodies))


def measure(running: Running, place: str, form: Form, seconds: float, clients: int = CLIENTS) -> Figures:
    """Counted by the server itself, so that a refusal within a 200 of HTTP/2 is none. One picture, from all clients."""
    before, used = running.metric("inference_images_total"), running.cpu_s()
    with tempfile.NamedTemporaryFile() as body:
        body.write(form.bodies[0])
        body.flush()
        protocol = ["-p", "h2c"] if form.path == PATH else ["--h1"]
        headers = [word for name, value in form.headers for word in ("-H", f"{name}: {value}")]
        load = ["-t1", f"-c{clients}", "-m1", f"-D{max(1, round(seconds))}", "-d", body.name]
        command = ["h2load", *protocol, *load, *headers, f"http://{place}{form.path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    ended = ENDED.search(done.stdout)
    if ended is None or any(int(count) for count in ended.groups()[1:]):
        raise SystemExit(f"no measurement: {done.stdout[-500:]}")
    images = running.metric("inference_images_total") - before
    if images < int(ended[1]):
        raise SystemExit(f"no measurement: {ended[1]} answers, of which {images:.0f} were classified")
    rate, cpu_ms = images / max(1, round(seconds)), 1000 * (running.cpu_s() - used) / images
    return {"images_per_s": round(rate, 1), "cpu_ms": round(cpu_ms, 3), "images": round(images)}
