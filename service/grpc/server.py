"""The Open Inference Protocol over gRPC, beside its form over HTTP, with the same admission, keys, limits and errors.

ModelInfer is handled as a stream of messages, of which the first one counts. On the wire that is the same, and the
server then decides when a message is read: after the key is known, within TOMBOLA_BODY_TIMEOUT_S, and never more at
once than TOMBOLA_BODY_MEMORY_BYTES allow.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn
from urllib.parse import unquote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines on standard error are no JSON
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nothing forks here; processes are started anew

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from model_store.code_version import product_version
from model_store.input_spec import InputSpec
from service.errors import BadRequest, ErrorMessage, NotFound, Overloaded, RequestTimeout, ServiceError
from service.grpc import infer_message
from service.grpc import open_inference_pb2 as messages
from service.settings import Settings, SettingsRejected
from service.web.body import BodyReservation
from service.web.error_handling import as_service_error
from service.web.infer_request import ModelSpec
from service.web.inference import InferenceContext
from service.web.open_inference import (
    DATATYPES,
    EXTENSIONS,
    MODEL,
    VERSION,
    OpenInferenceApi,
    as_bytes,
)

SERVICE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"
WATCH_S: Final = 1.0  # between looks of somebody who watches the health
ROOM: Final = 1 << 16  # bytes of a message beside its images: names, shapes, parameters
EXTRA_CALLS: Final = 100  # of one connection beside its inferences, so that health is answered regardless
CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Of our errors' HTTP statuses; anything else is INTERNAL."""
Context = Any  # grpc.aio.ServicerContext
Method = Callable[[Any, Context], Awaitable[Any]]


