"""Serves the console's own files. They hold no secrets and need no token; everything they show, the page asks for."""

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.web.routing import RawRoute
from service.web.static_files import NOTHING, find, read_folder

FOLDER: Final = Path(__file__).parent / "console"
PAGE: Final = "index.html"
FRAME: Final = "report.html"
POLICIES: Final = {
    PAGE: f"{NOTHING}; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "frame-src 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    # An audit's report is a page with styles of its own: it is shown in a frame that may have them, and no script.
    FRAME: f"{NOTHING}; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox allow-same-origin",
}


def router() -> APIRouter:
    """The files are read once, here. AdminAuthMiddleware lets these paths pass."""
    files = read_folder(FOLDER, POLICIES)

    async def page(_: Request) -> Response:
        return files[PAGE]

    async def file(request: Request) -> Response:
        return find(files, request)

    routes = APIRouter(route_class=RawRoute, tags=["Console"])
    routes.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    routes.add_api_route("/console/{name}", file, methods=["GET"], include_in_schema=False)
    return routes
