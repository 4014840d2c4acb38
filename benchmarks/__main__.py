"""python -m benchmarks compare | overload | audited | soak | grpc | batch | report; `make bench` is compare.

Everything runs on this machine: run nothing else beside it. Needs wrk, and for grpc h2load (Debian: apt-get install wrk
nghttp2-client).
"""

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.batch import measure_batch
from benchmarks.beside import beside_an_audit
from benchmarks.chaos import overload, soak
from benchmarks.figure import draw
from benchmarks.load import closed_loop, open_figures
from benchmarks.protocols import measure_protocols, with_grpc
from benchmarks.report import MARKS, best_peers, markdown_tables, ratios
from benchmarks.requests import Form
from benchmarks.servers import ROOT, VENV, Running, Server, ours, peers, prepare_peers, started
from model_store.errors import PageRejected
from model_store.files import write_atomically
from model_store.library import open_library
from model_store.pages import replace_section
from service.benchmarks.command import machine

CLIENTS: Final = (1, 8, 32, 128)
SHARES: Final = (0.5, 0.8, 1.2)
RESULTS: Final = ROOT / "benchmarks" / "results"


def main() -> int:
    given = arguments()
    if given.what == "report":
        try:
            return report(given)
        except PageRejected as error:
            print(f"bench: {error}", file=sys.stderr)
            return error.exit_code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers under test are ended, too
    for program, package in (("wrk", "wrk"), *((("h2load", "nghttp2-client"),) if given.what == "grpc" else ())):
        if shutil.which(program) is None:
            print(f"bench: {program} is not installed; on Debian: apt-get install {package}", file=sys.stderr)
            return 2
    if given.what == "batch" and given.data is None:
        print("bench: batch needs --data, a zip of pictures", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        figures = MEASURED[given.what](given, Path(folder))
    whole = {
        "what": given.what,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **conditions(given),
        **figures,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out / f"{given.what}.json", json.dumps(whole, indent=1) + "\n")
    if given.what == "compare":
        draw(whole, given.out / "compare.svg")
    print(markdown_tables(given.out))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what", nargs="?", default="compare", choices=(*MEASURED, "report"), help="report: of results that are there"
    )
    parser.add_argument("--library", type=Path, help="folder of the library (the embedded one)")
    parser.add_argument("--seconds", type=float, help="of a measurement (20), of the overload (60), of grpc (4)")
    parser.add_argument("--data", type=Path, help="batch: zip of pictures, such as CIFAR-10's")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak (10)")
    parser.add_argument("--only", nargs="*", help="peers, such as fastapi 'mosec grouped' (all); ours always")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--into", type=Path, help="report: the page whose table is rebuilt")
    given = parser.parse_args()
    given.seconds = given.seconds or {"overload": 60.0, "grpc": 4.0}.get(given.what, 20.0)
    return given


def conditions(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    versions = {name: version_of(name) for name in ("fastapi", "uvicorn", "litserve", "mosec")}
    git = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False)
    library = open_library(given.library)
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False)
    versions["wrk"] = (wrk.stdout + wrk.stderr).removeprefix("wrk ").split(" ", maxsplit=1)[0].removeprefix("debian/")
    return {
        "machine": machine(),
        "versions": versions,
        "commit": commit.stdout.strip() or "unknown",
        "library": {"digest": library.digest, "tickets": len(library.tickets)},
        "seconds": given.seconds,
    }


