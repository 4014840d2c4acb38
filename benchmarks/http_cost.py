"""`python -m benchmarks.http_cost`: what a request costs beside its tickets, over HTTP or gRPC, and where that goes.

A server runs over an engine whose tickets cost nothing. Processor time is read from /proc, so that neighbours on a
shared machine matter less than they do for images per second. `--profile` samples the event loop's thread with py-spy
and groups the samples by the code that ran.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from benchmarks import protocols
from benchmarks.requests import files
from benchmarks.servers import Running
from model_store.files import write_atomically
from model_store.library import Library
from service import lifecycle
from service.engine.base import Engine, Images, Logits
from service.outbound import open_url
from service.settings import Settings
from service.web.server import loop_factory

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
# Stages, each with parts of `function (file:line)` as py-spy writes frames. The innermost frame that matches decides.
STAGES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("decode the picture", ("model_store/images.py", "model_store/png.py", "service/web/decoder.py", "PIL/")),
    ("request id", ("token_hex", "token_bytes")),
    ("metrics", ("observability/metrics.py", "prometheus_client/")),
    ("parse HTTP", ("service/web/http_protocol.py", "data_received", "on_headers_complete", "on_body")),
    ("write the answer", ("send (uvicorn", "starlette/responses.py", "flush (service")),
    ("probabilities to JSON", ("json/encoder.py", "respond (service/web/classify.py", "prediction (service")),
    ("admission and queue", ("scheduling/admission.py", "scheduling/scheduler.py")),
    ("hand-over to the engine's threads", ("scheduling/worker_pool.py", "scheduling/batch.py", "threading.py")),
    ("read the body", ("service/web/body.py", "receive (uvicorn")),
    ("middlewares", ("service/web/middleware.py", "service/errors.py", "starlette/middleware")),
    ("keys, route, context", ("service/web/inference.py", "service/web/classify.py", "service/web/auth.py")),
)
REST: Final = "event loop, tasks and the rest"


def free_engine(library: Library, threads: int) -> Engine:
    def forward(_: int, images: Images) -> Logits:
        return np.zeros((len(images), len(library.classes)), np.float32)

    count = len(library.tickets)
    return Engine("free", "cpu", threads, forward, (1,) * count, library.input.shape, 0.0, "costs nothing", 0.0)


async def serve_free_tickets(state: Path, http_processes: int) -> None:
    """Serves until standard input ends. Prints the addresses of HTTP, gRPC and the admin plane once it is ready."""
    settings = Settings(
        port=0,
        admin_port=0,
        grpc=True,
        grpc_port=0,
        state_dir=state,
        threads=2,
        engine="torch",
        device="cpu",
        http_processes=http_processes,
    )
    service = lifecycle.create_service(settings)

    def open_free_engine(library: Library, fork_server: object) -> Engine:
        del fork_server
        return free_engine(library, settings.threads)

    service.manager.open_engine = open_free_engine  # type: ignore[method-assign]
    running = [asyncio.ensure_future(plane.serve_forever()) for plane in service.planes]
    await service.manager.start()
    assert service.grpc is not None
    await service.grpc.start()
    print(service.public_url.removeprefix("http://"), service.grpc.address, service.admin_url, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    service.delay = False
    await lifecycle.shut_down(service, running)


@dataclass(frozen=True)
class Case:
    """What is measured: the code of a work tree, serving one protocol in so many HTTP processes."""

    code: Path
    protocol: str
    http_processes: int

    def __str__(self) -> str:
        return f"{self.code} {self.protocol} --http-processes {self.http_processes}"


@dataclass(frozen=True)
class FreeServer:
    """A server whose tickets cost nothing. places: host:port by protocol."""

    running: Running
    places: Mapping[str, str]


@contextmanager
def free_server(code: Path, http_processes: int) -> Iterator[FreeServer]:
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "benchmarks.http_cost", "--serve", state]
        command += ["--http-processes", str(http_processes)]
        process = subprocess.Popen(command, cwd=code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            try:
                http, grpc, admin = process.stdout.readline().decode().split()
                running = Running(http, process, 0.0, admin)
                wait_until_served(f"http://{http}/health/ready")
                yield FreeServer(running, {"http": http, "grpc": grpc})
            finally:
                process.kill()


def wait_until_served(url: str) -> None:
    """HTTP processes start after the service is ready."""
    late = time.monotonic() + 60
    while time.monotonic() < late:
        with suppress(OSError), open_url(url, 60):
            return
    raise SystemExit(f"no measurement: {url} does not answer")


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor time of the process, and of its main thread, which runs the event loop."""
    whole, loop = (Path(f"/proc/{pid}{thread}/stat").read_text() for thread in ("", f"/task/{pid}"))
    ticks = [sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in (whole, loop)]
    return ticks[0] / TICKS_PER_S, ticks[1] / TICKS_PER_S


