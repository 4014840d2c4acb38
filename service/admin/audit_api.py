"""The admin plane's routes for audits and their data sets, behind the admin token."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from model_store.errors import os_error_text
from model_store.files import create, naming, part_of
from service.admin.audit_jobs import AuditQueue
from service.admin.audit_store import PAGE, PENDING, REPORT, Cost, State, Summary, View
from service.admin.dataset_store import Dataset, StoredDataset
from service.audit.config import Audit
from service.audit.errors import AuditError, AuditRejected
from service.audit.events import StateEvent
from service.audit.report.formats import FORMATS, Format, format_named
from service.audit.report.model import Report
from service.web.inference import ERRORS, RawRoute, json_response

MAX_REQUEST_BYTES: Final = 65_536
FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, or of what this user may have of it
POLL_S: Final = 0.25
PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "x-content-type-options": "nosniff",
}
Endpoint = Callable[[Request], Awaitable[Response]]


class SubmittedAudit(BaseModel):
    """The answer to a request for an audit."""

    id: str
    state: State
    cost: Cost


class CancelledAudit(BaseModel):
    id: str
    state: State


class AuditList(BaseModel):
    """The audits, latest first."""

    audits: list[Summary]


class DatasetList(BaseModel):
    datasets: list[Dataset]


class AuditApi:
    """One method per route. Files are read and written in threads, never on the event loop."""

    def __init__(self, jobs: AuditQueue) -> None:
        self.jobs, self.store = jobs, jobs.store

    async def submit(self, request: Request) -> Response:
        """Queue an audit."""
        job = await asyncio.to_thread(self.jobs.submit, await read_json(request))
        return model_response(SubmittedAudit(id=job.id, state=job.state, cost=job.cost), 202)

    async def list(self, _: Request) -> Response:
        """List the audits, latest first, with the figures of those that have ended."""
        jobs = await asyncio.to_thread(self.store.all)
        return model_response(AuditList(audits=[Summary(**dict(job)) for job in jobs]))

    async def get(self, request: Request) -> Response:
        """Show one audit: its state, request, progress and figures."""
        return model_response(await asyncio.to_thread(self.store.view, request.path_params["id"]))

    async def cancel(self, request: Request) -> Response:
        """Cancel an audit that waits or runs."""
        job = await asyncio.to_thread(self.jobs.cancel, request.path_params["id"])
        return model_response(CancelledAudit(id=job.id, state=job.state))

    async def report(self, request: Request) -> Response:
        """Read a report: as a self-contained HTML page, or in the format of the query."""
        audit, name = request.path_params["id"], request.query_params.get("format", "html")
        if name == "html":
            page = await asyncio.to_thread(self.store.report_file, audit, PAGE)
            return Response(page, media_type="text/html", headers=PAGE_HEADERS)
        chosen = format_named(name)
        text = await asyncio.to_thread(self.write, audit, chosen)
        headers = {
            "content-disposition": f'attachment; filename="{chosen.filename}"',
            "x-content-type-options": "nosniff",
        }
        return Response(text, media_type=chosen.media_type, headers=headers)

    def write(self, audit: str, chosen: Format) -> str:
        return chosen.write(Report.model_validate_json(self.store.report_file(audit, REPORT)))

    async def report_json(self, request: Request) -> Response:
        """Read a report as data."""
        body = await asyncio.to_thread(self.store.report_file, request.path_params["id"], REPORT)
        return Response(body, media_type="application/json")

    async def events(self, request: Request) -> Response:
        """Follow an audit: server-sent events, from the first one on, and last the state in which it ended."""
        audit = request.path_params["id"]
        await asyncio.to_thread(self.store.get, audit)
        return StreamingResponse(self.stream(request, audit), media_type="text/event-stream")

    async def stream(self, request: Request, id: str) -> AsyncIterator[str]:
        """Every event so far, those to come, and last the state in which the audit ended."""
        sent = 0
        while True:
            job = await asyncio.to_thread(self.store.get, id)  # before its events: none is missed at the end
            events = await asyncio.to_thread(self.store.events, id)
            for event in events[sent:]:
                yield server_sent_event(event.event, event.model_dump(mode="json", exclude_none=True))
            sent = len(events)
            if job.state not in PENDING:
                end = StateEvent(state=job.state, why=job.why)
                yield server_sent_event(end.event, end.model_dump(mode="json", include={"state", "why"}))
                return
            if self.jobs.stopping or await request.is_disconnected():
                return
            await asyncio.sleep(POLL_S)

    async def datasets(self, _: Request) -> Response:
        """List the data sets that an audit may name."""
        return model_response(DatasetList(datasets=await asyncio.to_thread(self.jobs.datasets.list)))

    async def upload(self, request: Request) -> Response:
        """Store a labelled data set: the body is a zip or npz file, its name is in the path."""
        path = await self.receive(request)
        try:
            library = self.jobs.library()
            stored = await asyncio.to_thread(self.jobs.datasets.add, request.path_params["name"], path, library)
        finally:
            path.unlink(missing_ok=True)
        return model_response(stored, 201)

    async def receive(self, request: Request) -> Path:
        """Writes the body to a file. Raises AuditRejected for a body that is too large."""
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


def model_response(model: BaseModel, status: int = 200) -> Response:
    return json_response(model.model_dump(mode="json"), status)


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


def server_sent_event(event: str, data: Mapping[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def map_audit_errors(endpoint: Endpoint) -> Endpoint:
    """The only place where an audit's error becomes a status. Its text names fields and figures, never theta."""

    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except AuditError as error:
            return json_response({"error": str(error)}, error.status)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return json_response({"error": os_error_text(error)}, 507)

    run.__name__, run.__doc__ = endpoint.__name__, endpoint.__doc__  # what the API's description shows
    return run


