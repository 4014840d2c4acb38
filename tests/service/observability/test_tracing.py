"""Traces: one shape whatever was drawn, the caller's trace continued, nothing of it there unless asked for."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.engine.base import Images
from service.errors import EngineFailed
from service.observability.tracing import PATIENCE_S, TracingMiddleware, provider
from service.settings import SettingsRejected
from tests.support.http_server import running
from tests.support.planes import Oracle, StandIn, png, public_app
from tests.support.serving import Stand, environment, serving, tiny_library, with_scheduler

pytestmark = pytest.mark.usefixtures("warm_start")

CLASSIFY: Final = "/v1/classify"
STAGES: Final = ["decode", "queue", "batch", "encode"]
CALLER: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # the example of the W3C recommendation


def traced(
    manager: StandIn, requests: Sequence[tuple[bytes, dict[str, str]]], path: str = CLASSIFY
) -> tuple[list[httpx.Response], list[list[ReadableSpan]]]:
    """Asks one after the other, in a loop of its own; each answer, and the spans of each request, outermost last."""
    return asyncio.run(ask_all(manager, requests, path))


async def ask_all(
    manager: Any, requests: Sequence[tuple[bytes, dict[str, str]]], path: str = CLASSIFY, **knobs: Any
) -> tuple[list[httpx.Response], list[list[ReadableSpan]]]:
    memory, spans, answers = InMemorySpanExporter(), [], []
    kept = TracerProvider(shutdown_on_exit=False)
    kept.add_span_processor(SimpleSpanProcessor(memory))
    app = public_app(manager, **knobs)
    app.add_middleware(TracingMiddleware, tracer=kept.get_tracer("tests"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tombola") as client:
        for body, headers in requests:
            answers.append(await client.post(path, content=body, headers=headers))
            spans.append(list(memory.get_finished_spans()))
            memory.clear()
    return answers, spans


def context(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def length_ms(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


def shape(spans: list[ReadableSpan]) -> list[Any]:
    """All that a trace says but its ids and times."""
    root = spans[-1]
    return [
        (
            span.name,
            span.kind,
            span.status.status_code,
            {name: value for name, value in (span.attributes or {}).items() if name != "tombola.request_id"},
            [event.name for event in span.events],
            len(span.links),
            span.parent is not None and span.parent.span_id == context(root).span_id,
        )
        for span in spans
    ]


def test_a_request_is_five_spans_in_the_order_of_what_is_done() -> None:
    async def ask(stand: Stand) -> Any:
        return await ask_all(StandIn(stand), [(png(), {})])  # type: ignore[arg-type]

    (answer,), (spans,) = with_scheduler(ask)
    assert [span.name for span in spans] == [*STAGES, f"POST {CLASSIFY}"]
    request = spans[-1]
    assert request.kind is SpanKind.SERVER
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": CLASSIFY,
        "http.response.status_code": 200,
        "tombola.request_id": answer.json()["request_id"],
    }
    starts, ends = [span.start_time for span in spans[:-1]], [span.end_time for span in spans[:-1]]
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert spans[1].end_time == spans[2].start_time
    assert sum(map(length_ms, spans[:-1])) <= length_ms(request)


def test_traces_of_small_and_large_ensembles_are_alike_but_for_ids_and_times() -> None:
    """80 draws of one to four tickets. All of one size by chance: below 1e-20."""
    sizes: set[int] = set()

    async def ask(stand: Stand) -> Any:
        stand.scheduler.draw_statistics.add = lambda batch: sizes.update(  # type: ignore[method-assign]
            len(theta.members) for theta in batch.thetas
        )
        return await ask_all(StandIn(stand), [(png(), {})] * 80)  # type: ignore[arg-type]

    _, traces = with_scheduler(ask)
    assert len(sizes) > 1
    assert all(shape(spans) == shape(traces[0]) for spans in traces)


def test_a_quantum_hides_in_a_trace_what_it_hides_from_the_client() -> None:
    """A forward pass of no time at all: by itself such a window would last a few milliseconds."""

    async def ask(stand: Stand) -> Any:
        return await ask_all(StandIn(stand), [(png(), {})])  # type: ignore[arg-type]

    _, (spans,) = with_scheduler(ask, latency_quantum_ms=300)
    assert length_ms(spans[1]) + length_ms(spans[2]) >= 299


def test_a_failing_ticket_shows_as_the_failure_the_client_saw() -> None:
    def fails(member: int, rows: Images) -> Any:
        if rows.any():  # not the harmless image that shows whether the engine is alive
            raise ArithmeticError(f"ticket {member}")
        return np.zeros((len(rows), 10), np.float32)

    async def ask(stand: Stand) -> Any:
        return await ask_all(StandIn(stand), [(png(), {})])  # type: ignore[arg-type]

    (answer,), (spans,) = with_scheduler(ask, forward=fails)
    assert answer.status_code == 500
    assert [span.name for span in spans] == ["decode", "queue", "batch", f"POST {CLASSIFY}"]
    assert spans[-1].status.status_code is StatusCode.ERROR
    assert spans[-1].status.description is None


def test_the_caller_s_trace_is_continued_and_nothing_else_of_it_is_kept() -> None:
    headers = {"traceparent": CALLER, "tracestate": "vendor=secret", "baggage": "user=secret", "x-user": "secret"}
    _, (spans,) = traced(StandIn(), [(png(), headers)])
    assert all(f"{context(span).trace_id:032x}" == CALLER.split("-")[1] for span in spans)
    assert spans[-1].parent is not None
    assert f"{spans[-1].parent.span_id:016x}" == CALLER.split("-")[2]
    assert "secret" not in "".join(span.to_json() for span in spans)
    assert all(not context(span).trace_state for span in spans)


@pytest.mark.parametrize("value", ["", "nonsense", CALLER.upper(), CALLER.replace("00-", "ff-"), f"{CALLER}-more"])
def test_a_malformed_traceparent_begins_a_trace_of_our_own(value: str) -> None:
    (answer,), (spans,) = traced(StandIn(), [(png(), {"traceparent": value})])
    assert answer.status_code == 200
    assert spans[-1].parent is None


def test_a_caller_that_does_not_sample_is_not_traced() -> None:
    (answer,), (spans,) = traced(StandIn(), [(png(), {"traceparent": f"{CALLER[:-2]}00"})])
    assert answer.status_code == 200
    assert spans == []


@pytest.mark.parametrize(
    ("manager", "body", "status", "names"),
    [
        (StandIn(), b"no image", 415, []),
        (StandIn(), b"\x89PNG\r\n\x1a\nbroken", 400, ["decode"]),
        (StandIn(Oracle(EngineFailed())), png(), 500, ["decode"]),
        (StandIn(loaded=False), png(), 503, []),
    ],
)
def test_a_refusal_is_traced_as_far_as_it_came(manager: StandIn, body: bytes, status: int, names: list[str]) -> None:
    (answer,), (spans,) = traced(manager, [(body, {})])
    assert answer.status_code == status
    assert [span.name for span in spans] == [*names, f"POST {CLASSIFY}"]
    assert dict(spans[-1].attributes or {})["http.response.status_code"] == status
    assert (spans[-1].status.status_code is StatusCode.ERROR) == (status >= 500)


def test_a_path_of_the_client_s_making_does_not_enter_a_trace() -> None:
    _, (spans,) = traced(StandIn(), [(png(), {})], "/somewhere/secret?token=secret")
    assert [span.name for span in spans] == ["POST unmatched"]
    assert "secret" not in spans[0].to_json()


# On and off


def output_of(program: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout.strip()


def test_without_the_setting_nothing_of_the_extra_is_imported(tmp_path: Path) -> None:
    """FastAPI itself brings OpenTelemetry's interfaces, behind which nothing stands."""
    program = f"""
import sys
from service import lifecycle
from service.settings import Settings
lifecycle.create_service(Settings(port=0, admin_port=0, state_dir={str(tmp_path)!r}))
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    assert output_of(program) == "[]"


def test_a_tracer_for_the_whole_process_hears_nothing_from_the_framework() -> None:
    """As `opentelemetry-instrument` sets one up; FastAPI would tell it paths, queries and exceptions."""
    program = """
