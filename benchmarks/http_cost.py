"""`python -m benchmarks.http_cost`: what a request costs beside its tickets, and where that time goes.

A server runs over an engine whose tickets cost nothing. Processor time is read from /proc, so that neighbours on a
shared machine matter less than they do for images per second. `--profile` samples the event loop's thread with py-spy
and groups the samples by the code that ran.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.load import closed_loop
from benchmarks.requests import files
from model_store.files import write_atomically
from model_store.library import Library
from service import lifecycle
from service.engine.base import Engine, Images, Logits
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


async def serve_free_tickets(state: Path) -> None:
    """Serves until standard input ends. Prints the public plane's address once it is ready."""
    settings = Settings(port=0, admin_port=0, state_dir=state, threads=2, engine="torch", device="cpu")
    service = lifecycle.create_service(settings)

    def open_free_engine(library: Library, fork_server: object) -> Engine:
        del fork_server
        return free_engine(library, settings.threads)

    service.manager.open_engine = open_free_engine  # type: ignore[method-assign]
    running = [asyncio.ensure_future(plane.serve_forever()) for plane in service.planes]
    await service.manager.start()
    print(service.public_url.removeprefix("http://"), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    service.delay = False
    await lifecycle.shut_down(service, running)


@contextmanager
def free_server(code: Path) -> Iterator[tuple[str, int]]:
    """host:port and process id of a server of that code's work tree."""
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "benchmarks.http_cost", "--serve", state]
        process = subprocess.Popen(command, cwd=code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip(), process.pid
            finally:
                process.kill()


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor time of the process, and of its main thread, which runs the event loop."""
    whole, loop = (Path(f"/proc/{pid}{thread}/stat").read_text() for thread in ("", f"/task/{pid}"))
    ticks = [sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in (whole, loop)]
    return ticks[0] / TICKS_PER_S, ticks[1] / TICKS_PER_S


def measure(place: str, pid: int, clients: int, seconds: float) -> dict[str, float]:
    """Microseconds of processor time a request."""
    before = cpu_seconds(pid)
    figures = closed_loop(place, files("/v1/classify"), clients, seconds)
    after = cpu_seconds(pid)
    if figures["refused"] or figures["broken"]:
        raise SystemExit(f"{figures['refused']} refused, {figures['broken']} broken: no measurement")
    whole, loop = (1e6 * (late - early) / figures["answers"] for early, late in zip(before, after, strict=True))
    return {"process_us": round(whole, 1), "loop_us": round(loop, 1), "images_per_s": figures["images_per_s"]}


def compare(codes: Sequence[Path], clients: int, seconds: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Each code in turn, round after round, so that a slow minute of the machine meets all of them."""
    rounds_of: dict[str, list[dict[str, float]]] = {str(code): [] for code in codes}
    with ExitStack() as stack:
        servers = {str(code): stack.enter_context(free_server(code)) for code in codes}
        for _ in range(rounds):
            for code, (place, pid) in servers.items():
                measure(place, pid, clients, 1)
                rounds_of[code].append(measure(place, pid, clients, seconds))
                print(code, rounds_of[code][-1], flush=True)
    return rounds_of


def profile(code: Path, clients: int, seconds: float) -> tuple[dict[str, float], Counter[str]]:
    """Samples of the event loop's thread by stage, beside what a request cost while they were taken."""
    with free_server(code) as (place, pid), tempfile.TemporaryDirectory() as folder:
        measure(place, pid, clients, 1)
        stacks = Path(folder) / "stacks"
        spy = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid), "--format", "raw", "--threads"]
        spy += ["--rate", "200", "--duration", str(round(seconds)), "--output", str(stacks), "--nonblocking"]
        with subprocess.Popen(spy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as recorder:
            figures = measure(place, pid, clients, seconds)
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
    parser.add_argument("--clients", type=int, default=32, help="connections of wrk (32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement (5)")
    parser.add_argument("--rounds", type=int, default=3, help="of all work trees, one after the other (3)")
    parser.add_argument("--profile", action="store_true", help="print where the event loop's time goes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve_free_tickets(given.serve))
    elif given.profile:
        print(table(*profile(given.codes[0].resolve(), given.clients, given.seconds)))
    else:
        codes = [code.resolve() for code in given.codes]
        figures: dict[str, Any] = compare(codes, given.clients, given.seconds, given.rounds)
        if given.json:
            write_atomically(given.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
