"""Both planes in process, as they are served, over a real library and engine."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from model_store.library import Library
from service.admin.audit_jobs import AuditQueue
from service.admin.traffic_history import TrafficHistory
from service.app import create_admin_app
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings
from service.web.auth import ApiKeyStore
from service.web.public_app import create_public_app
from tests.support.planes import TOKEN

Answer = TypeVar("Answer")


class Plane:
    """Both planes in process, as they are served."""

    def __init__(self, library: Path, state: Path, **knobs: Any) -> None:
        settings = Settings(library=library, state_dir=state, engine="torch", **knobs)
        self.metrics = Metrics()
        self.manager = LibraryManager(settings, self.metrics)
        jobs = AuditQueue(settings, self.metrics, self.manager.library)
        self.history = TrafficHistory(self.metrics)
        admin = create_admin_app(self.manager, settings, self.metrics, TOKEN, jobs, self.history)
        public = create_public_app(self.manager, settings, self.metrics, ApiKeyStore(None, self.metrics))
        self.admin = client(admin, authorization=f"Bearer {TOKEN}")
        self.stranger = client(admin)
        self.public = client(public)

    async def draws(self) -> dict[str, Any]:
        draws: dict[str, Any] = (await self.admin.get("/admin/overview")).json()["draws"]
        return draws


def client(app: Any, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://tombola", timeout=60, headers=headers)


def with_plane(
    test: Callable[[Plane], Awaitable[Answer]], library: Library, state: Path, *, load: bool = True, **knobs: Any
) -> Answer:
    async def run() -> Answer:
        plane = Plane(library.path, state, **knobs)
        if load:
            await plane.manager.start()
        try:
            return await test(plane)
        finally:
            if load:
                plane.manager.workers.stop()

    return asyncio.run(run())
