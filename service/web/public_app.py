"""The public plane as a FastAPI application, and what both planes' applications have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware

from model_store.code_version import product_version
from service.observability import tracing
from service.observability.metrics import Metrics
from service.observability.tracing import TracingMiddleware
from service.settings import Settings, cors_origins
from service.web import classify, docs_files, index_page, open_inference
from service.web.auth import KEY_SCHEMES, KEY_SECURITY, ApiKeyStore
from service.web.classify import ClassifyApi
from service.web.error_handling import EXCEPTION_HANDLERS, ErrorMiddleware
from service.web.inference import DataPlane
from service.web.middleware import (
    ConcurrencyLimitMiddleware,
    CrossOriginMiddleware,
    HeadMiddleware,
    RequestMetricsMiddleware,
)
from service.web.open_inference import OpenInferenceApi
from service.web.openapi import DocumentedApp
from service.web.routing import FastPathMiddleware
from service.web.schemas import ClassifyRequest, InferRequestBody
from service.web.serving import Manager

PUBLIC_DESCRIPTION: Final = "Classifies images, by a protocol of its own and by the Open Inference Protocol, version 2."


def create_public_app(
    manager: Manager,
    settings: Settings,
    metrics: Metrics,
    keys: ApiKeyStore,
    create_data_plane: Callable[[Manager, Settings, Metrics, ApiKeyStore], DataPlane] = DataPlane,
) -> FastAPI:
    """Classification, health, and the Open Inference Protocol. Raises SettingsRejected.

    create_data_plane: another one where images are answered by another process.
    """
    data_plane = create_data_plane(manager, settings, metrics, keys)
    api, protocol = ClassifyApi(data_plane), OpenInferenceApi(data_plane)
    middleware = [  # outermost first: this order is the security boundary
        *tracing_middleware(settings),
        request_metrics(manager, settings, metrics, "public"),
        *cross_origin_middleware(settings),
        Middleware(ErrorMiddleware),
        Middleware(ConcurrencyLimitMiddleware, limit=settings.max_requests, metrics=metrics),
        Middleware(FastPathMiddleware, routes=classify.fast_routes(api) | open_inference.fast_routes(protocol)),
        Middleware(HeadMiddleware),
    ]
    optional: Sequence[Any] = () if settings.api_keys_file else ({},)
    app = create_app(
        [index_page.router(), classify.router(api), open_inference.router(protocol)],
        middleware,
        title="Tombola",
        description=PUBLIC_DESCRIPTION,
        schemes=KEY_SCHEMES,
        security=[*optional, *KEY_SECURITY],
        requests=(ClassifyRequest, InferRequestBody),
    )
    app.state.protocol = protocol  # for its gRPC form
    return app


def create_app(routers: Sequence[APIRouter], middleware: Sequence[Middleware], **document: Any) -> FastAPI:
    """Documented by routes and files of our own, and without telemetry but our own.

    document: title, description, schemes, security and requests of DocumentedApp.
    """
    off: Mapping[str, Any] = {"openapi_url": None, "telemetry": tracing.FASTAPI_TELEMETRY_OFF}
    app = DocumentedApp(
        version=product_version(),
        redirect_slashes=False,
        middleware=middleware,
        exception_handlers=EXCEPTION_HANDLERS,
        **document,
        **off,
    )
    for router in (*routers, docs_files.router(app.openapi)):
        app.include_router(router)
    return app


def request_metrics(manager: Manager, settings: Settings, metrics: Metrics, plane: str) -> Middleware:
    return Middleware(
        RequestMetricsMiddleware, manager=manager, metrics=metrics, plane=plane, log_all=settings.log_requests
    )


def cross_origin_middleware(settings: Settings) -> list[Middleware]:
    """None where pages of other origins may not use the plane."""
    return [Middleware(CrossOriginMiddleware, origins=cors_origins(settings))] if settings.cors_origins else []


def tracing_middleware(settings: Settings) -> list[Middleware]:
    """None where tracing is off. Raises SettingsRejected without the extra `tracing`."""
    if not settings.tracing:
        return []
    return [Middleware(TracingMiddleware, tracer=tracing.create_tracer(product_version(), settings.tracing_proxy))]
