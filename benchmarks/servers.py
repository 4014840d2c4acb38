"""The servers under test: started as processes, waited for, measured, ended."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import requests
from benchmarks.requests import Form
from service.cpu import cpu_s, process_tree, usable_cores
from service.outbound import open_url

ROOT: Final = Path(__file__).parents[1]
VENV: Final = ROOT / ".venv" / "bench"  # the peers, over the packages of the project's own environment
PEERS: Final = ("litserve>=0.2.17,<0.3", "mosec>=0.9.5,<1")


KINDS: Final = ("plain", "grouped", "compiled")
# Rows of a batch and how long one waits for them, of LitServe and of mosec, by kind: of those tried the fastest at 32
# clients. One by one a batch gains nothing; grouped by ticket, more rows share a forward pass.
BATCHES: Final = {"plain": ("4", "1"), "grouped": ("16", "5"), "compiled": ("16", "5")}


@dataclass(frozen=True)
class Server:
    """command: with {port} and {cores} to be filled in. health: answers 200 once it serves. variables: of the
    environment, its tuning among them. kind: what of this project a peer takes over; ours have none."""

    name: str
    command: tuple[str, ...]
    health: str
    forms: tuple[tuple[str, Callable[[], Form]], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""


def ours(library: Path | None, state: Path) -> Server:
    flags = ("--port", "{port}", "--admin-port", "{admin}", "--state-dir", str(state), "--drain-delay-s", "0")
    chosen = () if library is None else ("--library", str(library))
    command = (sys.executable, "-m", "tombola", "serve", *flags, *chosen)
    forms = (("png", lambda: requests.files("/v1/classify")), ("tensor", requests.tensors))
    return Server("tombola", command, "/health/ready", forms)


def peers(state: Path) -> list[Server]:
    """FastAPI gives no batches, so there is nothing to group there."""
    python, where = str(VENV / "bin" / "python"), "benchmarks.peers."
    fastapi = (sys.executable, "-m", where + "fastapi_server", "{port}", "{cores}")
    litserve = (python, "-m", where + "litserve_server", "{port}", "{cores}")
    mosec = (python, "-m", where + "mosec_server", "--address", "127.0.0.1", "--port", "{port}", "--timeout", "30000")
    png, as_json = requests.files, requests.base64_json
    servers = [Server("fastapi", fastapi, "/health", (("png", lambda: png("/classify")),), kind="plain")]
    for kind in KINDS:
        tuning = dict(zip(("BENCH_BATCH", "BENCH_WAIT_MS"), BATCHES[kind], strict=True))
        variables = {"BENCH_KIND": kind, "BENCH_STATE": str(state), **tuning}
        suffix = "" if kind == "plain" else f" {kind}"
        forms = (("base64", lambda: as_json("/predict")),)
        servers.append(Server("litserve" + suffix, litserve, "/health", forms, variables, kind))
        flags = (*mosec, "--log-level", "error")
        servers.append(Server("mosec" + suffix, flags, "/", (("png", lambda: png("/inference")),), variables, kind))
    return servers


def prepare_peers() -> None:
    """A second environment beside the project's, which sees the project's packages (torch is not installed twice)."""
    if (VENV / "ready").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    place = next((VENV / "lib").glob("python*")) / "site-packages"
    (place / "project.pth").write_text(packages + "\n")
    subprocess.run([str(VENV / "bin" / "pip"), "install", "--quiet", *PEERS], check=True)
    (VENV / "ready").touch()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@dataclass
class Running:
    """admin: base URL of our admin plane; peers have none, and nothing listens there."""

    place: str
    process: subprocess.Popen[bytes]
    start_s: float
    admin: str

    def memory_mb(self) -> float:
        """Of the process and all below it: proportional set size where the kernel tells, so shared pages count once."""
        return sum(set_size_kb(process) for process in process_tree(self.process.pid)) / 1024

    def metric(self, name: str) -> float:
        """The sum of our series whose lines begin so."""
        with open_url(f"{self.admin}/metrics", 30) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"tombola_{name}"))

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def cpu_s(self) -> float:
        return sum(cpu_s(process) for process in process_tree(self.process.pid))


@contextmanager
def started(server: Server, library: Path | None) -> Iterator[Running]:
    port, admin, cores = free_port(), free_port(), usable_cores()
    command = [part.format(port=port, admin=admin, cores=cores) for part in server.command]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "BENCH_CORES": str(cores), "OMP_NUM_THREADS": "1"}
    variables |= server.variables
    if library is not None:
        variables["BENCH_LIBRARY"] = str(library)
    with tempfile.TemporaryFile() as log:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=ROOT, process_group=0)
        try:
            if not answers(f"http://127.0.0.1:{port}{server.health}", process):
                log.seek(0)
                output = log.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"{server.name}: not ready, exit code {process.poll()}; output: {output}")
            yield Running(f"127.0.0.1:{port}", process, time.perf_counter() - started_at, f"http://127.0.0.1:{admin}")
        finally:
            end(process)


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Waits for a 200; False when the process ends, or after five minutes."""
    late = time.monotonic() + 300
    while time.monotonic() < late and process.poll() is None:
        with suppress(OSError), open_url(url, 5) as response:
            if response.status == 200:
                return True
        time.sleep(0.05)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then the whole group of processes that this one started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def set_size_kb(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
