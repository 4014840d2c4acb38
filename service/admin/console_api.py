"""What the console needs beyond the other admin routes: the state at a glance, a picture tried, an audit's cost.

All of it is behind the admin token. Of theta it tells what the metrics tell, sums over many images, and no more.
"""

import asyncio
import re
import time
from typing import Any, Final

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model_store.code_version import product_version
from model_store.input_spec import CIFAR10_INPUT
from model_store.json_object import Json
from service.admin.audit_api import BODY_REFUSES, map_audit_errors, read_json
from service.admin.audit_jobs import AuditQueue
from service.admin.audit_store import Cost, Summary
from service.admin.draw_statistics import compare_draws
from service.admin.schemas import (
    AuditOptions,
    ClassVotes,
    Draws,
    DrawSummary,
    EngineState,
    History,
    LibrarySummary,
    Overview,
    ProfileSummary,
    Queue,
    Traffic,
    TriedImage,
)
from service.admin.traffic_history import INTERVAL_S, KEEP_S, TrafficHistory
from service.audit.config import ATTACKS, MAX_IMAGES, NORMS, Audit, read_audit
from service.audit.epsilons import epsilons_of
from service.audit.errors import AuditConflict, AuditRejected, AuditUnknown, CostRejected
from service.audit.plan import attacks_of
from service.audit.profiles import PROFILES, Profile
from service.errors import BadRequest, ErrorMessage, NotReady
from service.library_manager import LibraryManager, LoadedLibrary
from service.observability.metrics import OUTCOMES, REASONS, Metrics
from service.scheduling.answers import Probabilities
from service.settings import Settings
from service.web import openapi
from service.web.auth import ADMIN_REFUSES
from service.web.body import cancel_on_disconnect, stream_body
from service.web.decoder import Decoder
from service.web.inference import REFUSES
from service.web.routing import RawRoute, json_response

DRAWS: Final = 20  # of theta, for a picture that is tried
CLIENT: Final = "console"  # its turn in the fair queue, beside the clients of the public plane
DIGITS: Final = 4
NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?", re.ASCII)


class ConsoleApi:
    """One method per route."""

    def __init__(
        self,
        manager: LibraryManager,
        settings: Settings,
        metrics: Metrics,
        jobs: AuditQueue,
        history: TrafficHistory,
    ) -> None:
        self.manager = manager
        self.settings = settings
        self.metrics = metrics
        self.jobs = jobs
        self.history = history
        self.decoder = Decoder(settings, metrics)

    async def overview(self, _: Request) -> Response:
        """The present state, figures of the last minute, and what the last audit measured."""
        serving, history = self.manager.current, self.history
        digest = None if serving is None else serving.library.digest
        audit = await asyncio.to_thread(self.jobs.store.last_measurement, digest)
        return json_response(
            {
                "ready": self.manager.ready,
                "reason": self.manager.reason,
                "version": product_version(),
                "commit": self.settings.commit,
                "uptime_s": round(history.uptime_s, 3),
                "traffic": traffic(self.metrics),
                "now": history.latest(),
                "queue": self.queue(),
                "engine": None if serving is None else self.engine(serving),
                "library": None if serving is None else library_summary(serving),
                "draws": None if serving is None else self.draws(serving),
                "audit": None if audit is None else Summary(**dict(audit)).model_dump(mode="json"),
            }
        )

    def draws(self, serving: LoadedLibrary) -> Draws:
        return compare_draws(serving, self.metrics, self.history.before(), self.history.uptime_s)

    async def show_history(self, request: Request) -> Response:
        """The last quarter of an hour; with `since`, what is newer."""
        shown: History = {
            "uptime_s": round(self.history.uptime_s, 3),
            "interval_s": INTERVAL_S,
            "keep_s": KEEP_S,
            "points": self.history.points(requested_since(request)),
        }
        return json_response(shown)

    def queue(self) -> Queue:
        value = self.metrics.value
        return {
            "depth": value("queue_depth"),
            "limit": self.settings.max_queue_size,
            "in_flight": value("http_requests_in_flight"),
            "in_flight_limit": self.settings.max_requests,
        }

    def engine(self, serving: LoadedLibrary) -> EngineState:
        engine = serving.engine
        return {
            "name": engine.name,
            "device": engine.device,
            "threads": engine.threads,
            "note": engine.note,
            "restarts": self.metrics.value("engine_restarts_total"),
        }

    async def try_image(self, request: Request) -> Response:
        """The picture of the body, asked about DRAWS times: every draw is a fresh theta, and none of them is told."""
        serving = self.manager.current
        if serving is None or not self.manager.ready:
            raise NotReady
        began = time.perf_counter()
        probabilities = await self.answers(request, serving)
        draws = summarize_draws(probabilities, serving.library.classes)
        seconds = round(time.perf_counter() - began, 4)
        return json_response({"library": serving.library.digest, "draws": DRAWS, "seconds": seconds, **draws})

    async def answers(self, request: Request, serving: LoadedLibrary) -> Probabilities:
        """[DRAWS, classes]"""
        most = self.settings.max_body_bytes
        body = b"".join([part async for part in stream_body(request.scope, request.receive, most)])
        rows = np.repeat(await self.decoder.rows([body], serving.library.input), DRAWS, axis=0)
        answer = serving.scheduler.submit(rows, client=CLIENT, deadline=None)
        return await cancel_on_disconnect(request.receive, answer)

    async def profiles(self, _: Request) -> Response:
        """What an audit can be asked for, of the served library; before there is one, of CIFAR-10's pictures."""
        serving = self.manager.current
        numel = (CIFAR10_INPUT if serving is None else serving.library.input).numel
        usual = {norm: epsilons_of(Audit(norm=norm), numel) for norm in NORMS}
        return json_response(
            {
                "profiles": [summary(name, profile) for name, profile in PROFILES.items()],
                "attacks": list(ATTACKS),
                "epsilons": {norm: list(sizes.swept) for norm, sizes in usual.items()},
                "headline": {norm: sizes.headline for norm, sizes in usual.items()},
                "max_images": MAX_IMAGES,
            }
        )

    async def cost(self, request: Request) -> Response:
        """The estimate that submitting the same body would come to; nothing is started."""
        return json_response(await asyncio.to_thread(self.estimate, await read_json(request)))

    def estimate(self, request: Any) -> Json:
        """Raises AuditRejected, AuditUnknown, CostRejected."""
        audit = read_audit(request)
        self.jobs.datasets.path(audit.data, audit.profile)
        return self.jobs.cost(audit, self.manager.library()).model_dump(mode="json")


