"""The admin plane as a FastAPI application: its routes, and its middlewares in one list."""

from typing import Final

from fastapi import FastAPI
from starlette.middleware import Middleware

from service.admin import audit_api, console_api, console_files, library_api
from service.admin.audit_jobs import AuditQueue
from service.admin.traffic_history import TrafficHistory
from service.audit.config import Audit
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings
from service.web.auth import ADMIN_SCHEMES, ADMIN_SECURITY, AdminAuthMiddleware
from service.web.error_handling import ErrorMiddleware
from service.web.middleware import HeadMiddleware
from service.web.public_app import create_app, request_metrics

ADMIN_DESCRIPTION: Final = "Shows and swaps the library, audits it, and publishes metrics. For operators alone."


def create_admin_app(
    manager: LibraryManager,
    settings: Settings,
    metrics: Metrics,
    token: str,
    jobs: AuditQueue,
    history: TrafficHistory | None = None,
) -> FastAPI:
    """Metrics, the library, the console and audits; all but metrics, health and files of pages behind the token.

    history: of traffic, which its owner samples; None for one that begins here.
    """
    middleware = [  # outermost first: this order is the security boundary
        request_metrics(manager, settings, metrics, "admin"),
        Middleware(ErrorMiddleware),
        Middleware(AdminAuthMiddleware, token=token, metrics=metrics, metrics_open=settings.metrics_open),
        Middleware(HeadMiddleware),
    ]
    routers = [
        library_api.router(manager, settings, metrics),
        console_files.router(),
        console_api.router(
            manager, settings, metrics, jobs, history or TrafficHistory(metrics)
        ),  # before /admin/audits/{id}, which matches `cost`, too
        audit_api.router(jobs),
    ]
    return create_app(
        routers,
        middleware,
        title="Tombola, admin plane",
        description=ADMIN_DESCRIPTION,
        schemes=ADMIN_SCHEMES,
        security=ADMIN_SECURITY,
        requests=(Audit,),
    )
