"""The admin plane's routes for audits. AdminGate stands before all of them; here are no secrets, only work."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from model_store.errors import os_error_text
from model_store.files import create, naming, part_of
from service.admin.audit_jobs import PAGE, REPORT, WAITING, AuditQueue
from service.audit.errors import AuditError, AuditRejected
from service.web.inference import RawRoute, json_response

MAX_REQUEST_BYTES: Final = 65_536
FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, or of what this user may have of it
POLL_S: Final = 0.25
SAFE: Final = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "x-content-type-options": "nosniff",
}
Endpoint = Callable[[Request], Awaitable[Response]]


class AuditApi:
    """One method per route. Files are read and written in threads, never on the event loop."""

    def __init__(self, jobs: AuditQueue) -> None:
        self.jobs = jobs

    async def submit(self, request: Request) -> Response:
        """Queue an audit; 202 with its id, state and cost."""
        fields = await read_json(request)
        job = await asyncio.to_thread(self.jobs.submit, fields)
        return json_response({name: job[name] for name in ("id", "state", "cost")}, 202)

    async def all(self, _: Request) -> Response:
        """The audits, latest first."""
        jobs = await asyncio.to_thread(self.jobs.all)
        names = ("id", "state", "created", "request", "why")
        return json_response({"audits": [{name: job[name] for name in names} for job in jobs]})

    async def get(self, request: Request) -> Response:
        """One audit: its state, request, progress and figures so far."""
        return json_response(await asyncio.to_thread(self.jobs.shown, request.path_params["id"]))

    async def cancel(self, request: Request) -> Response:
        """Cancel an audit that waits or runs."""
        job = await asyncio.to_thread(self.jobs.cancel, request.path_params["id"])
        return json_response({"id": job["id"], "state": job["state"]})

    async def report(self, request: Request) -> Response:
        """The report as one self-contained HTML page."""
        body = await asyncio.to_thread(self.jobs.file, request.path_params["id"], PAGE)
        return Response(body, media_type="text/html", headers=SAFE)

    async def report_json(self, request: Request) -> Response:
        """The report as data."""
        body = await asyncio.to_thread(self.jobs.file, request.path_params["id"], REPORT)
        return Response(body, media_type="application/json")

    async def events(self, request: Request) -> Response:
        """Server-sent events: progress, running figures, time left, and last the state."""
        name = request.path_params["id"]
        await asyncio.to_thread(self.jobs.get, name)
        return StreamingResponse(self.stream(request, name), media_type="text/event-stream")

    async def stream(self, request: Request, name: str) -> AsyncIterator[str]:
        """Every event so far, those to come, and last the state in which the audit ended."""
        told = 0
        while True:
            job = await asyncio.to_thread(self.jobs.get, name)  # before its events: none is missed at the end
            events = await asyncio.to_thread(self.jobs.events, name)
            for event in events[told:]:
                yield server_sent(event["event"], event)
            told = len(events)
            if job["state"] not in WAITING:
                yield server_sent("state", {"state": job["state"], "why": job["why"]})
                return
            if self.jobs.stopping or await request.is_disconnected():
                return
            await asyncio.sleep(POLL_S)

    async def datasets(self, _: Request) -> Response:
        """What an audit may be run on."""
        return json_response({"datasets": await asyncio.to_thread(self.jobs.datasets.listed)})

    async def upload(self, request: Request) -> Response:
        """Keep a labelled set to audit with: the body is the file, zip or npz; its name is in the path."""
        path = await self.received(request)
        try:
            library = self.jobs.library()
            kept = await asyncio.to_thread(self.jobs.datasets.keep, request.path_params["name"], path, library)
        finally:
            path.unlink(missing_ok=True)
        return json_response(kept, 201)

    async def received(self, request: Request) -> Path:
        folder = self.jobs.datasets.uploads
        folder.mkdir(parents=True, exist_ok=True)
        path = part_of(folder / "upload")
        try:
            with naming(folder), create(path) as file:
                async for chunk in limited(request, self.jobs.settings.audits_max_upload_bytes):
                    await asyncio.to_thread(file.write, chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


async def limited(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body, as long as it stays within `most` bytes. Raises AuditRejected."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise AuditRejected(f"the body is larger than {most} bytes")
        yield chunk


async def read_json(request: Request) -> Any:
    body = b"".join([chunk async for chunk in limited(request, MAX_REQUEST_BYTES)])
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise AuditRejected('the body is not JSON; expected an object such as {"profile": "standard"}') from None


def server_sent(event: str, data: Any) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def map_audit_errors(endpoint: Endpoint) -> Endpoint:
    """The only place where an audit's error becomes a status. Its text names fields and figures, never theta."""

    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return json_response({"error": os_error_text(error)}, 507)
        except AuditError as error:
            return json_response({"error": str(error)}, error.status)

    run.__name__, run.__doc__ = endpoint.__name__, endpoint.__doc__  # what the API's description shows
    return run


def router(jobs: AuditQueue) -> APIRouter:
    here = AuditApi(jobs)
    routes = APIRouter(route_class=RawRoute, tags=["Audits"])
    table: tuple[tuple[str, Endpoint, str], ...] = (
        ("/admin/audits", here.submit, "POST"),
        ("/admin/audits", here.all, "GET"),
        ("/admin/audits/{id}", here.get, "GET"),
        ("/admin/audits/{id}", here.cancel, "DELETE"),
        ("/admin/audits/{id}/events", here.events, "GET"),
        ("/admin/audits/{id}/report", here.report, "GET"),
        ("/admin/audits/{id}/report.json", here.report_json, "GET"),
        ("/admin/datasets", here.datasets, "GET"),
        ("/admin/datasets/{name}", here.upload, "PUT"),
    )
    for path, endpoint, method in table:
        routes.add_api_route(path, map_audit_errors(endpoint), methods=[method])
    return routes
