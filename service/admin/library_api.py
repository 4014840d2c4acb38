"""The admin plane: metrics, and what is being served. Audits and the console have routers of their own.

Nothing here is reachable from the public plane, and AdminAuthMiddleware stands before all of it.
"""

import asyncio
import gzip
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Final

from fastapi import APIRouter
from prometheus_client.exposition import gzip_accepted
from starlette.requests import Request
from starlette.responses import Response

from model_store import policy as sampling
from model_store.errors import StoreError
from model_store.json_object import Json
from model_store.library import Library
from model_store.library_diff import compare_libraries
from service.admin.schemas import DryRun, LibraryDescription, PolicyDescription, Swap
from service.errors import BadRequest, Conflict, ErrorMessage, NotReady, ServiceError
from service.library_manager import LibraryChanged, LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings
from service.web import openapi
from service.web.auth import ADMIN_REFUSES, ADMIN_SECURITY
from service.web.classify import health
from service.web.routing import RawRoute, json_response, without_refused

log = logging.getLogger(__name__)

REFUSES: Final = (*ADMIN_REFUSES, NotReady)
DIGEST: Final = re.compile("[0-9a-f]{64}")


class LibraryRefused(ServiceError):
    status = 422
    text = ErrorMessage.LIBRARY_REFUSED


class LibraryReplaced(ServiceError):
    """The configured library has another digest than the one that was to be served."""

    status = 409
    text = ErrorMessage.LIBRARY_CHANGED


class LibraryApi:
    """One method per route."""

    def __init__(self, manager: LibraryManager, settings: Settings, metrics: Metrics) -> None:
        self.manager = manager
        self.settings = settings
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

    async def compare(self, _: Request) -> Response:
        """Opens the configured library and says in what it differs from the one that is served. Nothing is changed."""
        async with self.turn():
            served = self.library()
            try:
                configured = await self.manager.open_configured_library()
            except StoreError as error:
                log.error("the configured library cannot be served: %s", error)  # noqa: TRY400 -- says all there is
                raise LibraryRefused from None
        dry_run = DryRun(source=str(self.settings.library or "embedded"), **dict(compare_libraries(served, configured)))
        return json_response(dry_run.model_dump(mode="json"))

    async def swap(self, request: Request) -> Response:
        """Opens the configured library again and, if all of it is sound, serves it instead of the present one. No body
        is read: which library is served is the settings' business, never a request's."""
        digest = requested_digest(request)
        async with self.turn():
            before = self.library().digest
            try:
                serving = await self.manager.reload(digest)
            except LibraryChanged as error:
                log.error("the old library keeps serving: %s", error)  # noqa: TRY400 -- says all there is
                raise LibraryReplaced from None
            except StoreError as error:
                log.error("library refused, the old one keeps serving: %s", error)  # noqa: TRY400 -- says all there is
                raise LibraryRefused from None
        swap: Swap = {"digest": serving.library.digest, "before": before}
        return json_response(swap)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Libraries are opened one at a time: each needs the memory of one. Raises Conflict."""
        if self.swapping.locked():
            raise Conflict(ErrorMessage.SWAP_RUNNING)
        async with self.swapping:
            yield


def requested_digest(request: Request) -> str | None:
    """Of the library that may be served. Raises BadRequest."""
    values = request.query_params.getlist("digest")
    if len(values) > 1 or not all(map(DIGEST.fullmatch, values)):
        raise BadRequest(ErrorMessage.DIGEST)
    return values[0] if values else None


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


def router(manager: LibraryManager, settings: Settings, metrics: Metrics) -> APIRouter:
    api = LibraryApi(manager, settings, metrics)
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
        refuses=(*REFUSES, BadRequest, Conflict, LibraryReplaced, LibraryRefused),
        parameters=[
            {
                "name": "digest",
                "in": "query",
                "schema": {"type": "string", "pattern": f"^{DIGEST.pattern}$"},
                "description": "Serve this library and no other. The dry run tells its digest.",
            }
        ],
    )
    routes.add_api_route("/admin/library", api.swap, methods=["POST"], **swapped)
    compared = openapi.operation(
        "compare_library",
        "Compare the configured library with the one that is served; nothing is changed",
        openapi.json_answer(DryRun, "What a swap would change."),
        refuses=(*REFUSES, Conflict, LibraryRefused),
    )
    routes.add_api_route("/admin/library/diff", api.compare, methods=["POST"], **compared)
    law = openapi.json_answer(PolicyDescription, "Every ticket's probability, and every size's.")
    policy = openapi.operation("get_policy", "Show the sampling policy of the library", law, refuses=REFUSES)
    routes.add_api_route("/admin/policy", api.show_policy, methods=["GET"], **policy)
    return routes
