"""Every Prometheus metric of the service, in one table. Names carry the prefix and base units; labels are bounded.

No scrape reveals one draw of theta. Draws and runs of tickets are published for at least 128 images at a time.
The sizes of ensembles are one histogram. No label names a client, a request or a seed.
"""

import itertools
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import values as prometheus_values
from prometheus_client.exposition import choose_encoder, generate_latest

PREFIX: Final = "tombola_"
# Images whose draws are published together: scrapes before and after one request then show no theta.
PUBLISH_EVERY: Final = 128
UNMATCHED: Final = "unmatched"  # the route of a request that no route answers
OTHER: Final = "other"
CACHE_SIZE: Final = 4096  # series found without prometheus_client's look-up; clients choose methods, so it is bounded

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES: Final = (1e3, 4e3, 16e3, 64e3, 256e3, 1e6, 4e6, 16e6)
OUTCOMES: Final = ("ok", "invalid", "shed", "deadline", "cancelled", "error")
STAGES: Final = ("decode", "encode")
REASONS: Final = ("queue", "inflight", "body", "deadline", "rate", "draining")
BOUNDS: Final = ("value", "low", "high")
AUDIT_OUTCOMES: Final = ("done", "invalid", "failed", "cancelled", "interrupted", "refused")


@dataclass(frozen=True)
class MetricSpec:
    """One row. labels: name -> the values it may take (others become "other"); None: bounded by its one caller."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[tuple[str, tuple[str, ...] | None], ...] = ()
    buckets: tuple[float, ...] = ()


METHODS: Final = ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS")
TABLE: Final[tuple[MetricSpec, ...]] = (
    MetricSpec(
        "http_requests_total",
        "counter",
        "HTTP requests answered, by route template (else unmatched), method and status.",
        (("route", None), ("method", METHODS), ("code", None)),
    ),
    MetricSpec(
        "http_request_duration_seconds",
        "histogram",
        "From the request's headers to the end of its answer.",
        (("route", None), ("code", None)),
        SECONDS,
    ),
    MetricSpec(
        "grpc_requests_total",
        "counter",
        "gRPC calls answered, by method and status.",
        (("method", None), ("code", None)),
    ),
    MetricSpec(
        "grpc_request_duration_seconds",
        "histogram",
        "From a gRPC call's headers to the end of its answer.",
        (("method", None),),
        SECONDS,
    ),
    MetricSpec("http_processes", "gauge", "Processes that do HTTP for the service's; 0 where it does so itself."),
    MetricSpec("http_process_restarts_total", "counter", "Such processes that died and were replaced."),
    MetricSpec("http_cpu_seconds_total", "counter", "Processor time of such processes."),
    MetricSpec("http_requests_in_flight", "gauge", "Requests in progress on the public plane."),
    MetricSpec("http_request_body_bytes", "histogram", "Bodies of classification requests, as sent.", (), BYTES),
    MetricSpec("http_body_memory_bytes", "gauge", "Memory reserved for the bodies of requests in progress."),
    MetricSpec("queue_depth", "gauge", "Images admitted and waiting for their batch."),
    MetricSpec("queue_wait_seconds", "histogram", "From admission of an image to the start of its batch.", (), SECONDS),
    MetricSpec(
        "member_batch_size",
        "histogram",
        f"Images that one ticket was run on at once, published {PUBLISH_EVERY} images at a time.",
        (),
        SIZES,
    ),
    MetricSpec("batch_size", "histogram", "Images in one batch.", (), SIZES),
    MetricSpec("batch_seconds", "histogram", "From the start of a batch to its sums.", (), SECONDS),
    MetricSpec(
        "member_forward_seconds",
        "histogram",
        f"One ticket on its images of one batch, published {PUBLISH_EVERY} images at a time.",
        (),
        SECONDS,
    ),
    MetricSpec(
        "compute_seconds",
        "histogram",
        "Decoding and encoding of a request.",
        (("stage", STAGES),),
        (0.0001, 0.00025, *SECONDS),
    ),
    MetricSpec(
        "inference_requests_total",
        "counter",
        "Classification requests by outcome, on both protocols.",
        (("outcome", OUTCOMES),),
    ),
    MetricSpec("inference_images_total", "counter", "Images classified."),
    MetricSpec(
        "shed_total", "counter", "Requests turned away to protect the others, by reason.", (("reason", REASONS),)
    ),
    MetricSpec(
        "ensemble_size",
        "histogram",
        f"Tickets drawn for an image, published {PUBLISH_EVERY} images at a time.",
        (),
        tuple(range(1, 9)),
    ),
    MetricSpec(
        "draws_total",
        "counter",
        f"Members drawn, by structure and density, published {PUBLISH_EVERY} images at a time.",
        (("structure", None), ("density", None)),
    ),
    MetricSpec(
        "draws_expected_total",
        "counter",
        "What the sampling policy expects of draws_total, published with it.",
        (("structure", None), ("density", None)),
    ),
    MetricSpec("ready", "gauge", "1 when the library is verified and warm, the engine alive and nothing draining."),
    MetricSpec("draining", "gauge", "1 from SIGTERM on."),
    MetricSpec("engine_restarts_total", "counter", "Dead or hanging engine threads and processes replaced."),
    MetricSpec("engine_retries_total", "counter", "Images run again alone because their group failed."),
    MetricSpec(
        "engine_cpu_seconds_total",
        "counter",
        "Processor time of the engine's own processes; 0 where tickets run in the service's (then process_* has it).",
    ),
    MetricSpec(
        "engine_resident_memory_bytes",
        "gauge",
        "Memory of the process that holds the compiled tickets, which the engine's other processes share; or 0.",
    ),
    MetricSpec("gpu_memory_bytes", "gauge", "GPU memory that the service has reserved; 0 where tickets run on a CPU."),
    MetricSpec(
        "gpu_utilization_ratio",
        "gauge",
        "Share of time in which the GPU ran something, as NVML reports it; 0 on a CPU or without nvidia-ml-py.",
    ),
    MetricSpec("engine_heartbeat_age_seconds", "gauge", "Time since the engine last showed life."),
    MetricSpec(
        "library_tickets", "gauge", "Tickets of the served library, by state.", (("state", ("serving", "baseline")),)
    ),
    MetricSpec("library_info", "gauge", "1 for the digest of the library being served.", (("digest", None),)),
    MetricSpec("library_swaps_total", "counter", "Attempts to swap the library.", (("outcome", ("ok", "refused")),)),
    MetricSpec(
        "audit_runs_total",
        "counter",
        "Audits by profile and outcome.",
        (("kind", ("smoke", "standard", "full", "reference")), ("outcome", AUDIT_OUTCOMES)),
    ),
    MetricSpec(
        "audit_accuracy",
        "gauge",
        "Accuracy (0..1) in the last valid audits of the served library; epsilon: in 255ths; attack all: worst of "
        "a whole profile.",
        (("profile", None), ("norm", None), ("attack", None), ("epsilon", None)),
    ),
    MetricSpec(
        "audit_secrecy",
        "gauge",
        "Robust accuracy with theta secret less with theta known, in the last valid audits of the served library; "
        "bound: of the 95 % interval, or value.",
        (("profile", None), ("norm", None), ("bound", BOUNDS)),
    ),
    MetricSpec(
        "auth_failures_total",
        "counter",
        "Requests with a missing or wrong credential.",
        (("plane", ("public", "admin")),),
    ),
    MetricSpec(
        "build_info",
        "gauge",
        "1; what is running.",
        (("version", None), ("commit", None), ("torch", None), ("python", None)),
    ),
)

Instrument = Counter | Gauge | Histogram


def create(row: MetricSpec, registry: CollectorRegistry) -> Instrument:
    name, labels = PREFIX + row.name, [label for label, _ in row.labels]
    if row.kind == "histogram":
        return Histogram(name, row.meaning, labels, registry=registry, buckets=row.buckets)
    return (Counter if row.kind == "counter" else Gauge)(name, row.meaning, labels, registry=registry)


class Metrics:
    """The table's instruments in a registry of their own. An unknown name is a KeyError: add it to the table.

    metrics.inc("shed_total", reason="queue"); metrics.observe("queue_wait_seconds", 0.1); metrics.set("ready", 1)
    """

    def __init__(self, table: Iterable[MetricSpec] = TABLE) -> None:
        # PROMETHEUS_MULTIPROC_DIR, inherited from another program, would put every value into files of that folder.
        prometheus_values.ValueClass = prometheus_values.MutexValue
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        self.rows = {row.name: row for row in table}
        self.instruments = {name: create(row, self.registry) for name, row in self.rows.items()}
        self.cache: dict[tuple[Any, ...], Any] = {}
        ProcessCollector(registry=self.registry)
        for name, row in self.rows.items():
            self.begin(name, [values for _, values in row.labels])

    def begin(self, name: str, values: Sequence[tuple[str, ...] | None]) -> None:
        """Series of bounded labels exist from the start, so that a rate over the first event is right."""
        if values and all(values):
            for combination in itertools.product(*(some for some in values if some is not None)):
                self.instruments[name].labels(*combination)

    def series(self, name: str, labels: dict[str, str]) -> Any:
        """The one series of these labels. Looked up in a dict of our own: this is done a dozen times a request."""
        key = (name, *labels.items())
        series = self.cache.get(key)
        if series is None:
            series = self.labelled(name, labels)
            if len(self.cache) < CACHE_SIZE:
                self.cache[key] = series
        return series

    def labelled(self, name: str, labels: dict[str, str]) -> Any:
        if not labels:
            return self.instruments[name]
        values = [
            labels[label] if allowed is None or labels[label] in allowed else OTHER
            for label, allowed in self.rows[name].labels
        ]
        return self.instruments[name].labels(*values)

    def inc(self, name: str, amount: float = 1.0, **labels: str) -> None:
        self.series(name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        self.series(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.series(name, labels).observe(value)

    def forget(self, name: str) -> None:
        """Drops a metric's series, for a label such as a digest that has been replaced."""
        self.instruments[name].clear()
        self.cache = {key: series for key, series in self.cache.items() if key[0] != name}

    def samples(self, name: str) -> Iterator[tuple[str, dict[str, str], float]]:
        """Every sample of one metric: its full name, its labels, its value."""
        for family in self.instruments[name].collect():
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value

    def value(self, name: str, **labels: str) -> float:
        """The present value of a counter or gauge, or a histogram's count (append the suffix); 0 where no series is."""
        if name not in self.instruments:
            return self.registry.get_sample_value(PREFIX + name, labels) or 0.0
        wanted = (PREFIX + name, labels)  # one metric alone is read: the registry would read all of them
        return next((value for full, own, value in self.samples(name) if (full, own) == wanted), 0.0)

    def text(self) -> bytes:
        """The exposition format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that an Accept header prefers, OpenMetrics or text, and their content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def describe_build(metrics: Metrics, version: str, commit: str, torch: str) -> None:
    metrics.set("build_info", 1, version=version, commit=commit, torch=torch, python=platform.python_version())
