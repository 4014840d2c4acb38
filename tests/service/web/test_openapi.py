"""The OpenAPI documents: valid, complete, true of a real server's answers, and enough to generate a client from."""

import asyncio
import base64
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from model_store.json_object import Json
from service.errors import ErrorMessage
from service.web.openapi import with_short_names
from tests.support.serving import Process, serving, tiny_library
from tests.support.tickets import CLASSES
from tombola.sample_image import draw_sample
from tools.reference import apps

pytestmark = pytest.mark.usefixtures("warm_start")

PLANES: Final = ("public", "admin")
INFER: Final[Json] = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}
AUDIT: Final[Json] = {"profile": "smoke", "images": 2, "attacks": ["fgsm"], "epsilons": [8]}


class Server:
    """A real server, its admin token and its two documents."""

    def __init__(self, process: Process, state: Path) -> None:
        self.urls = {"public": process.public, "admin": process.admin}
        self.token = (state / "admin-token").read_text(encoding="utf-8").strip()
        authorised = {"admin": {"authorization": f"Bearer {self.token}"}, "public": {}}
        self.clients = {
            plane: httpx.Client(base_url=self.urls[plane], headers=authorised[plane], timeout=120, trust_env=False)
            for plane in PLANES
        }
        self.documents: dict[str, Json] = {plane: self.clients[plane].get("/openapi.json").json() for plane in PLANES}

    def operations(self, plane: str) -> Iterator[tuple[str, str, Json]]:
        for path, methods in self.documents[plane]["paths"].items():
            for method, about in methods.items():
                yield method.upper(), path, about


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openapi")
    tiny_library(folder / "library")
    with serving(folder / "library", folder / "state") as process:
        made = Server(process, folder / "state")
        yield made
        for client in made.clients.values():
            client.close()


# The documents


@pytest.mark.parametrize("plane", PLANES)
def test_a_document_is_valid(server: Server, plane: str) -> None:
    validate(server.documents[plane])
    assert server.documents[plane]["openapi"].startswith("3.1")


@pytest.mark.parametrize("plane", PLANES)
def test_every_operation_says_what_it_is_what_it_takes_what_it_answers_and_who_may_ask(
    server: Server, plane: str
) -> None:
    names = []
    for method, path, about in server.operations(plane):
        names.append(about["operationId"])
        assert len(about["summary"].split()) >= 3, path
        assert about["tags"], path
        declared = {each["name"] for each in about.get("parameters", ()) if each["in"] == "path"}
        assert declared == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert all(each["description"] and each["schema"] for each in about.get("parameters", ()))
        assert ("requestBody" in about) == (method in ("POST", "PUT") and path not in BODILESS), path
        assert all(scheme in server.documents[plane]["components"]["securitySchemes"] for scheme in schemes(about))
        answers = about["responses"]
        (success,) = (int(status) for status in answers if status.startswith("2"))
        assert all(body["schema"] for body in answers[str(success)]["content"].values()), path
        refusals = [answer for status, answer in answers.items() if not status.startswith("2")]
        assert {"500", "default"} <= set(answers)
        assert all(answer["content"] == ERROR_CONTENT and answer["description"] for answer in refusals), path
        assert all("X-Request-Id" in answer["headers"] for answer in answers.values())
    assert len(set(names)) == len(names)


BODILESS: Final = ("/v2/repository/index", "/admin/library", "/admin/library/diff")  # their bodies are not read
ERROR_CONTENT: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}


def schemes(about: Json) -> set[str]:
    return {name for alternative in about["security"] for name in alternative}


