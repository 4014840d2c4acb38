"""`GET /` of the public plane: what answers here, for a person with a browser."""

from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.web.routing import RawRoute
from service.web.static_files import HEADERS, NOTHING

PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Tombola</title>
<h1>Tombola</h1>
<p>An image classifier: a fresh random ensemble of adversarially robust lottery tickets for every image.</p>
<p><code>curl --data-binary @image.png http://HOST:PORT/v1/classify</code></p>
<ul>
<li><a href="docs">Every route, to read and to try</a></li>
<li><a href="health/ready">Whether it is ready</a></li>
<li><a href="v2">The server in terms of the Open Inference Protocol</a></li>
</ul>
</html>
"""


def router() -> APIRouter:
    """The page holds nothing of the request: links are relative, so that it works behind any proxy."""
    page = Response(
        PAGE,
        media_type="text/html",
        headers={"content-security-policy": f"{NOTHING}; frame-ancestors 'none'", **HEADERS},
    )

    async def index(_: Request) -> Response:
        return page

    routes = APIRouter(route_class=RawRoute)
    routes.add_api_route("/", index, methods=["GET"], include_in_schema=False)
    return routes
