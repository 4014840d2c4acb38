"""OpenTelemetry traces of classification requests, where TOMBOLA_TRACING asks for them.

    request                 a SERVER span, child of the request's W3C `traceparent`
      decode                files -> pixels
      queue                 from admission to the batch that took the first image
      batch                 from there until the answer may leave
      encode                probabilities -> the protocol's answer

A trace leaves the admin plane, so it must not reveal a draw. Every answered request has these five spans, whatever its
thetas. No attribute comes from a theta, a ticket or a task. `queue` ends before the first draw. `batch` ends when the
answer leaves, after TOMBOLA_LATENCY_QUANTUM_MS: it reveals no more than the client's own wait for the answer.

What sends traces is imported by `provider` alone: without the setting it need not be there. FastAPI's own telemetry,
which starts by itself beside any global provider, is off (SILENT): it tells paths, queries and exceptions.
"""

import os
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import REQUEST_ID
from service.observability.metrics import UNMATCHED
from service.settings import SettingsRejected

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

PATIENCE_S: Final = 2.0  # with a collector, a batch's repetitions included; so long it may hold up the process's end
TIMEOUTS: Final = {"OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"}  # which override that
PROVIDERS: Final = {  # which name a session of the user's own
    "OTEL_PYTHON_EXPORTER_OTLP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
}
FASTAPI_TELEMETRY_OFF: Final[Any] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""For FastAPI(telemetry=...); older versions know neither the word nor the telemetry."""


@dataclass
class RequestTimeline:
    """What happened when to one request: (stage, begin, end), on time.perf_counter's clock."""

    begun: float = field(default_factory=time.perf_counter)
    wall_ns: int = field(default_factory=time.time_ns)
    stages: list[tuple[str, float, float]] = field(default_factory=list)

    def at(self, moment: float) -> int:
        """Nanoseconds since 1970."""
        return self.wall_ns + int((moment - self.begun) * 1e9)


CURRENT: Final[ContextVar[RequestTimeline | None]] = ContextVar("marks", default=None)
"""Of the request that this task works for; None where nobody wants a trace."""


class stage:  # noqa: N801 -- reads as a statement: `with stage("decode"):`
    """What runs inside becomes a span of the current request's trace, if there is one. A class, since a generator costs
    every request several microseconds."""

    __slots__ = ("begun", "marks", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.marks = CURRENT.get()
        self.begun = 0.0 if self.marks is None else time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.marks is not None:
            self.marks.stages.append((self.name, self.begun, time.perf_counter()))


def record_queue_spans(admitted: float, taken: float | None) -> None:
    """The scheduler's two stages, now that its answer leaves. taken: when a window was begun with the request's first
    image; None if it was not answered."""
    marks = CURRENT.get()
    if marks is None:
        return
    now = time.perf_counter()
    marks.stages.append(("queue", admitted, taken or now))
    if taken is not None:
        marks.stages.append(("batch", taken, now))


class TracingMiddleware:
    """Middleware, the outermost: one trace for each POST. Health and descriptions are not traced."""

    def __init__(self, app: ASGIApp, *, tracer: "Tracer") -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        marks, status = RequestTimeline(), 499  # nobody was answered: the client hung up

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        before = CURRENT.set(marks)
        try:
            await self.app(scope, receive, reply)
        finally:
            CURRENT.reset(before)
            self.tell(scope, marks, status, time.perf_counter())

    def tell(self, scope: Scope, marks: RequestTimeline, status: int, ended: float) -> None:
        """Names and attributes are constants, our own routes, the status, and the id that the client was given."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        route = getattr(scope.get("route"), "path", UNMATCHED)
        request = self.tracer.start_span(
            f"POST {route}",
            TraceContextTextMapPropagator().extract(carrier(scope)),
            trace.SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": route,
                "http.response.status_code": status,
                "tombola.request_id": str(scope.get(REQUEST_ID, "")),
            },
            start_time=marks.wall_ns,
        )
        if request.is_recording():
            inside = trace.set_span_in_context(request)
            for name, begun, over in marks.stages:
                self.tracer.start_span(name, inside, start_time=marks.at(begun)).end(marks.at(over))
            if status >= 500:
                request.set_status(trace.StatusCode.ERROR)
        request.end(marks.at(ended))


def carrier(scope: Scope) -> dict[str, str]:
    """The request's traceparent. No tracestate and no baggage: they are text of the client's own making."""
    parents = [value for name, value in scope["headers"] if name == b"traceparent"]
    return {"traceparent": parents[0].decode("latin-1")} if len(parents) == 1 else {}


def create_tracer(version: str, proxy: str = "") -> "Tracer":
    """Sends spans to where OTEL_* says. Raises SettingsRejected without the extra `tracing`."""
    return provider(version, proxy).get_tracer("tombola", version)


def provider(version: str, proxy: str = "") -> "TracerProvider":
    """Spans leave in batches from a thread of its own; what no collector takes in time is dropped. Flushed at exit."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingsRejected(
            "TOMBOLA_TRACING: OpenTelemetry is not installed. Install the extra, `pip install -e '.[tracing]'`, "
            "or leave tracing off"
        ) from None
    ours = Resource({"service.name": "tombola", "service.version": version})
    made = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    patience_s = None if TIMEOUTS & set(os.environ) else PATIENCE_S
    exporter = OTLPSpanExporter(timeout=patience_s, session=exporter_session(proxy))
    made.add_span_processor(BatchSpanProcessor(exporter))
    return made


def exporter_session(proxy: str) -> Any:
    """The exporter's session, with the given proxy and none of the environment's; None for a session of the user's.

    It does not read ~/.netrc either, which would replace the credentials of OTEL_EXPORTER_OTLP_HEADERS.
    """
    if PROVIDERS & set(os.environ):
        return None
    import requests  # a dependency of the exporter

    session = requests.Session()
    session.trust_env = False
    if proxy:
        session.proxies = {"http": proxy, "https": proxy}
    return session
