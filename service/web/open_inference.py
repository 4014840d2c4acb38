"""The Open Inference Protocol, version 2, over REST: one model, `tombola`, in one version, `1`.

Written to the specification and to what its clients really send: no content type, or a wrong one, is usual, so bodies
are read raw. Load, unload, shared memory, trace and logging are refused.
"""

import gzip
import struct
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model_store.code_version import product_version
from model_store.json_object import Json
from service.errors import (
    ErrorMessage,
    NotFound,
    NotImplementedByServer,
    NotReady,
    ServiceError,
    UnsupportedMediaType,
)
from service.scheduling.answers import Probabilities
from service.web import openapi, schemas
from service.web.body import is_json, is_unnamed, looks_like_json, media_type
from service.web.infer_request import HEADER_LENGTH, InferRequest, ModelSpec, RequestedOutput, read_inference
from service.web.inference import REFUSES, DataPlane, InferenceContext, apply_output_detail, rank_classes
from service.web.inference_statistics import InferenceStatistics
from service.web.routing import ENCODER, FastRoute, RawRoute, json_response, without_refused

MODEL: Final = "tombola"
VERSION: Final = "1"
PREFIXES: Final = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
SUFFIXES: Final = ("", "_version")  # of operations, by prefix
READY: Final = "Tell whether the server can classify"
INFER_PATHS: Final = tuple(f"{prefix}/infer" for prefix in PREFIXES)
EXTENSIONS: Final = ["binary_tensor_data", "classification", "model_configuration", "parameters", "statistics"]
WORTH_PACKING: Final = 1024  # bytes; below it packing costs more than it saves
DATATYPES: Final = {"probabilities": "FP32", "index": "INT64", "label": "BYTES"}
INFER_BODY: Final[Mapping[str, Json]] = {
    openapi.JSON: openapi.reference(schemas.InferRequestBody),
    openapi.BYTES: openapi.BINARY,
}
INFER_ANSWER: Final = openapi.Answer(
    "Tensors in the order of the request; those in binary follow the JSON.",
    {openapi.JSON: schemas.InferAnswer, openapi.BYTES: openapi.BINARY},
    headers={"Inference-Header-Content-Length": {"schema": {"type": "integer"}, "description": "Bytes of the JSON."}},
)
INFER_HEADERS: Final = (
    openapi.header_parameter(
        "Inference-Header-Content-Length", "Bytes of the JSON, before binary tensors.", type="integer", minimum=0
    ),
    openapi.header_parameter("Content-Encoding", "gzip or deflate.", type="string"),
    openapi.header_parameter("Accept-Encoding", "gzip or deflate, for large answers.", type="string"),
)