def test_the_admin_plane_s_document_wants_the_token_where_the_plane_does(server: Server) -> None:
    """In process, each request from an address of its own: one address may fail ten times."""
    (_, _), (_, app) = apps()

    async def refused(number: int, method: str, path: str) -> bool:
        transport = httpx.ASGITransport(app, client=(f"10.0.0.{number}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as stranger:
            return (await stranger.request(method, path.replace("{", "").replace("}", ""))).status_code == 401

    for number, (method, path, about) in enumerate(server.operations("admin")):
        wanted = about["security"] == [{"adminToken": []}]
        assert asyncio.run(refused(number, method, path)) == wanted, path


def test_keys_are_optional_in_the_document_only_where_the_server_has_none(server: Server, tmp_path: Path) -> None:
    from service.library_manager import LibraryManager
    from service.observability.metrics import Metrics
    from service.settings import Settings
    from service.web.auth import ApiKeyStore
    from service.web.public_app import create_public_app

    (tmp_path / "keys").write_text(f"someone {'0' * 64}\n")
    settings, metrics = Settings(api_keys_file=tmp_path / "keys"), Metrics()
    keys = ApiKeyStore(settings.api_keys_file, metrics)
    document = create_public_app(LibraryManager(settings, metrics), settings, metrics, keys).openapi()
    assert document["paths"]["/v1/classify"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    without = server.documents["public"]["paths"]["/v1/classify"]["post"]["security"]
    assert without == [{}, {"bearer": []}, {"header": []}]


def test_models_of_equal_names_get_short_names_of_their_modules() -> None:
    document = {
        "paths": {"/": {"$ref": "#/components/schemas/a__deep_module__Name"}},
        "components": {"schemas": {"a__deep_module__Name": {"title": "Name"}, "Other": {"title": "Other"}}},
    }
    assert with_short_names(document) == {
        "paths": {"/": {"$ref": "#/components/schemas/DeepModuleName"}},
        "components": {"schemas": {"DeepModuleName": {"title": "DeepModuleName"}, "Other": {"title": "Other"}}},
    }


# The documents and the server


def closed(schema: Any) -> Any:
    """The same schema, in which no object has a property that is not listed."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    if "properties" in schema:
        made["additionalProperties"] = False
    return made


def check(server: Server, plane: str, method: str, path: str, answer: httpx.Response) -> None:
    """That an answer is one of those that the document lists, to the last property."""
    document = server.documents[plane]
    responses = document["paths"][path][method.lower()]["responses"]
    described = responses[str(answer.status_code)]  # KeyError: a status that the document does not know
    content = described["content"][answer.headers["content-type"].partition(";")[0]]
    if "json" in answer.headers["content-type"]:
        root = {"components": {"schemas": closed(document["components"]["schemas"])}, **content["schema"]}
        Draft202012Validator(root).validate(answer.json())


CALLS: Final[tuple[tuple[str, str, str, int, Json], ...]] = (
    ("public", "POST", "/v1/classify", 200, {"content": draw_sample()}),
    ("public", "POST", "/v1/classify", 200, {"json": {"images": [base64.b64encode(draw_sample()).decode()] * 2}}),
    ("public", "POST", "/v1/classify", 415, {"content": b"no picture"}),
    ("public", "POST", "/v1/classify", 400, {"json": {"images": []}}),
    ("public", "GET", "/v2/models/{model}", 404, {"path": "/v2/models/another"}),
    ("admin", "GET", "/admin/audits/{id}", 404, {"path": "/admin/audits/none"}),
    ("admin", "POST", "/admin/audits", 400, {"json": {"profile": "none"}}),
    ("admin", "POST", "/admin/audits", 404, {"json": {**AUDIT, "data": "none"}}),
    ("admin", "POST", "/admin/audits/cost", 200, {"json": AUDIT}),
    ("admin", "POST", "/admin/try", 200, {"content": draw_sample()}),
    ("admin", "POST", "/admin/library", 200, {}),
    ("admin", "PUT", "/admin/datasets/{name}", 400, {"path": "/admin/datasets/one", "content": b"no zip"}),
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[1]} {call[2]} {call[3]}")
def test_an_answer_is_as_its_document_says(server: Server, call: tuple[str, str, str, int, Json]) -> None:
    plane, method, path, status, request = call
    target = request.get("path", path)
    options = {name: value for name, value in request.items() if name != "path"}
    answer = server.clients[plane].request(method, target, **options)
    assert answer.status_code == status, answer.text
    check(server, plane, method, path, answer)


@pytest.mark.parametrize("plane", PLANES)
def test_every_answer_without_a_body_to_send_is_as_its_document_says(server: Server, plane: str) -> None:
    seen = 0
    for method, path, about in server.operations(plane):
        if "requestBody" in about or "{id}" in path or method not in ("GET", "POST") or path == "/admin/library":
            continue
        answer = server.clients[plane].request(method, path.format(model="tombola", version="1"))
        assert answer.status_code == 200, path
        check(server, plane, method, path, answer)
        seen += 1
    assert seen >= {"public": 14, "admin": 7}[plane]


@pytest.mark.parametrize(("binary", "kind"), [(False, "application/json"), (True, "application/octet-stream")])
def test_an_inference_is_as_its_document_says(server: Server, binary: bool, kind: str) -> None:
    body = json.loads(json.dumps(INFER))
    body["inputs"][0]["data"] = [base64.b64encode(draw_sample()).decode()]
    body["parameters"] = {"binary_data_output": binary}
    described = server.documents["public"]["components"]["schemas"]
    root = {"components": {"schemas": closed(described)}, "$ref": "#/components/schemas/InferRequestBody"}
    Draft202012Validator(root).validate(body)
    answer = server.clients["public"].post("/v2/models/tombola/infer", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == kind
    check(server, "public", "POST", "/v2/models/{model}/infer", answer)


# A client that is generated


@pytest.fixture(scope="module")
def generated(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A client of each plane, made by openapi-python-client in a process of its own and imported from its folder."""
    folder = tmp_path_factory.mktemp("generated")
    for plane in PLANES:
        (folder / f"{plane}.json").write_text(json.dumps(server.documents[plane]))
        command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
        command += ["--path", str(folder / f"{plane}.json"), "--output-path", str(folder / f"{plane}_client")]
        subprocess.run(command, check=True, capture_output=True, env={"PATH": str(Path(sys.executable).parent)})
    sys.path.insert(0, str(folder))
    yield SimpleNamespace(load=importlib.import_module)
    sys.path.remove(str(folder))


@contextmanager
def client_of(
    generated: SimpleNamespace, server: Server, plane: str, kind: str = "Client", **options: str
) -> Iterator[Any]:
    make = getattr(generated.load(f"{plane}_client"), kind)
    with make(base_url=server.urls[plane], httpx_args={"trust_env": False}, **options) as client:
        yield client


def test_a_generated_client_classifies_a_picture(server: Server, generated: SimpleNamespace) -> None:
    classify = generated.load("public_client.api.classification_and_health.classify").sync
    types, models = generated.load("public_client.types"), generated.load("public_client.models")
    several = models.ClassifyRequest(images=[base64.b64encode(draw_sample()).decode()] * 2)
    with client_of(generated, server, "public") as client:
        answer = classify(client=client, body=types.File(payload=io.BytesIO(draw_sample())))
        assert answer.predictions[0].label in CLASSES
        assert 0 < answer.predictions[0].probability <= 1
        assert len(classify(client=client, body=several).predictions) == 2
        refused = classify(client=client, body=types.File(payload=io.BytesIO(b"no picture")))
    assert refused == models.ErrorBody(ErrorMessage.BODY_NEITHER)


def test_a_generated_client_infers_by_the_open_inference_protocol(server: Server, generated: SimpleNamespace) -> None:
    infer = generated.load("public_client.api.open_inference_protocol_v_2.infer").sync
    models = generated.load("public_client.models")
    body = {"inputs": [{**INFER["inputs"][0], "data": [base64.b64encode(draw_sample()).decode()]}]}
    request = models.InferRequestBody.from_dict(body)
    with client_of(generated, server, "public") as client:
        answer = infer(model=models.InferModel("tombola"), client=client, body=request)
    assert {output.name for output in answer.outputs} == {"probabilities", "index", "label"}


def test_a_generated_client_starts_an_audit_and_cancels_it(server: Server, generated: SimpleNamespace) -> None:
    api, kind = "admin_client.api.audits", "AuthenticatedClient"
    submit = generated.load(f"{api}.submit_audit").sync
    request = generated.load("admin_client.models").Audit.from_dict(AUDIT)
    with client_of(generated, server, "admin", kind, token=server.token) as client:
        submitted = submit(client=client, body=request)
        assert submitted.state == "queued"
        assert submitted.cost.attacks >= 1
        assert generated.load(f"{api}.get_audit").sync(submitted.id, client=client).id == submitted.id
        assert generated.load(f"{api}.cancel_audit").sync(submitted.id, client=client).state == "cancelled"
    with client_of(generated, server, "admin", kind, token="wrong") as stranger:
        assert submit(client=stranger, body=request).error == ErrorMessage.TOKEN_REQUIRED