def version_of(package: str) -> str:
    python = VENV / "bin" / "python" if (VENV / "ready").exists() else Path(sys.executable)
    command = f"import importlib.metadata as m; print(m.version('{package}'))"
    done = subprocess.run([str(python), "-c", command], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not installed"


def compare(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    """(a) the raw engine, (b) this server, (c) its peers, which come first: ours is also given the best ones' load. The
    raw engine is measured before and after ours: a shared machine is not as fast ten minutes later."""
    prepare_peers()
    servers: dict[str, Any] = {}
    for server in peers(state):
        if not given.only or server.name in given.only:
            servers[server.name] = measure_server(server, given, [])
    before = raw(given, state), forwards(given, state)
    mine = ours(given.library, state)
    servers[mine.name] = measure_server(mine, given, [peer["rate"] for peer in best_peers(servers).values()])
    after = raw(given, state), forwards(given, state)
    figures = {
        "raw": mean_of_runs(before[0], after[0]),
        "forwards": mean_of_runs(before[1], after[1]),
        "servers": servers,
    }
    return figures | {"ratios": ratios(figures)}


def measure_server(server: Server, given: argparse.Namespace, rates: Sequence[float]) -> dict[str, Any]:
    with started(server, given.library) as running:
        figures = measure_forms(server, running, given.seconds, rates)
    print(f"{server.name}: done", flush=True)
    return figures


def mean_of_runs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of two runs, what they measured: numbers with a fraction."""
    means = {name: round((first[name] + second[name]) / 2, 3) for name in first if isinstance(first[name], float)}
    return first | means | {"runs": [first, second]}


def raw(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    """In a process of its own, as the servers are."""
    out = state / "raw.json"
    command = [sys.executable, "-m", "tombola", "bench", "raw", "--images", "1024", "--json", str(out)]
    command += ["--state-dir", str(state)]
    command += [] if given.library is None else ["--library", str(given.library)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def forwards(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    """The sum of the forward times of a draw's members, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.forwards",
        str(state),
        *([str(given.library)] if given.library else []),
    ]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure_forms(server: Server, running: Running, seconds: float, rates: Sequence[float]) -> dict[str, Any]:
    """rates: further loads, in images a second, that others were measured at."""
    forms = [(name, form()) for name, form in server.forms]
    figures: dict[str, Any] = {
        "kind": server.kind,
        "tuning": dict(server.variables),
        "start_s": round(running.start_s, 2),
    }
    figures |= {"idle_mb": round(running.memory_mb(), 1)}
    figures["forms"] = {name: measure_form(form, running, seconds) for name, form in forms}
    figures["equal"] = [run_open_loop(running, forms[0][1], rate, seconds) for rate in rates]
    return figures | {"busy_mb": round(running.memory_mb(), 1)}


def measure_form(form: Form, running: Running, seconds: float) -> dict[str, Any]:
    """Closed loop, then open loop at shares of the capacity that it showed."""
    closed_loop(running.place, form, 8, min(3.0, seconds))  # warm
    closed = [run_closed_loop(running, form, clients, seconds) for clients in CLIENTS]
    capacity = max(row["images_per_s"] for row in closed)
    shares = [{"share": share, **run_open_loop(running, form, share * capacity, seconds)} for share in SHARES]
    return {"closed": closed, "capacity": capacity, "open": shares}


def run_open_loop(running: Running, form: Form, rate: float, seconds: float) -> dict[str, Any]:
    return open_figures(running.place, form, rate, seconds, deadline_s=1.0)


def run_closed_loop(running: Running, form: Form, clients: int, seconds: float) -> dict[str, Any]:
    before = running.cpu_s()
    figures = closed_loop(running.place, form, clients, seconds)
    used = running.cpu_s() - before
    return figures | {"server_cpu_ms_per_image": round(1000 * used / max(1, figures["answers"]), 3)}


def run_overload(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    with started(ours(given.library, state), given.library) as running:
        return overload(running, given.seconds)


def run_soak(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    with started(ours(given.library, state), given.library) as running:
        return asyncio.run(soak(running, given.minutes * 60, state / "engine"))


def run_beside_audit(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    with started(ours(given.library, state), given.library) as running:
        return beside_an_audit(running, (state / "admin-token").read_text().strip(), given.seconds)


def run_grpc(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    server, place = with_grpc(ours(given.library, state))
    with started(server, given.library) as running:
        return measure_protocols(running, place, given.seconds)


def run_batch(given: argparse.Namespace, state: Path) -> dict[str, Any]:
    return measure_batch(given.data, state, given.library)


MEASURED: Final = {
    "compare": compare,
    "overload": run_overload,
    "audited": run_beside_audit,
    "soak": run_soak,
    "grpc": run_grpc,
    "batch": run_batch,
}


def report(given: argparse.Namespace) -> int:
    """The README's table and the figure, from the results."""
    draw(json.loads((given.out / "compare.json").read_text()), given.out / "compare.svg")
    text = markdown_tables(given.out)
    if given.into is None:
        print(text)
    else:
        replace_section(given.into, MARKS, text)
        print(f"{given.into}: its table of benchmarks is that of {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
