"""A real Prometheus scrapes a real server under load, and every recorded query of rules and dashboard returns data."""

import base64
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from service.observability.metrics import Metrics
from service.outbound import open_url
from tests.deploy.test_files import PROMETHEUS, alerts, queries, rules
from tests.support.http_server import running
from tests.support.planes import png
from tests.support.serving import Process, over_and_over, serving, tiny_library

pytestmark = pytest.mark.usefixtures("warm_start")

LIMIT_S: Final = 120
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"
)


@contextmanager
def audited() -> Iterator[str]:
    """host:port of an exposition that shows a finished audit: running one here would take minutes."""
    metrics = Metrics()
    metrics.set("ready", 1)
    metrics.set("audit_accuracy", 0.31, profile="smoke", norm="linf", attack="all", epsilon="8")

    class Exposition(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(metrics.text())

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Exposition)
    with running(server):
        yield f"127.0.0.1:{server.server_port}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """The shipped configuration, with these targets and no patience. Gives Prometheus' address."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["scrape_configs"] = [{"job_name": "tombola", "static_configs": [{"targets": targets}]}]
    config["rule_files"] = [str(PROMETHEUS / "rules.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file", str(folder / "prometheus.yml"), "--web.listen-address", address]
    command += ["--storage.tsdb.path", str(folder / "tsdb"), "--log.level", "error"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def load(server: Process) -> AbstractContextManager[None]:
    """Classification on both protocols, until left."""
    body = json.dumps({"images": [base64.b64encode(png(red)).decode() for red in range(64)]}).encode()
    tensor = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [7] * 3072}
    infer = urllib.request.Request(
        f"{server.public}/v2/models/tombola/infer", json.dumps({"inputs": [tensor]}).encode()
    )

    def ask() -> None:
        server.classify(body, **{"content-type": "application/json"})
        open_url(infer, 30).close()

    return over_and_over(ask, 0.05)


def answer(address: str, query: str) -> list[Any]:
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with open_url(url, 30) as response:
            series: list[Any] = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 503:  # it is still starting
                return []
            raise AssertionError(f"{query}: {error.read().decode()}") from None
    except OSError:  # it does not listen yet
        return []
    return series


def filled(query: str, rate_interval: str = "1m") -> str:
    """A dashboard's query as Grafana would send it."""
    values = {"$namespace": ".*", "$job": ".*", "$__rate_interval": rate_interval, "$__range": "1h"}
    for name, value in values.items():
        query = query.replace(name, value)
    return query


def queried_series() -> list[str]:
    """Queries of the dashboard, recorded rules, and each series that an alert looks at."""
    names = {name for alert in alerts() for name in re.findall(r"\b(?:tombola[:_]|process_|up\b)[\w:]*", alert["expr"])}
    return [*map(filled, queries()), *(rule["record"] for rule in rules() if "record" in rule), *sorted(names)]


def wait_for(condition: Callable[[], list[str]]) -> list[str]:
    """What is still missing after LIMIT_S; looks every half second."""
    late = time.monotonic() + LIMIT_S
    while (missing := condition()) and time.monotonic() < late:
        time.sleep(0.5)
    return missing


@needs_prometheus
def test_every_query_of_dashboard_and_rules_returns_data_from_a_server_under_load(tmp_path: Path) -> None:
    wanted, library = queried_series(), tiny_library(tmp_path / "library")
    (tmp_path / "prometheus").mkdir()
    with serving(library.path, tmp_path / "state") as server, audited() as audit:
        targets = [server.admin.removeprefix("http://"), audit]
        with load(server), prometheus(tmp_path / "prometheus", targets) as address:
            missing = wait_for(lambda: [query for query in wanted if not answer(address, query)])
            with open_url(f"{address}/api/v1/rules", 30) as response:
                groups = json.load(response)["data"]["groups"]
    assert not missing
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    print(f"\n{len(wanted)} queries, all with data")
