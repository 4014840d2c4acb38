"""The OpenAPI document of a plane, and the page /docs: Swagger UI over it, from files of the package."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.web.routing import RawRoute, json_response
from service.web.static_files import NOTHING, find, read_folder

FOLDER: Final = Path(__file__).parent / "docs"
PAGE: Final = "index.html"
POLICY: Final = (
    f"{NOTHING}; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'"
)


def router(document: Callable[[], Any]) -> APIRouter:
    """The page and the document, neither of which holds a secret. The files are read once, here.

    document: makes the OpenAPI document, which takes half a second the first time.
    """
    files = read_folder(FOLDER, {PAGE: POLICY})

    async def page(_: Request) -> Response:
        return files[PAGE]

    async def file(request: Request) -> Response:
        return find(files, request)

    async def described(_: Request) -> Response:
        return json_response(await asyncio.to_thread(document))

    routes = APIRouter(route_class=RawRoute)
    routes.add_api_route("/openapi.json", described, methods=["GET"], include_in_schema=False)
    routes.add_api_route("/docs", page, methods=["GET"], include_in_schema=False)
    routes.add_api_route("/docs/{name}", file, methods=["GET"], include_in_schema=False)
    return routes
