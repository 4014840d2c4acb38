"""HEAD on every route of both planes, and pages of other origins."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI

from service.errors import ErrorMessage
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings, SettingsRejected, read_settings
from service.web.auth import ApiKeyStore
from service.web.public_app import create_public_app
from tests.support.planes import ask, refused
from tests.support.serving import Process, serving, tiny_library

pytestmark = pytest.mark.usefixtures("warm_start")

PAGE: Final = "https://app.example"
CHANGING: Final = {"x-request-id", "content-length"}  # differ from one GET to the next, too: metrics, times
UNDESCRIBED: Final = {
    "public": ("/openapi.json", "/nothing", "/v2/logging", "/v2/systemsharedmemory/a/b"),
    "admin": ("/openapi.json", "/nothing", "/", "/console/index.html", "/console/nothing", "/metrics"),
}
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """The service, and its admin token."""
    folder = tmp_path_factory.mktemp("service")
    library = tiny_library(folder / "library")
    with serving(library.path, folder / "state", "--cors-origins", PAGE) as running:
        yield running, (folder / "state" / "admin-token").read_text().strip()


class Plane:
    """Asks one plane over one connection, so that a body after HEAD would be read as the next answer."""

    def __init__(self, url: str, token: str) -> None:
        self.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        self.headers = {"authorization": f"Bearer {token}"}

    def ask(self, method: str, path: str, **headers: str) -> Answer:
        self.connection.request(method, path, headers=self.headers | headers)
        response = self.connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return response.status, fields, response.read()


@contextmanager
def plane(process: tuple[Process, str], name: str) -> Iterator[Plane]:
    running, token = process
    opened = Plane(running.public if name == "public" else running.admin, token)
    with closing(opened.connection):
        yield opened


@pytest.mark.parametrize("name", ["public", "admin"])
def test_head_is_answered_wherever_get_is_with_its_headers_and_without_a_body(
    process: tuple[Process, str], name: str
) -> None:
    with plane(process, name) as client:
        described: dict[str, Any] = json.loads(client.ask("GET", "/openapi.json")[2])["paths"]
        paths = [*described, *UNDESCRIBED[name]]
        assert len(paths) > 10
        assert {200, 404} <= {compare(client, path) for path in paths}


def compare(client: Plane, path: str) -> int:
    """Compares HEAD with GET; the status of both."""
    for word, value in {"{model}": "tombola", "{version}": "1", "{name}": "nothing", "{id}": "nothing"}.items():
        path = path.replace(word, value)
    status, expected, _ = client.ask("GET", path)
    head_status, headers, body = client.ask("HEAD", path)
    assert (head_status, body) == (status, b""), path
    assert set(headers) == set(expected), path
    same = set(expected) - (CHANGING if path in ("/metrics", "/admin/overview", "/admin/history") else {"x-request-id"})
    assert {header: headers[header] for header in same} == {header: expected[header] for header in same}, path
    return status


def test_head_is_counted_by_its_route_and_its_own_name(process: tuple[Process, str]) -> None:
    with plane(process, "public") as client:
        client.ask("HEAD", "/v2/models/tombola/config")
    series = 'http_requests_total{code="200",method="HEAD",route="/v2/models/{model}/config"}'
    assert process[0].metric(series) >= 1


METHODS: Final = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
ALLOWED: Final = {
    "public": {
        "/": "GET, HEAD",
        "/health/ready": "GET, HEAD",
        "/docs/start.js": "GET, HEAD",
        "/v1/classify": "POST, PUT",
        "/v2/models/tombola/infer": "POST",
        "/v2/models/tombola/versions/1": "GET, HEAD",
    },
    "admin": {
        "/metrics": "GET, HEAD",
        "/admin/audits": "GET, HEAD, POST",
        "/admin/audits/some-id": "DELETE, GET, HEAD",
        "/admin/datasets/some-name": "PUT",
        "/console/app.js": "GET, HEAD",
    },
}


@pytest.mark.parametrize("name", ["public", "admin"])
def test_a_method_that_is_not_allowed_is_answered_with_all_that_are(process: tuple[Process, str], name: str) -> None:
    """Whatever the method, those that have routes of their own among them, and whichever route is the first."""
    with plane(process, name) as client:
        for path, allowed in ALLOWED[name].items():
            for method in {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"} - {
                *allowed.split(", ")
            }:
                status, headers, body = client.ask(method, path)
                assert (status, headers.get("allow")) == (405, allowed), (method, path)
                assert body == b"" if method == "HEAD" else json.loads(body) == {"error": ErrorMessage.METHOD}
        assert "allow" not in client.ask("OPTIONS", "/nothing")[1]


def test_every_route_of_a_plane_is_named_by_allow() -> None:
    """Each documented path against the methods of the document, so that a new route cannot be left out."""
    app = app_for("")
    for path, operations in app.openapi()["paths"].items():
        expected = {method.upper() for method in operations}
        response = ask(app, "PATCH", path.replace("{model}", "tombola").replace("{version}", "1"))
        assert response.status_code == 405
        assert expected <= set(response.headers["allow"].split(", "))


# Pages of other origins


def app_for(origins: str) -> FastAPI:
    settings, metrics = Settings(cors_origins=origins), Metrics()
    return create_public_app(LibraryManager(settings, metrics), settings, metrics, ApiKeyStore(None, metrics))


def preflight(app: FastAPI, origin: str, method: str = "POST", wanted: str = "") -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": method}
    if wanted:
        headers["access-control-request-headers"] = wanted
    return ask(app, "OPTIONS", "/v1/classify", headers=headers)


def cross_origin(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


def test_without_the_setting_no_page_of_another_origin_is_allowed() -> None:
    app = app_for("")
    assert cross_origin(ask(app, "GET", "/health/live", headers={"origin": PAGE})) == {}
    response = preflight(app, PAGE)
    refused(response, 405, ErrorMessage.METHOD)
    assert cross_origin(response) == {}


def test_a_page_that_is_named_may_ask_and_read_answers_and_refusals_alike() -> None:
    app = app_for(f"http://localhost:3000, {PAGE}")
    for origin in (PAGE, "http://localhost:3000"):
        response = preflight(app, origin, "POST", "authorization, content-type,tombola-timeout-ms")
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["access-control-allow-origin"] == origin
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "Authorization" in response.headers["access-control-allow-headers"]
        assert "Origin" in response.headers["vary"]
        for method, path in (("GET", "/health/live"), ("POST", "/v1/classify"), ("GET", "/nothing")):
            answered = ask(app, method, path, headers={"origin": origin})
            assert answered.headers["access-control-allow-origin"] == origin
            assert "Origin" in answered.headers["vary"]
            assert "X-Request-Id" in answered.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("origin", "method", "wanted"),
    [
        ("https://other.example", "POST", ""),
        ("null", "POST", ""),
        (PAGE + ".evil.example", "POST", ""),
        ("http://app.example", "POST", ""),
        (PAGE, "DELETE", ""),
        (PAGE, "POST", "cookie"),
    ],
)
def test_every_other_preflight_is_refused_in_the_error_form(origin: str, method: str, wanted: str) -> None:
    response = preflight(app_for(PAGE), origin, method, wanted)
    refused(response, 400, ErrorMessage.CROSS_ORIGIN)
    assert cross_origin(response) == {}
    assert "Origin" in response.headers["vary"]


def test_another_page_s_request_gets_no_permission_to_be_read() -> None:
    response = ask(app_for(PAGE), "GET", "/health/live", headers={"origin": "https://other.example"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers
    assert "Origin" in response.headers["vary"]


@pytest.mark.parametrize("origins", ["*", PAGE, f"*, {PAGE}"])
def test_cookies_are_never_asked_for(origins: str) -> None:
    app = app_for(origins)
    for response in (preflight(app, PAGE), ask(app, "GET", "/health/live", headers={"origin": PAGE, "cookie": "a=b"})):
        assert response.headers["access-control-allow-origin"] == ("*" if "*" in origins else PAGE)
        assert "access-control-allow-credentials" not in response.headers


def test_the_admin_plane_never_allows_another_origin(process: tuple[Process, str]) -> None:
    page = {"origin": PAGE, "access-control-request-method": "GET"}
    with plane(process, "admin") as client:
        for path in ("/metrics", "/admin/library", "/health/live", "/"):
            for method in ("OPTIONS", "GET"):
                _, headers, _ = client.ask(method, path, **page)
                assert not [name for name in headers if name.startswith("access-control-")]
    with plane(process, "public") as client:
        status, headers, _ = client.ask("OPTIONS", "/v1/classify", **page)
        assert (status, headers["access-control-allow-origin"]) == (204, PAGE)


@pytest.mark.parametrize(
    "origins",
    ["app.example", "https://app.example/", "https://App.example", "https://app.example:443", "null", "https://*.a.b"],
)
def test_an_origin_that_no_browser_sends_is_refused_when_it_is_set(origins: str) -> None:
    with pytest.raises(SettingsRejected, match=r"^TOMBOLA_CORS_ORIGINS '.*': expected \* or scheme://host") as rejected:
        read_settings({"cors_origins": f"{PAGE},{origins}"})
    assert "\n" not in str(rejected.value)
