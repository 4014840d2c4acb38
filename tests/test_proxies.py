"""No client of the project asks a proxy that the environment names: neither for loopback nor with a token."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from service.audit.attacks.black_box import HttpOracle
from service.audit.command import add_options, audit_remotely
from service.audit.errors import AuditError, AuditRejected, OracleFailed
from service.benchmarks.capacity import RunningServer
from service.observability.tracing import provider
from service.outbound import http_client, open_url
from tests.support.http_server import running
from tests.support.serving import ROOT, serving, tiny_library
from tests.support.side_effects import Listener, listening

PROGRAMS: Final = ("tombola", "model_store", "service", "training", "tests", "benchmarks", "tools")
# Calls that read the environment's proxies, as `module.name`.
TRUSTING: Final = re.compile(
    r"(urllib\.request|request)\.(urlopen|build_opener|urlretrieve)|urlopen|"
    r"httpx\.(Client|AsyncClient|get|post|put|delete|request|stream)|"
    r"requests\.(Session|get|post|put|request)|aiohttp\.ClientSession"
)
TOKEN: Final = "a-token-that-no-proxy-may-see"


@dataclass
class Origin:
    """The server that is meant. heard: of each request its line and its Authorization."""

    url: str
    status: int = 200
    heard: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def origin() -> Iterator[Origin]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            site.heard.append((f"{self.command} {self.path}", self.headers["authorization"]))
            self.rfile.read(int(self.headers["content-length"] or 0))
            self.send_response(site.status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST = answer  # noqa: N815 -- the names that http.server looks for

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with running(server):
        site = Origin(f"http://127.0.0.1:{server.server_port}")
        yield site


@pytest.fixture
def meant() -> Iterator[Origin]:
    with origin() as site:
        yield site


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Every variable that names a proxy names this one, and nothing is excepted from it."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with listening() as listener:
        for name, value in listener.environment.items():
            monkeypatch.setenv(name, value)
        yield listener


def test_the_proxy_would_have_heard_what_trusts_the_environment(meant: Origin, proxy: Listener) -> None:
    """The rest of this file means something only because of this."""
    with pytest.raises(OSError, match="closed connection"):
        urllib.request.build_opener().open(meant.url, timeout=10)  # urlopen keeps the opener of an earlier test
    assert proxy.heard[0].startswith(f"GET {meant.url} ".encode())
    assert meant.heard == []


def audit(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(["--profile", "smoke", *words])


def test_an_audit_of_a_running_service_asks_it_and_nobody_else(meant: Origin, proxy: Listener, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with pytest.raises(AuditError, match="no JSON"):
        audit_remotely(audit("--admin-url", meant.url, "--token-file", str(tmp_path / "token")))
    assert meant.heard == [("POST /admin/audits", f"Bearer {TOKEN}")]
    assert proxy.heard == []


def test_an_audit_asks_through_the_proxy_that_it_is_given(meant: Origin, tmp_path: Path) -> None:
    with listening() as listener, pytest.raises(AuditError, match="RemoteProtocolError"):
        audit_remotely(audit("--admin-url", meant.url, "--proxy", listener.url))
    assert listener.heard[0].startswith(f"POST {meant.url}/admin/audits ".encode())
    assert meant.heard == []


@pytest.mark.parametrize("wrong", ["ftp://127.0.0.1:1", "nowhere", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_refused_in_one_line(wrong: str) -> None:
    with pytest.raises(AuditRejected, match=f"^proxy {re.escape(wrong)}: [^\n]*$"):
        audit_remotely(audit("--admin-url", "http://127.0.0.1:1", "--proxy", wrong))


def test_black_box_attacks_ask_the_service_itself(meant: Origin, proxy: Listener) -> None:
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with HttpOracle(meant.url, 10, TOKEN) as oracle, pytest.raises(OracleFailed, match="cannot be read"):
        oracle(pixels)
    assert meant.heard == [("POST /v1/classify", f"Bearer {TOKEN}")]
    assert proxy.heard == []


def test_measurements_read_the_metrics_of_the_server_itself(meant: Origin, proxy: Listener) -> None:
    assert RunningServer(meant.url, meant.url).metrics() == {}
    open_url(f"{meant.url}/health/live").close()
    with http_client(timeout_s=10) as client:
        client.get(f"{meant.url}/health/ready")
    assert [line for line, _ in meant.heard] == ["GET /metrics", "GET /health/live", "GET /health/ready"]
    assert proxy.heard == []


@pytest.mark.parametrize("given", [False, True], ids=["direct", "through a proxy of its own"])
def test_traces_go_to_the_collector_itself_unless_a_proxy_is_set(
    meant: Origin, proxy: Listener, monkeypatch: pytest.MonkeyPatch, *, given: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", meant.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={TOKEN}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with listening() as listener:
        tracer = provider("1", listener.url if given else "")
        tracer.get_tracer("a test").start_span("a span").end()
        tracer.shutdown()
    assert (meant.heard == []) == given
    assert (listener.heard != []) == given
    assert given or set(meant.heard) == {("POST /v1/traces", TOKEN)}
    assert proxy.heard == []


def healthcheck() -> list[str]:
    """The command of the Dockerfile's HEALTHCHECK."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    match = re.search(
        r"^HEALTHCHECK .*\
\s*CMD (\[.*\])$",
        text,
        re.MULTILINE,
    )
    assert match is not None
    python, *words = ast.literal_eval(match[1])
    assert python == "python"
    return [sys.executable, *words]


@pytest.mark.parametrize("status", [200, 503])
def test_a_container_s_health_is_what_its_server_says(meant: Origin, proxy: Listener, status: int) -> None:
    meant.status = status
    port = meant.url.rpartition(":")[2]
    done = subprocess.run(healthcheck(), env={**os.environ, "TOMBOLA_PORT": port}, timeout=30, check=False)
    assert (done.returncode == 0) == (status == 200)
    assert meant.heard == [("GET /health/ready", None)]
    assert proxy.heard == []


@pytest.mark.usefixtures("warm_start_once")
def test_the_line_that_a_server_prints_works_where_a_proxy_is_set(proxy: Listener, tmp_path: Path) -> None:
    tiny_library(tmp_path / "library")
    with serving(tmp_path / "library", tmp_path / "state") as process:
        printed = next(line for line in process.output if line.startswith("try"))
        words = shlex.split(printed.removeprefix("try"))
        done = subprocess.run([*words, "--silent"], capture_output=True, text=True, timeout=60, check=False)
        assert "predictions" in done.stdout
    assert proxy.heard == []


def calls(file: Path) -> Iterator[tuple[str, int]]:
    """Calls that read the environment's proxies: httpx's with a transport, or told not to, do not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if not isinstance(node, ast.Call) or {"transport", "trust_env"} & {word.arg for word in node.keywords}:
            continue
        if TRUSTING.fullmatch(ast.unparse(node.func)):
            yield ast.unparse(node.func), node.lineno


def test_clients_are_made_in_one_place() -> None:
    excepted = {
        ("service/outbound.py", "urllib.request.build_opener"),  # with no proxies
        ("service/observability/tracing.py", "requests.Session"),  # told so in the next line
        ("tests/test_proxies.py", "urllib.request.build_opener"),  # to show that the proxy hears it
    }
    files = [path for name in PROGRAMS for path in sorted((ROOT / name).rglob("*.py"))]
    makers = {(path.relative_to(ROOT).as_posix(), name) for path in files for name, _ in calls(path)}
    assert makers == excepted
