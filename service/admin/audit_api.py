"""The admin plane's routes for audits and their data sets, behind the admin token."""

import asyncio
import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from model_store.errors import os_error_text
from model_store.files import create, naming, part_of
from model_store.json_object import Json
from service.admin.audit_jobs import AuditQueue
from service.admin.audit_store import PENDING, Cost, State, Summary, View
from service.admin.dataset_store import NAME, Dataset, StoredDataset
from service.audit.config import Audit
from service.audit.errors import (
    AuditConflict,
    AuditError,
    AuditRejected,
    AuditUnknown,
    CostRejected,
    DataRejected,
    QueueFull,
)
from service.audit.events import StateEvent
from service.audit.report.formats import FORMATS, Format, format_named
from service.audit.report.model import PAGE, REPORT, Report
from service.errors import ContentTooLarge, NotReady, ServiceError, UnsupportedMediaType
from service.web import openapi
from service.web.auth import ADMIN_REFUSES as REFUSES
from service.web.body import stream_body
from service.web.routing import RawRoute, json_response

MAX_REQUEST_BYTES: Final = 65_536
FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, or of what this user may have of it
POLL_S: Final = 0.25
PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "x-content-type-options": "nosniff",
}
READ_AS_DATA: Final = "Read a report as data"
STORE: Final = "Store a labelled data set: a zip or npz file"
BODY_REFUSES: Final = (ContentTooLarge, UnsupportedMediaType)
"""What stream_body() raises, for the OpenAPI document."""
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
        """Writes the body to a file. Raises what stream_body() raises."""
        most = self.jobs.settings.audits_max_upload_bytes
        folder = self.jobs.datasets.uploads
        folder.mkdir(parents=True, exist_ok=True)
        path = part_of(folder / "upload")
        try:
            with naming(folder), create(path) as file:
                async for chunk in stream_body(request.scope, request.receive, most):
                    await asyncio.to_thread(file.write, chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def model_response(model: BaseModel, status: int = 200) -> Response:
    return json_response(model.model_dump(mode="json"), status)


async def read_json(request: Request) -> Any:
    body = b"".join([part async for part in stream_body(request.scope, request.receive, MAX_REQUEST_BYTES)])
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


def router(jobs: AuditQueue) -> APIRouter:
    api = AuditApi(jobs)
    routes = APIRouter(route_class=RawRoute, tags=["Audits"])
    for route in audit_routes(api):
        about = openapi.operation(
            route.name,
            route.summary,
            route.answer,
            refuses=(*REFUSES, *route.refuses),
            parameters=route.parameters,
            body=route.body,
        )
        routes.add_api_route(route.path, map_audit_errors(route.endpoint), methods=[route.method], **about)
    return routes


@dataclass(frozen=True)
class AuditRoute:
    """One operation on audits or their data sets."""

    method: str
    path: str
    endpoint: Endpoint
    name: str
    summary: str
    answer: openapi.Answer
    refuses: Sequence[type[AuditError | ServiceError]] = ()
    parameters: Sequence[Json] = ()
    body: Mapping[str, Json] | None = None


def audit_routes(api: AuditApi) -> tuple[AuditRoute, ...]:
    json_answer, text_answer = openapi.json_answer, openapi.text_answer
    audits, audit = "/admin/audits", "/admin/audits/{id}"
    by_id = (openapi.path_parameter("id", "The audit's id."),)
    by_name = (openapi.path_parameter("name", "The data set's name.", pattern=f"^{NAME.pattern}$"),)
    request = {openapi.JSON: openapi.reference(Audit)}
    queued = json_answer(SubmittedAudit, "The audit is queued.", 202)
    listed = json_answer(AuditList, "The audits, latest first.")
    shown = json_answer(View, "The audit, with its last progress.")
    cancelled = json_answer(CancelledAudit, "The audit is cancelled.")
    events = text_answer("Server-sent events: cost, step, check, failed, state.", "text/event-stream")
    page = text_answer("The report.", "text/html", *(each.media_type for each in FORMATS.values()))
    formats = {"type": "string", "enum": ["html", *FORMATS], "default": "html"}
    formatted = (*by_id, {"name": "format", "in": "query", "schema": formats, "description": "Of the report."})
    report = json_answer(Report, "The report.")
    sets = json_answer(DatasetList, "The data sets, those of the configured folder first.")
    stored, upload = json_answer(StoredDataset, "The data set is stored.", 201), {openapi.BYTES: openapi.BINARY}
    unknown, unfinished = (AuditUnknown,), (AuditUnknown, AuditConflict)
    submitted = (*BODY_REFUSES, AuditRejected, CostRejected, AuditUnknown, AuditConflict, QueueFull, NotReady)
    uploaded = (*BODY_REFUSES, AuditRejected, DataRejected, NotReady)
    return (
        AuditRoute("POST", audits, api.submit, "submit_audit", "Queue an audit", queued, submitted, body=request),
        AuditRoute("GET", audits, api.list, "list_audits", "List the audits", listed),
        AuditRoute("GET", audit, api.get, "get_audit", "Show an audit", shown, unknown, by_id),
        AuditRoute("DELETE", audit, api.cancel, "cancel_audit", "Cancel an audit", cancelled, unfinished, by_id),
        AuditRoute("GET", f"{audit}/events", api.events, "follow_audit", "Follow an audit", events, unknown, by_id),
        AuditRoute("GET", f"{audit}/report", api.report, "get_report", "Read a report", page, unfinished, formatted),
        AuditRoute(
            "GET", f"{audit}/report.json", api.report_json, "get_report_json", READ_AS_DATA, report, unfinished, by_id
        ),
        AuditRoute("GET", "/admin/datasets", api.datasets, "list_datasets", "List the data sets", sets),
        AuditRoute(
            "PUT", "/admin/datasets/{name}", api.upload, "store_dataset", STORE, stored, uploaded, by_name, upload
        ),
    )
