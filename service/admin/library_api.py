"""The admin plane: metrics, and what is being served. Audits and the console have routers of their own.

Nothing here is reachable from the public plane, and AdminAuthMiddleware stands before all of it.
"""

import asyncio
import gzip
import logging
from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter
from prometheus_client.exposition import gzip_accepted
from starlette.requests import Request
from starlette.responses import Response

from model_store import policy as sampling
from model_store.errors import StoreError
from model_store.library import Library
from service.admin.schemas import LibraryDescription, PolicyDescription, Swap
from service.errors import Conflict, ErrorMessage, NotReady, ServiceError
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.web import openapi
from service.web.auth import ADMIN_REFUSES, ADMIN_SECURITY
from service.web.classify import health
from service.web.routing import RawRoute, json_response, without_refused

log = logging.getLogger(__name__)

Json = dict[str, Any]
REFUSES: Final = (*ADMIN_REFUSES, NotReady)


class LibraryRefused(ServiceError):
    status = 422
    text = ErrorMessage.LIBRARY_REFUSED


class LibraryApi:
    """One method per route."""

    def __init__(self, manager: LibraryManager, metrics: Metrics) -> None:
        self.manager = manager
        self.metrics = metrics
        self.swapping = asyncio.Lock()

    def library(self) -> Library:
        if self.manager.current is None:
            raise NotReady
        return self.manager.current.library

    async def show_metrics(self, request: Request) -> Response:
        body, content_type = self.metrics.exposition(request.headers.get("accept", ""))
        headers = {"content-type": content_type, "vary": "Accept, Accept-Encoding"}
        if gzip_accepted(without_refused(request.headers.get("accept-encoding", ""))):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers)

    async def live(self, _: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, _: Request) -> Response:
        if not self.manager.ready:
            raise NotReady
        return json_response({"ready": True})

    async def show_library(self, _: Request) -> Response:
        return json_response(describe_library(self.library()))

    async def show_policy(self, _: Request) -> Response:
        return json_response(describe_policy(self.library()))

    async def swap(self, _: Request) -> Response:
        """Opens the configured library again and, if all of it is sound, serves it instead of the present one. No body
        is read: which library is served is the settings' business, never a request's."""
        if self.swapping.locked():
            raise Conflict(ErrorMessage.SWAP_RUNNING)
        async with self.swapping:
            before = self.library().digest
            try:
                serving = await self.manager.reload()
            except StoreError as error:
                log.error("library refused, the old one keeps serving: %s", error)  # noqa: TRY400 -- says all there is
                raise LibraryRefused from None
        swap: Swap = {"digest": serving.library.digest, "before": before}
        return json_response(swap)


def describe_library(library: Library) -> Json:
    """The manifest with its digest: tickets, claims and provenance, as stored; and the input, in every version."""
    shown = library.manifest.model_dump(mode="json")
    counts = {"tickets": len(library.tickets), "baselines": len(library.baselines)}
    return {"digest": library.digest, **counts, **shown, "input": asdict(library.input)}


def describe_policy(library: Library) -> PolicyDescription:
    """The exact law of theta over this library."""
    policy = library.policy
    names = [entry.name for entry in library.entries]
    sizes = sampling.size_probabilities(policy)
    return {
        "library": library.digest,
        "groups": [[names[index] for index in group] for group in policy.groups],
        "sizes": list(policy.sizes),
        "every": policy.every,
        "replacement": policy.replacement,
        "states": sampling.states(policy),
        "entropy_bits": sampling.entropy_bits(policy),
        "expected_size": sampling.expected_size(policy),
        "size_probabilities": {str(n): probability for n, probability in sizes.items()},
        "inclusion_probabilities": dict(zip(names, sampling.inclusion_probabilities(policy), strict=True)),
    }


def router(manager: LibraryManager, metrics: Metrics) -> APIRouter:
    api = LibraryApi(manager, metrics)
    routes = APIRouter(route_class=RawRoute, tags=["Library and health"])
    exposition = openapi.text_answer("The metrics.", "text/plain", "application/openmetrics-text")
    scraped = openapi.operation("metrics", "Read every metric", exposition, security=[{}, *ADMIN_SECURITY])
    routes.add_api_route("/metrics", api.show_metrics, methods=["GET"], **scraped)
    for path, endpoint, about in health(api.live, api.ready):
        routes.add_api_route(path, endpoint, methods=["GET"], **about)
    stored = openapi.json_answer(LibraryDescription, "The manifest, with the library's digest.")
    shown = openapi.operation("get_library", "Show the library that is served", stored, refuses=REFUSES)
    routes.add_api_route("/admin/library", api.show_library, methods=["GET"], **shown)
    swapped = openapi.operation(
        "swap_library",
        "Open the configured library again and serve it",
        openapi.json_answer(Swap, "The new library is served."),
        refuses=(*REFUSES, Conflict, LibraryRefused),
    )
    routes.add_api_route("/admin/library", api.swap, methods=["POST"], **swapped)
    law = openapi.json_answer(PolicyDescription, "Every ticket's probability, and every size's.")
    policy = openapi.operation("get_policy", "Show the sampling policy of the library", law, refuses=REFUSES)
    routes.add_api_route("/admin/policy", api.show_policy, methods=["GET"], **policy)
    return routes