def summary(name: str, profile: Profile) -> ProfileSummary:
    attacks = {norm: attacks_of(profile, norm) for norm in NORMS}
    return {"name": name, "about": profile.about, "images": profile.images, "attacks": attacks}


def traffic(metrics: Metrics) -> Traffic:
    value = metrics.value
    return {
        "outcomes": {name: value("inference_requests_total", outcome=name) for name in OUTCOMES},
        "shed": {name: value("shed_total", reason=name) for name in REASONS},
        "images": value("inference_images_total"),
    }


def library_summary(serving: LoadedLibrary) -> LibrarySummary:
    library = serving.library
    return {
        "digest": library.digest,
        "tickets": len(library.tickets),
        "baselines": len(library.baselines),
        "classes": len(library.classes),
        "input": {
            "height": library.input.height,
            "width": library.input.width,
            "resize": library.input.resize,
            "interpolation": library.input.interpolation,
        },
    }


def summarize_draws(probabilities: Probabilities, classes: tuple[str, ...]) -> DrawSummary:
    """What draws [draws, classes] say of one image. votes: how many draws chose a class.  low, mean, high: of its
    probability over the draws.  agreement: the part of the draws that chose the commonest label."""
    votes = np.bincount(probabilities.argmax(axis=1), minlength=len(classes))
    mean, low, high = probabilities.mean(axis=0), probabilities.min(axis=0), probabilities.max(axis=0)
    order = sorted(range(len(classes)), key=lambda index: (-votes[index], -mean[index]))
    rows = [
        ClassVotes(
            label=classes[index],
            votes=int(votes[index]),
            mean=round(float(mean[index]), DIGITS),
            low=round(float(low[index]), DIGITS),
            high=round(float(high[index]), DIGITS),
        )
        for index in order
    ]
    return {
        "label": rows[0]["label"],
        "agreement": round(float(votes.max() / len(probabilities)), DIGITS),
        "classes": rows,
    }


def requested_since(request: Request) -> float:
    """Seconds since the process began; 0 where nobody says. Raises BadRequest."""
    values = request.query_params.getlist("since")
    if len(values) > 1 or not all(map(NUMBER.fullmatch, values)):
        raise BadRequest(ErrorMessage.SINCE)
    return float(values[0]) if values else 0.0


def router(
    manager: LibraryManager, settings: Settings, metrics: Metrics, jobs: AuditQueue, history: TrafficHistory
) -> APIRouter:
    """Before the audits' router, whose /admin/audits/{id} would take the name `cost` for an audit's."""
    api = ConsoleApi(manager, settings, metrics, jobs, history)
    routes = APIRouter(route_class=RawRoute, tags=["Console"])
    state = openapi.json_answer(Overview, "The state, with figures of the last minute.")
    overview = openapi.operation("overview", "Show the server's state at a glance", state, refuses=ADMIN_REFUSES)
    routes.add_api_route("/admin/overview", api.overview, methods=["GET"], **overview)
    since = {
        "name": "since",
        "in": "query",
        "schema": {"type": "number", "minimum": 0, "default": 0},
        "description": "Seconds since the process began: points that ended later.",
    }
    ring = openapi.json_answer(History, "Traffic in steps of a few seconds.")
    shown = openapi.operation(
        "history", "Show the last quarter of an hour", ring, refuses=(*ADMIN_REFUSES, BadRequest), parameters=[since]
    )
    routes.add_api_route("/admin/history", api.show_history, methods=["GET"], **shown)
    votes = openapi.json_answer(TriedImage, "How the draws voted.")
    body = {openapi.BYTES: openapi.BINARY}
    tried = openapi.operation("try_image", "Classify a picture by many draws", votes, refuses=REFUSES, body=body)
    routes.add_api_route("/admin/try", map_audit_errors(api.try_image), methods=["POST"], **tried)
    offered = openapi.json_answer(AuditOptions, "Profiles, attacks and epsilons.")
    options = openapi.operation("audit_options", "Show what an audit can be", offered, refuses=ADMIN_REFUSES)
    routes.add_api_route("/admin/profiles", api.profiles, methods=["GET"], **options)
    refuses = (*ADMIN_REFUSES, *BODY_REFUSES, AuditRejected, AuditUnknown, CostRejected, AuditConflict, NotReady)
    request = {openapi.JSON: openapi.reference(Audit)}
    price = openapi.json_answer(Cost, "The estimate.")
    priced = openapi.operation("estimate_audit", "Estimate an audit's cost", price, refuses=refuses, body=request)
    routes.add_api_route("/admin/audits/cost", map_audit_errors(api.cost), methods=["POST"], **priced)
    return routes