class GrpcServer:
    """One port. Made on the event loop that it serves on."""

    def __init__(self, protocol: OpenInferenceApi, settings: Settings) -> None:
        """Binds the port. Raises SettingsRejected."""
        self.protocol = protocol
        self.data_plane = protocol.data_plane
        self.metrics = protocol.data_plane.metrics
        self.settings = settings
        self.in_flight = 0
        self.readers = asyncio.Semaphore(max(1, settings.body_memory_bytes // settings.max_body_bytes))
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes + ROOM),
                ("grpc.max_concurrent_streams", settings.max_requests + EXTRA_CALLS),
                ("grpc.max_metadata_size", 1 << 14),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", int(1000 * settings.keep_alive_s)),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.bdp_probe", 0),
            ]
        )
        self.server.add_generic_rpc_handlers((self.inference(), self.health()))
        reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), self.server)
        self.address = self.bind()

    def bind(self) -> str:
        host, port = self.settings.host, self.settings.grpc_port
        name = f"[{host.strip('[]')}]" if ":" in host else host
        try:
            taken = self.server.add_insecure_port(f"{name}:{port}")
        except RuntimeError:
            raise SettingsRejected(f"TOMBOLA_GRPC_PORT {host}:{port}: cannot listen there") from None
        return f"{name}:{taken}"

    async def start(self) -> None:
        await self.server.start()

    async def stop(self, grace_s: float) -> None:
        """No new calls; those in flight are answered, within that time."""
        await self.server.stop(grace_s)

    # Methods

    def inference(self) -> grpc.GenericRpcHandler:
        unary: dict[str, Method] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self.guarded(name, method),
                request_deserializer=getattr(messages, f"{name}Request").FromString,
                response_serializer=getattr(messages, f"{name}Response").SerializeToString,
            )
            for name, method in unary.items()
        }
        handlers["ModelInfer"] = grpc.stream_unary_rpc_method_handler(
            self.guarded("ModelInfer", self.model_infer),
            response_serializer=messages.ModelInferResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def health(self) -> grpc.GenericRpcHandler:
        kinds = {
            "request_deserializer": health_pb2.HealthCheckRequest.FromString,
            "response_serializer": health_pb2.HealthCheckResponse.SerializeToString,
        }
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(self.guarded("Check", self.check_health), **kinds),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch_health, **kinds),
        }
        return grpc.method_handlers_generic_handler(HEALTH, handlers)

    def guarded(self, name: str, method: Method) -> Method:
        """Counts and times a call, and makes a status of every exception."""

        async def run(request: Any, context: Context) -> Any:
            started_at, code = time.perf_counter(), grpc.StatusCode.CANCELLED
            try:
                answer = await method(request, context)
                code = grpc.StatusCode.OK
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 -- the last resort, as for HTTP
                known = as_service_error(error)
                code = CODES.get(known.status, grpc.StatusCode.INTERNAL)
                await refuse(context, code, known)
            else:
                return answer
            finally:
                self.metrics.inc("grpc_requests_total", method=name, code=code.name)
                self.metrics.observe("grpc_request_duration_seconds", time.perf_counter() - started_at, method=name)

        return run

    async def server_live(self, _: Any, __: Context) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def server_ready(self, _: Any, __: Context) -> Any:
        return messages.ServerReadyResponse(ready=self.data_plane.manager.ready)

    async def model_ready(self, request: Any, _: Context) -> Any:
        require_model(request.name, request.version)
        return messages.ModelReadyResponse(ready=self.data_plane.manager.ready)

    async def server_metadata(self, _: Any, __: Context) -> Any:
        extensions = [name for name in EXTENSIONS if name in ("classification", "parameters")]
        return messages.ServerMetadataResponse(name=MODEL, version=product_version(), extensions=extensions)

    async def model_metadata(self, request: Any, _: Context) -> Any:
        require_model(request.name, request.version)
        response = messages.ModelMetadataResponse(name=MODEL, versions=[VERSION], platform=MODEL)
        response.inputs.add(name="image", datatype="BYTES", shape=[-1])
        response.inputs.add(name="pixels", datatype="UINT8", shape=[-1, *self.input_spec().shape])
        for name in self.protocol.outputs:
            response.outputs.add(name=name, datatype=DATATYPES[name], shape=[-1, *self.protocol.rest(name)])
        return response

    def input_spec(self) -> InputSpec:
        return self.data_plane.serving().library.input

    async def check_health(self, request: Any, _: Context) -> Any:
        if request.service not in ("", SERVICE):
            raise NotFound
        return self.status()

    def status(self) -> Any:
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if self.data_plane.manager.ready else kinds.NOT_SERVING)

    async def watch_health(self, request: Any, _: Context) -> AsyncIterator[Any]:
        """The status now, and again whenever it changes."""
        if request.service not in ("", SERVICE):
            kinds = health_pb2.HealthCheckResponse
            yield kinds(status=kinds.SERVICE_UNKNOWN)
            return
        last = None
        while True:
            if (status := self.status()) != last:
                yield status
                last = status
            await asyncio.sleep(WATCH_S)

    # Inference

    async def model_infer(self, _: AsyncIterator[bytes], context: Context) -> Any:
        if self.in_flight >= self.settings.max_requests:
            self.metrics.inc("shed_total", reason="inflight")
            raise Overloaded
        self.in_flight += 1
        started_at, kind = time.perf_counter(), "fail"
        try:
            with self.data_plane.counting() as reservation:
                answer = await self.infer(context, reservation)
            kind = "success"
        finally:
            self.in_flight -= 1
            self.protocol.statistics.note(kind, time.perf_counter() - started_at)
        return answer

    async def infer(self, context: Context, reservation: BodyReservation) -> Any:
        arrived_at = asyncio.get_running_loop().time()
        left_s = context.time_remaining()  # of the client's own deadline; None without one
        headers = {name.encode(): as_bytes_value(value) for name, value in context.invocation_metadata()}
        client = self.data_plane.identify({"query_string": b"", "client": (address(context.peer()), 0)}, headers)
        serving, deadline = self.data_plane.serving(), arrived_at + self.settings.deadline_s
        message = infer_message.parse(await self.receive(context, reservation))
        require_model(message.model_name, message.model_version)
        admitted = InferenceContext(headers, b"", client, arrived_at, deadline, serving, None)
        self.data_plane.admit(admitted)
        return await self.answer(message, admitted, left_s)

    async def answer(self, message: Any, admitted: InferenceContext, left_s: float | None) -> Any:
        library = admitted.serving.library
        most = self.data_plane.max_images(library.input)
        model = ModelSpec(self.protocol.outputs, len(library.classes), most, library.input)
        inference = infer_message.read_inference(message, model)
        limits = [limit for limit in (inference.timeout_s, left_s) if limit is not None]
        probabilities = await self.data_plane.classify(admitted, inference.images, min(limits, default=None))
        self.protocol.statistics.images += len(probabilities)
        with self.data_plane.encoding():
            tensors = []
            for output in inference.outputs:
                values, datatype = self.protocol.values(output, probabilities, library.classes)
                tensors.append((output.name, values, datatype, as_bytes(values, datatype) if output.binary else None))
            head = {"model_name": MODEL, "model_version": VERSION, "id": inference.id or ""}
            return infer_message.describe(head, tensors)

    async def receive(self, context: Context, reservation: BodyReservation) -> bytes:
        """The message, within time and memory. Raises RequestTimeout, BadRequest, Overloaded.

        Read from the context: the stream's iterator, left after its first message, costs a task more to close.
        """
        try:
            async with asyncio.timeout(self.settings.body_timeout_s), self.readers:
                data: bytes = await context.read()
                if data is grpc.aio.EOF:
                    raise BadRequest(ErrorMessage.GRPC_MESSAGE)
                reservation.take(len(data))
        except TimeoutError:
            raise RequestTimeout(limit=self.settings.body_timeout_s) from None
        self.metrics.observe("http_request_body_bytes", len(data))
        return data


async def refuse(context: Context, code: grpc.StatusCode, error: ServiceError) -> NoReturn:
    """With the catalogue's text, and when to come back as gRPC's own clients read it."""
    trailers: tuple[tuple[str, str], ...] = ()
    if error.retry_after is not None:
        trailers = (
            ("retry-after", str(error.retry_after)),
            ("grpc-retry-pushback-ms", str(1000 * error.retry_after)),
        )
    await context.abort(code, str(error.message), trailers)  # gRPC takes no subclass of str
    raise AssertionError("unreachable: abort raises")


def require_model(name: str, version: str) -> None:
    if name != MODEL or version not in ("", VERSION):
        raise NotFound(ErrorMessage.MODEL_UNKNOWN)


def address(peer: str) -> str:
    """`ipv4:192.0.2.1:50000` or `ipv6:%5B::1%5D:50000` -> the address alone."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def as_bytes_value(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
