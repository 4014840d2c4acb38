"""The Open Inference Protocol over gRPC: Triton's clients, reflection, health, refusals, stalls, cancels, drain."""

import asyncio
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from model_store.input_spec import CIFAR10_INPUT
from service.errors import DeadlineExceeded, ErrorMessage, Overloaded, RateLimited
from service.grpc import open_inference_pb2 as messages
from service.grpc.server import GrpcServer, address
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings, SettingsRejected
from service.web.auth import ApiKeyStore
from service.web.inference import DataPlane
from service.web.open_inference import OpenInferenceApi
from service.web.server import loop_factory
from tests.support.planes import StandIn, picture, png, stand_in_of
from tests.support.serving import serving, tiny_library
from tests.support.tickets import CLASSES
from tests.support.waiting import until

SERVICE: Final = "/inference.GRPCInferenceService/"
TRITON: Final = Path(__file__).parent / "clients" / "triton_check.py"
KSERVE: Final = Path(__file__).parent / "clients" / "kserve_grpc_check.py"


@dataclass
class Running:
    """A server on a free port, and a channel to it."""

    address: str
    channel: grpc.Channel
    manager: StandIn
    metrics: Metrics
    server: GrpcServer
    loop: asyncio.AbstractEventLoop

    def call(self, method: str, request: Any, answer: str = "", **options: Any) -> Any:
        response = getattr(messages, answer or f"{method}Response")
        invoke = self.channel.unary_unary(
            SERVICE + method,
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return invoke(request, **{"timeout": 30, **options})

    def infer(self, request: Any = None, **options: Any) -> Any:
        return self.call("ModelInfer", image_request() if request is None else request, **options)

    def refusal(self, request: Any = None, **options: Any) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(request, **options)
        return caught.value

    def count(self, code: str) -> float:
        return self.metrics.value("grpc_requests_total", method="ModelInfer", code=code) or 0.0


@contextmanager
def running(manager: StandIn | None = None, **settings: Any) -> Iterator[Running]:
    """In a thread with its own event loop, of the kind that the service uses."""
    started, stop = threading.Event(), asyncio.Event()
    instances: list[Running] = []
    manager, metrics = manager or StandIn(), Metrics()

    async def serve() -> None:
        chosen = Settings(grpc_port=0, **settings)
        keys = ApiKeyStore(chosen.api_keys_file, metrics)
        server = GrpcServer(OpenInferenceApi(DataPlane(cast("LibraryManager", manager), chosen, metrics, keys)), chosen)
        await server.start()
        channel = grpc.insecure_channel(server.address, options=[("grpc.enable_http_proxy", 0)])
        instances.append(Running(server.address, channel, manager, metrics, server, asyncio.get_running_loop()))
        started.set()
        await stop.wait()
        await server.stop(0)

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield instances[0]
    finally:
        instances[0].channel.close()
        instances[0].loop.call_soon_threadsafe(stop.set)
        thread.join(30)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def image_request(*files: bytes, **fields: Any) -> Any:
    request = messages.ModelInferRequest(model_name="tombola", **fields)
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(files) or 1])
    tensor.contents.bytes_contents.extend(files or [png(110)])
    return request


def pixel_request(values: Any, datatype: str, *, raw: bool, shape: Sequence[int] | None = None) -> Any:
    request = messages.ModelInferRequest(model_name="tombola")
    tensor = request.inputs.add(name="pixels", datatype=datatype, shape=values.shape if shape is None else shape)
    if raw:
        request.raw_input_contents.append(values.tobytes())
    else:
        name = "uint_contents" if datatype == "UINT8" else "fp32_contents"
        getattr(tensor.contents, name).extend(values.ravel().tolist())
    return request


