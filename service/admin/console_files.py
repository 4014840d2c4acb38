"""Serves the console's own files. They hold no secrets and need no token; everything they show, the page asks for."""

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.errors import NotFound
from service.web.inference import RawRoute

FOLDER: Final = Path(__file__).parent / "console"
PAGE: Final = "index.html"
FRAME: Final = "report.html"
KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
NOTHING: Final = "default-src 'none'; base-uri 'none'; form-action 'none'"
POLICIES: Final = {
    PAGE: f"{NOTHING}; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "frame-src 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    # An audit's report is a page with styles of its own: it is shown in a frame that may have them, and no script.
    FRAME: f"{NOTHING}; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox allow-same-origin",
}


def read_files() -> dict[str, Response]:
    """Every file of the folder as its answer, by name."""
    return {path.name: answer(path) for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS}


def answer(path: Path) -> Response:
    policy = POLICIES.get(path.name, f"{NOTHING}; frame-ancestors 'none'")
    headers = {"content-type": KINDS[path.suffix], "content-security-policy": policy, **HEADERS}
    return Response(path.read_bytes(), headers=headers)


def router() -> APIRouter:
    """The files are read once, here. AdminGate lets these paths pass, and Guard adds no-store."""
    files = read_files()

    async def page(_: Request) -> Response:
        return files[PAGE]

    async def file(request: Request) -> Response:
        content = files.get(request.path_params["name"])
        if content is None:
            raise NotFound
        return content

    routes = APIRouter(route_class=RawRoute, tags=["Console"])
    routes.add_api_route("/", page, methods=["GET"])
    routes.add_api_route("/console/{name}", file, methods=["GET"])
    return routes