import httpx, asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
memory = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))
from service.web.public_app import create_public_app
from service.web.auth import ApiKeyStore
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.planes import StandIn, png
manager = StandIn()
app = create_public_app(manager, Settings(), Metrics(), ApiKeyStore(None, Metrics()))
async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tombola") as client:
        return [(await client.post(path, content=png())).status_code for path in ("/v1/classify", "/secret")]
print(asyncio.run(ask()), memory.get_finished_spans())
"""
    assert output_of(program) == "[200, 404] ()"


def test_without_the_extra_the_setting_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsRejected, match=r"TOMBOLA_TRACING: .*\[tracing\]"):
        provider("1")


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Its address, and what it has been sent."""
    sent: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            sent.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    with running(server):
        yield f"http://127.0.0.1:{server.server_port}", sent


def test_the_real_process_sends_its_traces_where_the_standard_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tiny_library(tmp_path / "library")
    with collector() as (address, sent):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with serving(library.path, tmp_path / "state", "--tracing") as process:
            assert process.ready()
            assert process.classify(png(), traceparent=CALLER)[0] == 200
            assert process.end() == 0  # what is left is sent before
    (resource,) = [one for request in sent for one in request.resource_spans]
    attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert attributes["service.name"] == "tombola"
    assert attributes["deployment.environment.name"] == "test"
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == [*STAGES, f"POST {CLASSIFY}"]
    assert {span.trace_id.hex() for span in spans} == {CALLER.split("-")[1]}


def test_a_collector_that_is_not_there_costs_no_answer_and_no_long_goodbye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    library = tiny_library(tmp_path / "library")
    with serving(library.path, tmp_path / "state", "--tracing") as process:
        assert process.classify(png())[0] == 200
        begun = time.monotonic()
        assert process.end() == 0
    assert time.monotonic() - begun < PATIENCE_S + 5
