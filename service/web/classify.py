"""The public plane: classification, health, and the Open Inference Protocol beside it."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model_store.json_object import Json
from service.errors import REQUEST_ID, BadRequest, ErrorMessage, NotReady, UnsupportedMediaType
from service.scheduling.answers import Probabilities
from service.web import form_data, openapi, schemas
from service.web.body import is_json, is_unnamed, looks_like_json, media_type, parse_json, whole_number
from service.web.decoder import sniff
from service.web.infer_request import from_base64
from service.web.inference import DIGITS, REFUSES, DataPlane, InferenceContext
from service.web.routing import FastRoute, RawRoute, json_response
from service.web.serving import ServedLibrary

PATH: Final = "/v1/classify"
TIMEOUT: Final = b"tombola-timeout-ms"  # of one request: how long its client will wait
Endpoint = Callable[[Request], Awaitable[Response]]
BODY: Final[Mapping[str, Json]] = {
    **dict.fromkeys((openapi.BYTES, "image/png", "image/jpeg", "image/webp"), openapi.BINARY),
    openapi.JSON: openapi.reference(schemas.ClassifyRequest),
    form_data.MEDIA_TYPE.decode(): {
        "type": "object",
        "properties": {"image": {"type": "array", "items": openapi.BINARY}},
    },
}


class ClassifyApi:
    """One method per route, over one data plane."""

    def __init__(self, data_plane: DataPlane) -> None:
        self.data_plane = data_plane
        self.settings = data_plane.settings

    async def classify(self, request: Request) -> Response:
        async with self.data_plane.open(request) as context:
            timeout_s = timeout_of(context.headers, self.settings.deadline_s)
            images = parse_body(context, self.data_plane.max_images(context.serving.library.input))
            probabilities = await self.data_plane.classify(context, images, timeout_s)
            with self.data_plane.encoding():
                return self.respond(request.scope[REQUEST_ID], context.serving.library, probabilities)

    def respond(self, request_id: str, library: ServedLibrary, probabilities: Probabilities) -> Response:
        predictions = [self.prediction(row, library.classes) for row in probabilities.tolist()]
        answer: schemas.Classification = {
            "request_id": request_id,
            "library": library.digest,
            "predictions": predictions,
        }
        return json_response(answer)

    def prediction(self, row: list[float], classes: Sequence[str]) -> schemas.Prediction:
        """As much as DETAIL allows: nothing but the label, or with it the likeliest classes and their probabilities.
        Of equals the first class, as argmax has it."""
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)
        if self.settings.output_detail == "label":
            return {"label": classes[order[0]], "index": order[0]}
        values = row if self.settings.output_detail == "full" else [round(value, DIGITS) for value in row]
        likeliest: list[schemas.Candidate] = [
            {"label": classes[index], "index": index, "probability": values[index]}
            for index in order[: self.settings.top_k]
        ]
        return {**likeliest[0], "top": likeliest}

    async def live(self, _: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, _: Request) -> Response:
        if not self.data_plane.manager.ready:
            raise NotReady
        return json_response({"ready": True})


def timeout_of(headers: Mapping[bytes, bytes], longest_s: float) -> float | None:
    """Seconds that the client will wait; None where it does not say. Raises BadRequest."""
    if TIMEOUT not in headers:
        return None
    timeout_ms = whole_number(headers[TIMEOUT])
    if not timeout_ms:
        raise BadRequest(ErrorMessage.TIMEOUT_HEADER)
    return min(timeout_ms / 1000, longest_s)


def parse_body(context: InferenceContext, max_images: int) -> list[bytes]:
    """The encoded images of a body: the body itself, the parts of a form, or the base64 strings of its JSON. The bytes
    decide which, unless the content type promises neither."""
    kind = media_type(context.headers)
    if kind == form_data.MEDIA_TYPE:
        return form_data.read_parts(context.body, context.headers[b"content-type"], max_images)
    if not is_unnamed(kind) and not is_json(kind) and not kind.startswith(b"image/"):
        raise UnsupportedMediaType(ErrorMessage.JSON_TYPE if looks_like_json(context.body) else ErrorMessage.BODY_TYPE)
    if not context.body:
        raise BadRequest(ErrorMessage.EMPTY_BODY)
    if is_json(kind) or (is_unnamed(kind) and looks_like_json(context.body)):
        return parse_json_images(parse_json(context.body))
    if sniff(context.body) is None:
        raise UnsupportedMediaType(
            ErrorMessage.IMAGE_FORMAT if kind.startswith(b"image/") else ErrorMessage.BODY_NEITHER
        )
    return [context.body]


def parse_json_images(content: Json) -> list[bytes]:
    images = content.get("images")
    if set(content) != {"images"} or not isinstance(images, list) or not images:
        raise BadRequest(ErrorMessage.JSON_IMAGES)
    if not all(isinstance(image, str) for image in images):
        raise BadRequest(ErrorMessage.JSON_IMAGES)
    return [from_base64(image) for image in images]


def router(api: ClassifyApi) -> APIRouter:
    routes = APIRouter(route_class=RawRoute, tags=["Classification and health"])
    timeout = openapi.header_parameter(
        "Tombola-Timeout-Ms",
        "How long to wait for the answer, at most the server's own deadline; then 504.",
        type="integer",
        minimum=1,
    )
    routes.add_api_route(
        PATH,
        api.classify,
        methods=["POST"],
        **openapi.operation(
            "classify",
            "Classify one image, which is the body, or several in JSON",
            openapi.json_answer(schemas.Classification, "One prediction for each image."),
            refuses=REFUSES,
            parameters=[timeout, openapi.header_parameter("Content-Encoding", "gzip or deflate.", type="string")],
            body=BODY,
        ),
    )
    routes.add_api_route(PATH, api.classify, methods=["PUT"], include_in_schema=False)  # curl -T
    for path, endpoint, about in health(api.live, api.ready):
        routes.add_api_route(path, endpoint, methods=["GET"], **about)
    return routes


def health(live: Endpoint, ready: Endpoint) -> Iterator[tuple[str, Endpoint, dict[str, Any]]]:
    """The probes of either plane: path, endpoint, description."""
    alive = openapi.json_answer(schemas.Live, "The process runs.")
    is_ready = openapi.json_answer(schemas.Ready, "A verified library is warm.")
    yield "/health/live", live, openapi.operation("live", "Tell whether the process runs", alive, security=[])
    about = openapi.operation(
        "ready", "Tell whether the server can classify", is_ready, refuses=[NotReady], security=[]
    )
    yield "/health/ready", ready, about


def fast_routes(api: ClassifyApi) -> dict[str, FastRoute]:
    return {PATH: (RawRoute(PATH, api.classify, methods=["POST"]), {})}
