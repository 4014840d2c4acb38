"""Two replicas behind haproxy: a rolling restart under load loses no request."""

import http.client
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from tests.deploy.test_files import DEPLOY
from tests.deploy.test_prometheus import free_port
from tests.support.serving import Process, fetch, serving, tiny_library
from tests.support.waiting import until
from tombola.sample_image import draw_sample

pytestmark = pytest.mark.usefixtures("warm_start")

CLIENTS = 3
PAUSE_S = 0.02  # of a client between two requests: the replicas that start need the cores more


@contextmanager
def haproxy(first: int, second: int) -> Iterator[str]:
    """The shipped configuration before two replicas on this machine. Gives its address."""
    port = free_port()
    places = {"BIND": f"127.0.0.1:{port}", "REPLICA_A": f"127.0.0.1:{first}", "REPLICA_B": f"127.0.0.1:{second}"}
    command = [str(shutil.which("haproxy")), "-db", "-q", "-f", str(DEPLOY / "haproxy.cfg")]
    with subprocess.Popen(command, env=os.environ | places, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


class Load:
    """CLIENTS that go on asking, each on a connection it keeps as long as it may, until left."""

    def __init__(self, address: str) -> None:
        self.address = address.removeprefix("http://")
        self.statuses: list[int] = []
        self.lost: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def ask(self) -> None:
        with closing(http.client.HTTPConnection(self.address, timeout=60)) as connection:
            while not self.over.wait(PAUSE_S):
                try:
                    connection.request("POST", "/v1/classify", draw_sample())
                    response = connection.getresponse()
                    response.read()
                    self.statuses.append(response.status)
                except (OSError, http.client.HTTPException) as error:
                    self.lost.append(repr(error))
                    connection.close()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_a_rolling_restart_of_two_replicas_loses_no_request(tmp_path: Path) -> None:
    library = tiny_library(tmp_path / "library")
    ports = (free_port(), free_port())
    with ExitStack() as stack:

        def start(name: str, port: int) -> Process:
            state = tmp_path / name / "state"
            state.parent.mkdir()
            return stack.enter_context(serving(library.path, state, "--port", str(port), "--drain-delay-s", "3"))

        old = [start(f"old{port}", port) for port in ports]
        proxy = stack.enter_context(haproxy(*ports))
        until(lambda: answers(proxy))
        with Load(proxy) as load:
            until(lambda: all(took_part(replica) for replica in old))
            for port, replica in zip(ports, old, strict=True):
                assert replica.end() == 0
                new = start(f"new{port}", port)
                until(partial(took_part, new))
    assert load.lost == []
    assert set(load.statuses) == {200}
    print(f"\n{len(load.statuses)} requests, all answered")


def answers(address: str) -> bool:
    try:
        return fetch(urllib.request.Request(f"{address}/health/ready"))[0] == 200
    except OSError:  # nobody listens yet
        return False


def took_part(replica: Process) -> bool:
    """Whether the proxy has sent it anything."""
    return replica.metric('inference_requests_total{outcome="ok"}') > 10