def measure(server: FreeServer, protocol: str, clients: int, seconds: float) -> dict[str, float]:
    """Microseconds of processor time a request: of all processes, of the service's own, of its event loop."""
    pid = server.running.process.pid
    before = cpu_seconds(pid)
    form = protocols.infer_png() if protocol == "grpc" else files("/v1/classify")
    figures = protocols.measure(server.running, server.places[protocol], form, seconds, clients)
    after = cpu_seconds(pid)
    whole, loop = (1e6 * (late - early) / figures["images"] for early, late in zip(before, after, strict=True))
    return {
        "all_us": round(1000 * figures["cpu_ms"], 1),
        "process_us": round(whole, 1),
        "loop_us": round(loop, 1),
        "images_per_s": figures["images_per_s"],
    }


def compare(cases: Sequence[Case], clients: int, seconds: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Each case in turn, round after round, so that a slow minute of the machine meets all of them."""
    rounds_of: dict[str, list[dict[str, float]]] = {str(case): [] for case in cases}
    with ExitStack() as stack:
        kinds = dict.fromkeys((case.code, case.http_processes) for case in cases)
        servers = {kind: stack.enter_context(free_server(*kind)) for kind in kinds}
        for _ in range(rounds):
            for case in cases:
                server = servers[case.code, case.http_processes]
                measure(server, case.protocol, clients, 1)
                rounds_of[str(case)].append(measure(server, case.protocol, clients, seconds))
                print(case, rounds_of[str(case)][-1], flush=True)
    for name, rows in rounds_of.items():
        print(name, {key: median(row[key] for row in rows) for key in rows[0]}, "medians", flush=True)
    return rounds_of


def profile(case: Case, clients: int, seconds: float) -> tuple[dict[str, float], Counter[str]]:
    """Samples of the event loop's thread by stage, beside what a request cost while they were taken."""
    with free_server(case.code, case.http_processes) as server, tempfile.TemporaryDirectory() as folder:
        pid = server.running.process.pid
        measure(server, case.protocol, clients, 1)
        stacks = Path(folder) / "stacks"
        spy = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid), "--format", "raw", "--threads"]
        spy += ["--rate", "200", "--duration", str(round(seconds)), "--output", str(stacks), "--nonblocking"]
        with subprocess.Popen(spy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as recorder:
            figures = measure(server, case.protocol, clients, seconds)
            recorder.wait()
        samples: Counter[str] = Counter()
        for line in stacks.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            if "MainThread" in stack:
                samples[stage_of(stack.split(";"))] += int(count)
    return figures, samples


def stage_of(frames: Sequence[str]) -> str:
    for frame in reversed(frames):
        for stage, parts in STAGES:
            if any(part in frame for part in parts):
                return stage
    return REST


def table(figures: dict[str, float], samples: Counter[str]) -> str:
    """Markdown: microseconds of the event loop a request, by stage."""
    total, loop = sum(samples.values()), figures["loop_us"]
    rows = [f"| {stage} | {count / total:.0%} | {loop * count / total:.0f} |" for stage, count in samples.most_common()]
    return "\n".join(("| stage | share | µs |", "| --- | ---: | ---: |", *rows, f"| all | 100% | {loop:.0f} |"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_cost", description=__doc__)
    parser.add_argument("codes", nargs="*", type=Path, default=[Path()], help="work trees to compare (this one)")
    parser.add_argument("--clients", type=int, default=32, help="connections of h2load (32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement (5)")
    parser.add_argument("--rounds", type=int, default=3, help="of all work trees, one after the other (3)")
    parser.add_argument("--protocol", nargs="+", default=["http"], choices=("http", "grpc"), help="to compare (http)")
    parser.add_argument("--http-processes", nargs="+", type=int, default=[1], metavar="N", help="to compare (1)")
    parser.add_argument("--profile", action="store_true", help="print where the event loop's time goes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve_free_tickets(given.serve, given.http_processes[0]))
        return
    if shutil.which("h2load") is None:
        raise SystemExit("http_cost: h2load is not installed; on Debian: apt-get install nghttp2-client")
    cases = [
        Case(code.resolve(), protocol, count)
        for code in given.codes
        for count in given.http_processes
        for protocol in given.protocol
    ]
    if given.profile:
        print(table(*profile(cases[0], given.clients, given.seconds)))
        return
    figures: dict[str, Any] = compare(cases, given.clients, given.seconds, given.rounds)
    if given.json:
        write_atomically(given.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