class OpenInferenceApi:
    """One method per call of the protocol, over one data plane."""

    def __init__(self, data_plane: DataPlane) -> None:
        self.data_plane = data_plane
        self.statistics = data_plane.statistics
        self.outputs = (
            ("index", "label") if data_plane.settings.output_detail == "label" else ("probabilities", "index", "label")
        )

    # What is here

    async def live(self, _: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, _: Request) -> Response:
        self.require_ready()
        return json_response({"live": True, "ready": True})

    def require_ready(self) -> None:
        if not self.data_plane.manager.ready:
            raise NotReady

    async def server(self, _: Request) -> Response:
        return json_response({"name": MODEL, "version": product_version(), "extensions": EXTENSIONS})

    async def models(self, _: Request) -> Response:
        return json_response({"models": [MODEL]})

    async def index(self, _: Request) -> Response:
        state = "READY" if self.data_plane.manager.ready else "UNAVAILABLE"
        return json_response([{"name": MODEL, "version": VERSION, "state": state, "reason": ""}])

    async def model(self, request: Request) -> Response:
        require_model(request)
        inputs = [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, *self.data_plane.serving().library.input.shape]},
        ]
        outputs = [
            {"name": name, "datatype": DATATYPES[name], "shape": [-1, *self.rest(name)]} for name in self.outputs
        ]
        return json_response(
            {"name": MODEL, "versions": [VERSION], "platform": MODEL, "inputs": inputs, "outputs": outputs}
        )

    def rest(self, output: str) -> list[int]:
        """An output's shape after the number of images."""
        return [len(self.data_plane.serving().library.classes)] if output == "probabilities" else []

    async def model_ready(self, request: Request) -> Response:
        require_model(request)
        self.require_ready()
        return json_response({"name": MODEL, "ready": True})

    async def config(self, request: Request) -> Response:
        """In Triton's terms, where a model that batches leaves the number of images out of `dims`."""
        require_model(request)
        scalar = {"dims": [1], "reshape": {"shape": []}}
        spec = self.data_plane.serving().library.input
        inputs = [
            {"name": "image", "data_type": "TYPE_STRING", **scalar, "optional": True},
            {"name": "pixels", "data_type": "TYPE_UINT8", "dims": [*spec.shape], "optional": True},
        ]
        types = {"FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "BYTES": "TYPE_STRING"}
        outputs = []
        for name in self.outputs:
            dims = {"dims": self.rest(name)} if self.rest(name) else scalar
            outputs.append({"name": name, "data_type": types[DATATYPES[name]], **dims})
        return json_response(
            {
                "name": MODEL,
                "platform": "",
                "backend": MODEL,
                "max_batch_size": self.data_plane.max_images(spec),
                "input": inputs,
                "output": outputs,
                "dynamic_batching": {},
            }
        )

    async def stats(self, request: Request) -> Response:
        if "model" in request.path_params:
            require_model(request)
        return json_response({"model_stats": [describe_statistics(await self.data_plane.all_statistics())]})

    # Inference

    async def infer(self, request: Request) -> Response:
        began = time.perf_counter()
        kind = "fail"
        try:
            require_model(request)
            async with self.data_plane.open(request) as context:
                response = await self.answer(context)
            kind = "success"
        finally:
            self.statistics.note(kind, time.perf_counter() - began)
        return response

    async def answer(self, context: InferenceContext) -> Response:
        library = context.serving.library
        kind = media_type(context.headers)
        if not is_unnamed(kind) and not is_json(kind) and not kind.startswith(b"image/"):
            raise UnsupportedMediaType(
                ErrorMessage.JSON_TYPE if looks_like_json(context.body) else ErrorMessage.V2_TYPE
            )
        model = ModelSpec(self.outputs, len(library.classes), self.data_plane.max_images(library.input), library.input)
        inference = read_inference(context.body, context.headers, model)
        probabilities = await self.data_plane.classify(context, inference.images, inference.timeout_s)
        self.statistics.images += len(probabilities)
        with self.data_plane.encoding():
            return compress(self.respond(inference, probabilities, library.classes), context.headers)

    def respond(self, inference: InferRequest, probabilities: Probabilities, classes: Sequence[str]) -> Response:
        """Tensors in the order asked for; those in binary follow the JSON in the same order."""
        head: Json = {"model_name": MODEL, "model_version": VERSION}
        if inference.id is not None:
            head["id"] = inference.id
        tail: list[bytes] = []
        head["outputs"] = [self.tensor(output, probabilities, classes, tail) for output in inference.outputs]
        text = ENCODER.encode(head).encode()
        if not any(output.binary for output in inference.outputs):
            return Response(text, media_type="application/json")
        headers = {HEADER_LENGTH.decode(): str(len(text))}
        return Response(b"".join((text, *tail)), headers=headers, media_type="application/octet-stream")

    def tensor(
        self, output: RequestedOutput, probabilities: Probabilities, classes: Sequence[str], tail: list[bytes]
    ) -> Json:
        values, datatype = self.values(output, probabilities, classes)
        described: Json = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
        if not output.binary:
            return described | {"data": values.ravel().tolist()}
        data = as_bytes(values, datatype)
        tail.append(data)
        return described | {"parameters": {"binary_data_size": len(data)}}

    def values(
        self, output: RequestedOutput, probabilities: Probabilities, classes: Sequence[str]
    ) -> tuple[np.ndarray[Any, Any], str]:
        """One output as an array, [N] or [N, classes], with its datatype."""
        if output.classes:
            return self.scores(probabilities, output.classes, classes), "BYTES"
        if output.name == "probabilities":
            return apply_output_detail(probabilities, self.data_plane.settings.output_detail), "FP32"
        indices = probabilities.argmax(axis=1)
        if output.name == "index":
            return indices, "INT64"
        return np.array([classes[index] for index in indices], dtype=object), "BYTES"

    def scores(self, probabilities: Probabilities, count: int, classes: Sequence[str]) -> np.ndarray[Any, Any]:
        """The classification extension: [N, count] of "<score>:<index>:<label>", the likeliest first."""
        order = rank_classes(probabilities)[:, :count]
        scores = apply_output_detail(probabilities, self.data_plane.settings.output_detail)
        texts = [
            [f"{scores[row, index]:g}:{index}:{classes[index]}" for index in indices]
            for row, indices in enumerate(order)
        ]
        return np.array(texts, dtype=object)


def describe_statistics(statistics: InferenceStatistics) -> Json:
    """As Triton has them. Executions are requests: runs of members would tell how many tickets answered."""

    def durations(kind: str) -> Json:
        return {"count": statistics.counts[kind], "ns": int(statistics.seconds[kind]) * 10**9}

    unsaid = {"count": statistics.counts["success"], "ns": 0}
    stages = ("queue", "compute_input", "compute_infer", "compute_output")
    return {
        "name": MODEL,
        "version": VERSION,
        "last_inference": statistics.last_ms,
        "inference_count": statistics.images,
        "execution_count": statistics.counts["success"],
        "inference_stats": {
            "success": durations("success"),
            "fail": durations("fail"),
            **dict.fromkeys(stages, unsaid),
        },
        "batch_stats": [],
    }


def path_parameters(path: str) -> list[Json]:
    """The path's parameters for the OpenAPI document, each with the only value it can have."""
    only = {"model": MODEL, "version": VERSION}
    return [
        openapi.path_parameter(name, f"The only {name} there is.", enum=[value])
        for name, value in only.items()
        if f"{{{name}}}" in path
    ]


def require_model(request: Request) -> None:
    path = request.path_params
    if path["model"] != MODEL or path.get("version", VERSION) != VERSION:
        raise NotFound(ErrorMessage.MODEL_UNKNOWN)


def as_bytes(values: np.ndarray[Any, Any], datatype: str) -> bytes:
    """Little-endian and row-major; BYTES as a 4-byte length and the element, one after the other."""
    if datatype == "BYTES":
        encoded = [str(value).encode() for value in values.ravel()]
        return b"".join(struct.pack("<I", len(element)) + element for element in encoded)
    return values.astype({"FP32": "<f4", "INT64": "<i8"}[datatype]).tobytes()


def compress(response: Response, headers: Mapping[bytes, bytes]) -> Response:
    """Compressed if the client asked for it and it pays. Only here: clients unpack no other answer."""
    body = bytes(response.body)
    if len(body) < WORTH_PACKING:
        return response
    coding = negotiate_encoding(headers.get(b"accept-encoding", b""))
    if coding is None:
        return response
    body = gzip.compress(body, 1, mtime=0) if coding == "gzip" else zlib.compress(body, 1)
    kept = {name: value for name, value in response.headers.items() if name != "content-length"}
    return Response(body, headers=kept | {"content-encoding": coding, "vary": "accept-encoding"})


def negotiate_encoding(header: bytes) -> str | None:
    """gzip or deflate, whichever the header names first with a weight above 0."""
    codings = without_refused(header.decode("latin-1").lower()).split(",")
    return next((coding for coding in codings if coding in ("gzip", "deflate")), None)


async def not_offered(_: Request) -> Response:
    raise NotImplementedByServer


UNSUPPORTED_PATHS: Final = (
    "/v2/repository/models/{model}/load",
    "/v2/repository/models/{model}/unload",
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/models/{model}/trace/setting",
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
)


def router(api: OpenInferenceApi) -> APIRouter:
    routes = APIRouter(route_class=RawRoute, tags=["Open Inference Protocol v2"])
    for path, suffix in zip(INFER_PATHS, SUFFIXES, strict=True):
        about = openapi.operation(
            f"infer{suffix}",
            "Classify images: one input, image or pixels",
            INFER_ANSWER,
            refuses=(NotFound, *REFUSES),
            parameters=[*path_parameters(path), *INFER_HEADERS],
            body=INFER_BODY,
        )
        routes.add_api_route(path, api.infer, methods=["POST"], **about)
    for view in views(api):
        parameters = path_parameters(view.path)
        answer = openapi.json_answer(view.model, view.answer)
        about = openapi.operation(
            view.name, view.summary, answer, refuses=view.refuses, parameters=parameters, security=[]
        )
        routes.add_api_route(view.path, view.endpoint, methods=[view.method], **about)
    routes.add_api_route("/v2/", api.server, methods=["GET"], include_in_schema=False)
    for path in UNSUPPORTED_PATHS:
        routes.add_api_route(path, not_offered, methods=["GET", "POST"], include_in_schema=False)
    return routes


@dataclass(frozen=True)
class View:
    """One call of the protocol that reads no body."""

    path: str
    endpoint: Callable[[Request], Awaitable[Response]]
    name: str
    summary: str
    model: Any
    answer: str
    refuses: Sequence[type[ServiceError]] = ()
    method: str = "GET"


def views(api: OpenInferenceApi) -> Iterator[View]:
    live, ready = "The process runs.", "A verified library is warm."
    yield View("/v2", api.server, "server_metadata", "Name the server", schemas.ServerMetadata, "Its extensions.")
    yield View("/v2/health/live", api.live, "server_live", "Tell whether the process runs", schemas.Live, live)
    yield View("/v2/health/ready", api.ready, "server_ready", READY, schemas.LiveAndReady, ready, refuses=(NotReady,))
    yield View("/v2/models", api.models, "models", "List the models", schemas.ModelNames, "The only one.")
    yield View(
        "/v2/models/stats", api.stats, "statistics", "Count inference requests", schemas.Statistics, "Of this service."
    )
    index = "List the models with their state"
    yield View(
        "/v2/repository/index",
        api.index,
        "repository_index",
        index,
        list[schemas.ModelState],
        "The only one.",
        method="POST",
    )
    unready, known = (NotFound, NotReady), (NotFound,)
    for prefix, suffix in zip(PREFIXES, SUFFIXES, strict=True):
        metadata, config = schemas.ModelMetadata, schemas.ModelConfig
        yield View(
            prefix, api.model, f"model_metadata{suffix}", "Describe the tensors", metadata, "Inputs, outputs.", unready
        )
        yield View(
            f"{prefix}/config", api.config, f"model_config{suffix}", "As Triton describes it", config, "Dims.", unready
        )
        yield View(
            f"{prefix}/ready", api.model_ready, f"model_ready{suffix}", READY, schemas.ModelReady, ready, unready
        )
        counts = "Count inference requests of the model"
        yield View(
            f"{prefix}/stats", api.stats, f"model_statistics{suffix}", counts, schemas.Statistics, "Of it.", known
        )


def fast_routes(api: OpenInferenceApi) -> dict[str, FastRoute]:
    """The paths of inference with the model's only name and version in place."""
    only = {"model": MODEL, "version": VERSION}
    return {path.format(**only): (RawRoute(path, api.infer, methods=["POST"]), only) for path in INFER_PATHS}