def test_triton_s_clients_and_its_definition_of_the_protocol(server: Running, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(110))
    done = subprocess.run(
        [sys.executable, str(TRITON), server.address, str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    theirs = results.pop("definition")
    for result in results.values():
        assert (result["live"], result["ready"], result["model"], result["metadata"]) == (True, True, True, "tombola")
        assert result["inputs"] == ["image", "pixels"]
        assert result["image"]["index"] == [4, 4]
        assert result["image"]["label"] == [CLASSES[4]] * 2
        assert np.array(result["image"]["probabilities"]).shape == (2, 10)
        assert result["uint8"]["index"] == result["fp32"]["index"] == [2, 2, 2]
        assert result["classes"]["probabilities"][0][0] == f"0.62:4:{CLASSES[4]}"
        assert result["refusal"] == ["StatusCode.NOT_FOUND", ErrorMessage.MODEL_UNKNOWN]
    for name, kind in fields(messages.DESCRIPTOR).items():
        assert theirs[name] == kind, name


@pytest.mark.skipif("KSERVE_PYTHON" not in os.environ, reason="KSERVE_PYTHON names no environment with kserve")
def test_kserve_s_client(server: Running, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(110))
    command = [os.environ["KSERVE_PYTHON"], str(KSERVE), server.address, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (results["live"], results["ready"], results["model"]) == (True, True, True)
    image = results["image"]
    assert (image["id"], image["index"], image["label"]) == ("42", ["4", "4"], [CLASSES[4]] * 2)
    for binary in ("False", "True"):
        assert results[f"uint8 {binary}"]["index"] == results[f"fp32 {binary}"]["index"] == ["2"] * 3
        refusal = results[f"shape {binary}"]
        assert refusal["code"] == "INVALID_ARGUMENT"
        assert refusal["text"].startswith("Wrong shape: pixels are [N, 3, 32, 32]")
    assert results["no image"] == {"code": "INVALID_ARGUMENT", "text": ErrorMessage.IMAGE_FORMAT}
    assert results["other"] == {"code": "NOT_FOUND", "text": ErrorMessage.MODEL_UNKNOWN}


def fields(file: Any) -> dict[str, list[int]]:
    def own(message: Any) -> dict[str, list[int]]:
        numbers = {f"{message.full_name}.{each.name}": [each.number, each.type] for each in message.fields}
        for nested in message.nested_types:
            numbers |= own(nested)
        return numbers

    return {name: kind for each in file.message_types_by_name.values() for name, kind in own(each).items()}


def test_reflection_shows_the_services_and_every_message(server: Running) -> None:
    database = ProtoReflectionDescriptorDatabase(server.channel)
    services = set(database.get_services())
    assert services == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    }
    described = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    assert [method.name for method in described.service[0].method][-1] == "ModelInfer"
    assert "ModelInferRequest" in {message.name for message in described.message_type}


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_pixels_come_back_in_the_form_that_they_came_in(server: Running, datatype: str, raw: bool) -> None:
    pixels = np.stack([np.asarray(picture(red)).transpose(2, 0, 1) for red in (10, 110, 235)])
    values = pixels if datatype == "UINT8" else (pixels / np.float32(255)).astype(np.float32)
    response = server.infer(pixel_request(values, datatype, raw=raw))
    assert [output.name for output in response.outputs] == ["probabilities", "index", "label"]
    assert [list(output.shape) for output in response.outputs] == [[3, 10], [3], [3]]
    if raw:
        assert np.frombuffer(response.raw_output_contents[1], "<i8").tolist() == [0, 4, 9]
        assert response.raw_output_contents[2].startswith(b"\x08\0\0\0airplane")
    else:
        assert list(response.outputs[1].contents.int64_contents) == [0, 4, 9]
        assert list(response.outputs[2].contents.bytes_contents) == [CLASSES[i].encode() for i in (0, 4, 9)]
        assert response.outputs[0].contents.fp32_contents[0] == pytest.approx(0.62)
    assert server.manager.scheduler.rows[-1].tolist() == pixels.tolist()


def test_an_answer_has_the_request_s_id_and_the_outputs_it_names(server: Running) -> None:
    request = image_request(id="42")
    request.outputs.add(name="label")
    response = server.infer(request)
    assert (response.id, response.model_name, response.model_version) == ("42", "tombola", "1")
    assert [output.name for output in response.outputs] == ["label"]


def with_parameter(name: str, **value: Any) -> Any:
    request = image_request()
    for key, content in value.items():
        setattr(request.parameters[name], key, content)
    return request


def both_contents() -> Any:
    request = image_request()
    request.raw_input_contents.append(b"\x01\0\0\0x")
    return request


def no_contents() -> Any:
    request = messages.ModelInferRequest(model_name="tombola")
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    return request


ZEROS: Final = np.zeros((1, 3, 32, 32), np.uint8)
REFUSALS: Final[dict[str, tuple[Callable[[], Any], str, str]]] = {
    "no message": (lambda: b"\xff\xff", "INVALID_ARGUMENT", ErrorMessage.GRPC_MESSAGE),
    "no input": (lambda: messages.ModelInferRequest(model_name="tombola"), "INVALID_ARGUMENT", ErrorMessage.V2_INPUTS),
    "another model": (lambda: messages.ModelInferRequest(model_name="x"), "NOT_FOUND", ErrorMessage.MODEL_UNKNOWN),
    "another version": (
        lambda: image_request(model_version="2"),
        "NOT_FOUND",
        ErrorMessage.MODEL_UNKNOWN,
    ),
    "no image": (lambda: image_request(b"none"), "INVALID_ARGUMENT", ErrorMessage.IMAGE_FORMAT),
    "both contents": (both_contents, "INVALID_ARGUMENT", ErrorMessage.GRPC_CONTENTS),
    "no contents": (no_contents, "INVALID_ARGUMENT", ErrorMessage.GRPC_CONTENTS),
    "wrong shape": (
        lambda: pixel_request(ZEROS, "UINT8", raw=True, shape=[1, 32, 32, 3]),
        "INVALID_ARGUMENT",
        "Wrong shape: pixels are [N, 3, 32, 32] with N of at least 1.",
    ),
    "negative shape": (
        lambda: pixel_request(ZEROS, "UINT8", raw=False, shape=[-1, 3, 32, 32]),
        "INVALID_ARGUMENT",
        "Wrong shape: pixels are [N, 3, 32, 32] with N of at least 1.",
    ),
    "too many images": (
        lambda: pixel_request(ZEROS, "UINT8", raw=True, shape=[2**40, 3, 32, 32]),
        "INVALID_ARGUMENT",
        "The request holds more than 512 images, which is this server's limit.",
    ),
    "wrong size": (
        lambda: pixel_request(ZEROS[:, :, 1:], "UINT8", raw=True, shape=[1, 3, 32, 32]),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_BINARY_SIZE,
    ),
    "wrong count": (
        lambda: pixel_request(ZEROS[:, :, 1:], "UINT8", raw=False, shape=[1, 3, 32, 32]),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_DATA,
    ),
    "above 255": (
        lambda: pixel_request(ZEROS.astype(np.uint32) + 256, "UINT8", raw=False),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_DATA_UINT8,
    ),
    "not a number": (
        lambda: pixel_request(np.full((1, 3, 32, 32), np.nan, np.float32), "FP32", raw=False),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_DATA_FP32,
    ),
    "half precision": (
        lambda: pixel_request(ZEROS.astype(np.float16), "FP16", raw=True),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_HALF_JSON,
    ),
    "contents of another type": (
        lambda: pixel_request(ZEROS.astype(np.float32), "INT64", raw=False),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_DATATYPE,
    ),
    "a timeout that is none": (
        lambda: with_parameter("timeout", string_param="soon"),
        "INVALID_ARGUMENT",
        ErrorMessage.V2_TIMEOUT,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_requests_have_the_status_and_the_text_of_http(server: Running, name: str) -> None:
    make, code, text = REFUSALS[name]
    error = server.refusal(make())
    assert (error.code().name, error.details()) == (code, text)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (48, 64)])
def test_pictures_of_another_size_than_the_library_s_are_refused_by_its_shape(size: tuple[int, int]) -> None:
    spec = replace(CIFAR10_INPUT, height=size[0], width=size[1])
    text = f"Wrong shape: pixels are [N, 3, {size[0]}, {size[1]}] with N of at least 1."
    right = np.full((2, *spec.shape), 110, np.uint8)
    wrong = [ZEROS, right[:, :, 1:], right[:, :, :, 1:], right[:, :1], right.transpose(0, 2, 3, 1), right[0], right[:0]]
    with running(stand_in_of(spec)) as server:
        metadata = server.call("ModelMetadata", messages.ModelMetadataRequest(name="tombola"))
        assert [list(each.shape) for each in metadata.inputs if each.name == "pixels"] == [[-1, *spec.shape]]
        for raw, datatype in itertools.product((False, True), ("UINT8", "FP32")):
            values = right if datatype == "UINT8" else right.astype(np.float32) / 255
            assert server.infer(pixel_request(values, datatype, raw=raw)).outputs[1].shape == [2]
            for pixels in wrong:
                values = pixels if datatype == "UINT8" else pixels.astype(np.float32) / 255
                error = server.refusal(pixel_request(np.ascontiguousarray(values), datatype, raw=raw))
                assert (error.code().name, error.details()) == ("INVALID_ARGUMENT", text), pixels.shape
        turned = server.refusal(pixel_request(right, "UINT8", raw=True, shape=[2, 3, size[1] * 2, size[0] // 2]))
        assert turned.details() == text


@pytest.mark.parametrize(
    ("error", "code", "pause"),
    [
        (Overloaded(retry_after=7), "UNAVAILABLE", "7"),
        (RateLimited(retry_after=3), "RESOURCE_EXHAUSTED", "3"),
        (DeadlineExceeded(), "DEADLINE_EXCEEDED", None),
        (ZeroDivisionError(), "INTERNAL", None),
    ],
)
def test_refusals_of_the_scheduler_keep_their_meaning(error: Exception, code: str, pause: str | None) -> None:
    manager = StandIn()
    manager.scheduler.full = error
    with running(manager) as server:
        refused = server.refusal()
        trailers = dict(refused.trailing_metadata() or ())
        assert (refused.code().name, trailers.get("retry-after")) == (code, pause)
        assert trailers.get("grpc-retry-pushback-ms") == (pause and f"{pause}000")
        until(lambda: server.count(code) == 1)


def test_keys_come_in_the_metadata(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"mobile {hashlib.sha256(b'secret').hexdigest()}\n")
    with running(api_keys_file=tmp_path / "keys") as server:
        for wrong in ((), (("authorization", "Bearer wrong"),), (("x-api-key", "wrong"),)):
            error = server.refusal(metadata=wrong)
            assert (error.code().name, error.details()) == ("UNAUTHENTICATED", ErrorMessage.KEY_REQUIRED)
        server.infer(metadata=(("authorization", "Bearer secret"),))
        server.infer(metadata=(("x-api-key", "secret"),))
        assert server.manager.scheduler.clients == ["key:mobile"] * 2
        assert server.metrics.value("auth_failures_total", plane="public") == 3


def test_without_keys_a_client_is_its_address(server: Running) -> None:
    server.infer()
    assert server.manager.scheduler.clients[-1] == "127.0.0.1"
    assert address("ipv6:%5B::1%5D:50000") == "::1"
    assert address("ipv4:192.0.2.1:50000") == "192.0.2.1"


def test_the_least_of_all_deadlines_counts(server: Running) -> None:
    server.infer(timeout=3)
    assert 2 < server.manager.scheduler.deadlines[-1] <= 3.1  # gRPC rounds a timeout up, by little
    server.infer(with_parameter("timeout", int64_param=2_000_000), timeout=5)
    assert 1 < server.manager.scheduler.deadlines[-1] <= 2
    server.infer(timeout=3600)
    assert 9 < server.manager.scheduler.deadlines[-1] <= 10


def test_a_call_that_is_cancelled_or_late_is_dropped_and_counted() -> None:
    manager = StandIn()
    with running(manager) as server:
        manager.scheduler.hold = asyncio.Event()
        invoke = server.channel.unary_unary(SERVICE + "ModelInfer")
        call = invoke.future(image_request().SerializeToString())
        until(lambda: len(manager.scheduler.rows) == 1)
        call.cancel()
        until(lambda: manager.scheduler.cancelled == 1)
        assert server.refusal(timeout=0.3).code().name == "DEADLINE_EXCEEDED"
        until(lambda: manager.scheduler.cancelled == 2)
        until(lambda: server.count("CANCELLED") >= 1)
        assert server.metrics.value("inference_requests_total", outcome="cancelled") >= 1
        assert server.server.in_flight == 0


def test_a_message_that_never_comes_costs_a_bounded_time() -> None:
    with running(body_timeout_s=0.2) as server:
        stop = threading.Event()

        def stalled() -> Iterator[bytes]:
            stop.wait(60)
            yield b""

        invoke = server.channel.stream_unary(SERVICE + "ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            invoke(stalled(), timeout=30)
        stop.set()
        assert caught.value.code().name == "DEADLINE_EXCEEDED"
        assert caught.value.details() == "The body did not arrive within 0.2 s."
        with pytest.raises(grpc.RpcError) as caught:
            invoke(iter(()), timeout=30)
        assert caught.value.details() == ErrorMessage.GRPC_MESSAGE
        assert server.server.data_plane.bodies.reserved_bytes == 0


def test_a_message_beyond_the_limit_is_refused_unread() -> None:
    with running(max_body_bytes=1 << 16, body_memory_bytes=1 << 20) as server:
        error = server.refusal(image_request(bytes(1 << 18)))
        assert error.code().name == "RESOURCE_EXHAUSTED"
        server.infer()


def test_no_more_calls_than_allowed_are_in_flight_and_health_is_answered_regardless() -> None:
    manager = StandIn()
    with running(manager, max_requests=1) as server:
        manager.scheduler.hold = asyncio.Event()
        invoke = server.channel.unary_unary(SERVICE + "ModelInfer")
        call = invoke.future(image_request().SerializeToString())
        until(lambda: len(manager.scheduler.rows) == 1)
        with grpc.insecure_channel(server.address, options=[("grpc.enable_http_proxy", 0)]) as other:
            stub = health_pb2_grpc.HealthStub(other)
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
            with pytest.raises(grpc.RpcError) as caught:
                other.unary_unary(SERVICE + "ModelInfer")(image_request().SerializeToString(), timeout=30)
            assert caught.value.details() == ErrorMessage.FULL
        call.cancel()


def test_health_follows_the_readiness() -> None:
    manager = StandIn()
    with running(manager) as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"), timeout=60)
        kinds = health_pb2.HealthCheckResponse
        assert next(watch).status == kinds.SERVING
        manager.ready = False
        assert next(watch).status == kinds.NOT_SERVING
        watch.cancel()
        assert not server.call("ServerReady", messages.ServerReadyRequest()).ready
        assert not server.call("ModelReady", messages.ModelReadyRequest(name="tombola")).ready
        assert server.call("ServerLive", messages.ServerLiveRequest()).live
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=30)
        assert caught.value.code().name == "NOT_FOUND"


def test_a_port_that_is_taken_is_refused_in_one_line(server: Running) -> None:
    port = int(server.address.rpartition(":")[2])

    async def again() -> None:
        with pytest.raises(SettingsRejected, match=f"^TOMBOLA_GRPC_PORT 127.0.0.1:{port}: cannot listen there$"):
            GrpcServer(server.server.protocol, Settings(grpc_port=port))

    asyncio.run(again())


def test_the_real_process_answers_on_both_protocols_and_drains(tmp_path: Path) -> None:
    library = tiny_library(tmp_path / "library")
    flags = ("--grpc", "--grpc-port", "0")
    with serving(library.path, tmp_path / "state", *flags) as process:
        place = next(line.split()[1] for line in process.output if line.startswith("grpc"))
        with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
            invoke = channel.unary_unary(
                SERVICE + "ModelInfer", response_deserializer=messages.ModelInferResponse.FromString
            )
            response = invoke(image_request().SerializeToString(), timeout=30)
            assert response.outputs[2].contents.bytes_contents[0].decode() in CLASSES
            assert process.classify(png())[0] == 200
            assert process.metric('inference_requests_total{outcome="ok"}') == 2
            assert process.metric('grpc_requests_total{code="OK",method="ModelInfer"}') == 1
            statistics = json.loads(process.get(f"{process.public}/v2/models/tombola/stats")[1])
            assert statistics["model_stats"][0]["inference_count"] == 1  # /v1 is no part of the protocol
        assert process.end() == 0
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert all(line.startswith("{") for line in log), log