# For the OpenAPI document

REQUEST: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": TypeAdapter(Audit).json_schema()}},
    }
}
UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


FORMAT_PARAMETER: Final[dict[str, Any]] = {
    "name": "format",
    "in": "query",
    "schema": {"type": "string", "enum": ["html", *FORMATS], "default": "html"},
}


def path_parameter(name: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


def report_body() -> dict[str, Any]:
    kinds = ("text/html", *(each.media_type for each in FORMATS.values()))
    return {"description": "The report", "content": {kind: {"schema": {"type": "string"}} for kind in kinds}}


def text_body(media_type: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def router(jobs: AuditQueue) -> APIRouter:
    api = AuditApi(jobs)
    routes = APIRouter(route_class=RawRoute, tags=["Audits"], responses=ERRORS)
    by_id, by_name = path_parameter("id"), path_parameter("name")
    accepted = {202: {"model": SubmittedAudit, "description": "Queued"}}
    stored = {201: {"model": StoredDataset, "description": "Stored"}}
    page = {200: report_body()}
    formatted = {"parameters": [*by_id["parameters"], FORMAT_PARAMETER]}
    stream = {200: text_body("text/event-stream", "Events: cost, step, check, failed, state")}

    def ok(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
        return {200: {"model": model}}

    def add(path: str, endpoint: Endpoint, method: str, responses: Any, extra: dict[str, Any] | None = None) -> None:
        status = next(iter(responses))
        routes.add_api_route(
            path,
            map_audit_errors(endpoint),
            methods=[method],
            status_code=status,
            responses=responses,
            openapi_extra=extra,
        )

    add("/admin/audits", api.submit, "POST", accepted, REQUEST)
    add("/admin/audits", api.list, "GET", ok(AuditList))
    add("/admin/audits/{id}", api.get, "GET", ok(View), by_id)
    add("/admin/audits/{id}", api.cancel, "DELETE", ok(CancelledAudit), by_id)
    add("/admin/audits/{id}/events", api.events, "GET", stream, by_id)
    add("/admin/audits/{id}/report", api.report, "GET", page, formatted)
    add("/admin/audits/{id}/report.json", api.report_json, "GET", ok(Report), by_id)
    add("/admin/datasets", api.datasets, "GET", ok(DatasetList))
    add("/admin/datasets/{name}", api.upload, "PUT", stored, {**by_name, **UPLOAD})
    return routes
