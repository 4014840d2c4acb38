"""Routes whose endpoints read requests themselves, past the framework's parsing and, for the busiest, its routing."""

import json
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

ARRIVAL_TIME: Final = "tombola.arrived"
"""Where a scope may hold when the event loop had read its headers, on the loop's clock."""
METHODS: Final = ("DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
ZERO_WEIGHT: Final = re.compile(r"[qQ]\s*=\s*0(\.0{0,3})?")


ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def json_response(content: Any, status: int = 200) -> Response:
    return Response(ENCODER.encode(content), status, media_type="application/json")


def without_refused(header: str) -> str:
    """The codings that an Accept-Encoding header names with a weight above 0 (RFC 9110, 12.4.2), without weights."""
    items = (item.partition(";") for item in header.split(","))
    return ",".join(name.strip() for name, _, weight in items if not ZERO_WEIGHT.fullmatch(weight.strip()))


def allowed_methods(routes: Iterable[BaseRoute], scope: Scope) -> list[str]:
    """The methods of a request's path over all of its routes; HEAD is answered wherever GET is."""
    known = list(routes)
    methods = [method for method in METHODS if any(is_for(route, scope, method) for route in known)]
    return sorted([*methods, "HEAD"] if "GET" in methods else methods)


def is_for(route: BaseRoute, scope: Scope, method: str) -> bool:
    return route.matches({**scope, "method": method})[0] is Match.FULL


class RawRoute(APIRoute):
    """A documented route whose endpoint takes the request and returns the response, without FastAPI's machinery of
    parameters: bodies are read raw, since no client sends the content type that a declared body insists on."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


FastRoute = tuple[RawRoute, Mapping[str, str]]
"""A route with the parameters of its path."""


class FastPathMiddleware:
    """Middleware that takes the busiest paths past the framework's routing, which costs a quarter of such a request.
    The endpoints are those of the routes; other methods go the usual way, to the usual 405."""

    def __init__(self, app: ASGIApp, *, routes: Mapping[str, FastRoute]) -> None:
        self.app = app
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"], scope["path_params"] = route
        response: Response = await route[0].endpoint(Request(scope, receive))
        await response(scope, receive, send)
