"""The OpenAPI documents of both planes: what each operation takes, answers and refuses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from typing import Annotated, Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import Field, TypeAdapter
from starlette.responses import Response
from typing_extensions import TypedDict

from model_store.json_object import Json
from service.errors import EngineFailed, ErrorMessage

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
REFERENCE: Final = "#/components/schemas/{model}"
BINARY: Final = {"type": "string", "format": "binary"}
Schema = Any  # a model, or a schema as a dict


class ErrorBody(TypedDict):
    """Why there is no answer."""

    error: Annotated[str, Field(description="a sentence for a person; programs decide by the status")]


@dataclass(frozen=True)
class Answer:
    """A successful answer. content: media type -> a model, which must be JSON, or a schema."""

    description: str
    content: Mapping[str, Schema]
    status: int = 200
    headers: Mapping[str, Json] = field(default_factory=dict)


def json_answer(model: Any, description: str, status: int = 200) -> Answer:
    return Answer(description, {JSON: model}, status)


def text_answer(description: str, *media_types: str) -> Answer:
    return Answer(description, {media_type: {"type": "string"} for media_type in media_types})


def operation(
    name: str,
    summary: str,
    answer: Answer,
    *,
    refuses: Sequence[type[Exception]] = (),
    parameters: Sequence[Json] = (),
    body: Mapping[str, Json] | None = None,
    security: Sequence[Json] | None = None,
) -> dict[str, Any]:
    """The arguments of add_api_route that describe one operation.

    Args:
      name: the operation's id; clients that are generated name their functions after it.
      refuses: errors with a `status`; any operation may also answer 500.
      parameters, body: as in OpenAPI; body maps media types to schemas.
      security: None for the plane's own, [] for none.
    """
    extra: Json = {"parameters": list(parameters)} if parameters else {}
    if body is not None:
        content = {media_type: {"schema": schema} for media_type, schema in body.items()}
        extra["requestBody"] = {"required": True, "content": content}
    if security is not None:
        extra["security"] = list(security)
    return {
        "operation_id": name,
        "summary": summary,
        "status_code": answer.status,
        "response_class": Response,
        "responses": {answer.status: success(answer), **refusals((*refuses, EngineFailed))},
        "openapi_extra": extra,
    }


def success(answer: Answer) -> Json:
    models = [schema for schema in answer.content.values() if not isinstance(schema, dict)]
    schemas = {kind: {"schema": schema} for kind, schema in answer.content.items() if isinstance(schema, dict)}
    described: Json = {"description": answer.description, "headers": dict(answer.headers)}
    return described | ({"content": schemas} if schemas else {}) | ({"model": models[0]} if models else {})


def refusals(kinds: Sequence[type[Exception]]) -> dict[int | str, Json]:
    """One response for each status of these errors, and a default for what the server refuses before it routes."""
    reasons: dict[int, list[type[Exception]]] = {}
    for kind in kinds:
        reasons.setdefault(kind.status, []).append(kind)  # type: ignore[attr-defined]
    responses: dict[int | str, Json] = {status: refusal(together) for status, together in sorted(reasons.items())}
    return responses | {"default": error_response("Any other refusal, in the same form.")}


def refusal(kinds: Sequence[type[Exception]]) -> Json:
    headers: Json = {}
    if any(getattr(kind, "retry_after_s", None) is not None for kind in kinds):
        headers["Retry-After"] = {"schema": {"type": "integer"}, "description": "Seconds until it is worth a try."}
    return error_response(" ".join(map(reason, kinds))) | {"headers": headers}


def error_response(description: str) -> Json:
    """Refers to the model by name: FastAPI would prepare a validator of it for each of a plane's hundred refusals."""
    return {"description": description, "content": {JSON: {"schema": reference(ErrorBody)}}}


def reason(kind: type[Exception]) -> str:
    text: ErrorMessage | None = getattr(kind, "text", None)
    return cleandoc(kind.__doc__ or "") if text is None else text.format(limit="N", height="H", width="W")


def path_parameter(name: str, description: str, **schema: Any) -> Json:
    given = {"type": "string", **schema}
    return {"name": name, "in": "path", "required": True, "schema": given, "description": description}


def header_parameter(name: str, description: str, **schema: Any) -> Json:
    return {"name": name, "in": "header", "schema": schema, "description": description}


def reference(model: type) -> Json:
    """A schema of the document's components, where DocumentedApp puts ErrorBody and the models of `requests`."""
    return {"$ref": REFERENCE.format(model=model.__name__)}


class DocumentedApp(FastAPI):
    """A FastAPI application whose document has security schemes, and models of bodies that are read raw.

    Args:
      schemes: security schemes by name.
      security: of every operation that does not say otherwise.
      requests: models of request bodies.
    """

    def __init__(
        self, *, schemes: Mapping[str, Json], security: Sequence[Json], requests: Sequence[type], **options: Any
    ) -> None:
        super().__init__(**options)
        self.schemes, self.security, self.requests = dict(schemes), list(security), tuple(requests)

    def openapi(self) -> Json:
        """The document, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = self.document()
        return self.openapi_schema

    def document(self) -> Json:
        made = get_openapi(title=self.title, version=self.version, description=self.description, routes=self.routes)
        components = made.setdefault("components", {})
        components["securitySchemes"] = self.schemes
        components.setdefault("schemas", {}).update(model_schemas((ErrorBody, *self.requests)))
        components["headers"] = {
            "X-Request-Id": {"schema": {"type": "string"}, "description": "Names this request in the server's log."}
        }
        for methods in made["paths"].values():
            for about in methods.values():
                about.setdefault("security", self.security)
                for response in about["responses"].values():
                    content = response.get("content", {})
                    response["content"] = dict(sorted(content.items(), key=lambda item: item[0] != JSON))  # JSON first
                    response.setdefault("headers", {})["X-Request-Id"] = {"$ref": "#/components/headers/X-Request-Id"}
        return with_short_names(made)


def with_short_names(document: Json) -> Json:
    """Pydantic names models of equal names by their modules: a__b__Name becomes BName, which makes better classes."""
    schemas: Json = document["components"]["schemas"]
    text = json.dumps(document)
    for name in schemas:
        *_, module, model = ("", "", *name.split("__"))
        if module:
            short = "".join(part.title() for part in module.split("_")) + model
            text = text.replace(f'"{name}":', f'"{short}":').replace(f'/{name}"', f'/{short}"')
    renamed: Json = json.loads(text)
    for name, schema in renamed["components"]["schemas"].items():
        schema["title"] = name
    return renamed


def model_schemas(models: Sequence[type]) -> Json:
    """JSON schemas by component name, with those that they refer to."""
    schemas: Json = {}
    for model in models:
        schema = TypeAdapter(model).json_schema(ref_template=REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
