"""Reads requests with two parsers and compares: a real nginx or haproxy in front, this service's protocol behind it.

    python -m tools.fuzz.http_differential --requests 100000 --proxies nginx nginx-stream haproxy haproxy-lenient

Every request that the proxy passes on gets an id of the proxy's. The application behind answers with the id that it
read, and the proxy adds the id of the request that it believes to be answering. A connection is desynchronised if

- an answer's two ids differ, or it is not the answer to the request whose number it carries;
- a good request is not answered with 200 and the digest of its own body;
- the application reads a request that the proxy has not passed on: without an id, or with one it had before.

Between hostile connections an innocent client asks over the same upstream connections: what an attacker has left in
one would be its answer. Ends with one line, and 1 if a connection was desynchronised.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, cast

from starlette.types import Receive, Scope, Send

from service.settings import Settings
from service.web.server import create_server, loop_factory
from tests.support.http_wire import Answer, chunked, random_cuts, read_answers

WEBSOCKET: Final = "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;"
NGINX: Final = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u;
  scgi_temp_path s; underscores_in_headers on; ignore_invalid_headers off; keepalive_requests 100000;
  upstream service {{ server 127.0.0.1:{service}; keepalive 2; keepalive_requests 100000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://service; proxy_http_version 1.1; proxy_set_header Host $host;
      proxy_set_header X-Proxy-Id $request_id; add_header X-Proxy-Id $request_id always; {extra}
    }}
  }}
}}
"""
HAPROXY: Final = """
defaults
    mode http
    timeout connect 2s
    timeout client 5s
    timeout server 5s
    timeout http-request 5s
    retries 0
    http-reuse always
    {extra}
frontend public
    bind 127.0.0.1:{port}
    unique-id-format %[uuid]
    http-request set-header X-Proxy-Id %[unique-id]
    http-response set-header X-Proxy-Id %[unique-id]
    default_backend service
backend service
    server service 127.0.0.1:{service} pool-max-conn 4
"""
PROXIES: Final = {
    "nginx": ("nginx", 'proxy_set_header Connection "";'),
    "nginx-websocket": ("nginx", WEBSOCKET),
    "nginx-stream": ("nginx", f"proxy_request_buffering off; {WEBSOCKET}"),
    "haproxy": ("haproxy", ""),
    "haproxy-lenient": ("haproxy", "option accept-invalid-http-request"),
}
"""Name -> program, and what its configuration says beside the above."""
SMUGGLED: Final = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADES: Final = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQC\r\n",
    b"Upgrade: h2c\r\n",
    b"Connection: keep-alive, upgrade\r\nUpgrade: x/1\r\n",
)
HOSTILE: Final = (
    b"Content-Length: 3\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: +3\r\n",
    b"Content-Length : 3\r\n",
    b"Content-Length:\r\n 3\r\n",
    b"Content-Length: 3, 3\r\n",
    b"Content_Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding:\r\n chunked\r\n",
    b"Transfer_Encoding: chunked\r\n",
    b"Transfer-Encoding\t: chunked\r\n",
    b"X: y\nTransfer-Encoding: chunked\r\n",
    b"X: y\rTransfer-Encoding: chunked\r\n",
    b"X: \0\r\n",
    b"X: \x7f\xff\r\n",
    b"X: y\r\n z\r\n",
    b"\r: y\r\n",
    b"Connection: close, Content-Length\r\n",
    b"Connection: Transfer-Encoding\r\n",
    b"Connection: close\r\n",
    b"Proxy-Connection: upgrade\r\nUpgrade: x\r\n",
    b"Expect: 100-continue\r\n",
    b"Expect: nonsense\r\n",
    b"Host: y\r\n",
    b"TE: trailers\r\nTrailer: X-Proxy-Id\r\n",
    *UPGRADES,
)
LINES: Final = (
    b"CONNECT x:80 HTTP/1.1",
    b"GET http://x/%d HTTP/1.1",
    b"GET http://y/%d HTTP/1.1",
    b"POST /%d HTTP/1.0",
    b"POST /%d HTTP/0.9",
    b"POST /%d HTTP/2.0",
    b"POST /%d HTTP/1.2",
    b"POST /%d RTSP/1.0",
    b"POST  /%d  HTTP/1.1",
    b"POST\t/%d HTTP/1.1",
    b"POST /%d#x HTTP/1.1",
    b"POST /%d\x01 HTTP/1.1",
    b"POST /%d\xff HTTP/1.1",
    b"PUT /%d HTTP/1.1",
    b"HEAD /%d HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"SOURCE /%d ICE/1.0",
    b"POST /%d HTTP/1.1\n",
)
EXTENSIONS: Final = (b"", b"", b";a=b", b';a="b"', b";a\n", b" ", b";\r", b";a=\0")
TRAILERS: Final = (b"", b"", b"X: y\r\n", b"Content-Length: 3\r\n", b"X-Proxy-Id: forged\r\n", b"Connection: close\r\n")


@dataclass(frozen=True)
class Request:
    """number: in the path.  good: every parser has to read it as this one request, so its answer is known."""

    number: int
    data: bytes
    body: bytes
    good: bool


def good_request(number: int, rng: random.Random) -> Request:
    """A request in one of many valid forms; most ask for an upgrade."""
    body = rng.choice((b"", b"x", SMUGGLED, SMUGGLED * 3, rng.randbytes(rng.randint(1, 3000))))
    headers = [b"Host: x\r\n", rng.choice((*UPGRADES, b"", b"Connection: keep-alive\r\n"))]
    if rng.random() < 0.5:
        headers.append(b"Transfer-Encoding: chunked\r\n")
        coded = chunked(body, rng, trailers=rng.choice((b"", b"X: y\r\n")))
    else:
        headers.append(b"Content-Length: %d\r\n" % len(body))
        coded = body
    rng.shuffle(headers)
    return Request(number, b"POST /%d HTTP/1.1\r\n%s\r\n%s" % (number, b"".join(headers), coded), body, good=True)


def hostile_request(number: int, rng: random.Random) -> Request:
    """A request with some of what parsers have been known to differ about, and another hidden in its body."""
    line = b"POST /%d HTTP/1.1" if rng.random() < 0.7 else rng.choice(LINES)
    headers = [b"Host: x\r\n", *rng.sample(HOSTILE, rng.randint(1, 3))]
    body = rng.choice((b"", b"abc", SMUGGLED, b"abc" + SMUGGLED))
    coded = rng.choice(
        (body, chunked(body, rng, rng.choice(EXTENSIONS), rng.choice(TRAILERS)), b"0\r\n\r\n" + SMUGGLED)
    )
    if rng.random() < 0.5:
        headers.append(b"Content-Length: %d\r\n" % len(coded))
    rng.shuffle(headers)
    data = line.replace(b"%d", b"%d" % number) + b"\r\n" + b"".join(headers) + b"\r\n" + coded
    if rng.random() < 0.2:
        place = rng.randrange(len(data))
        data = data[:place] + rng.choice((b"\r", b"\n", b"\0", b" ", b"\t", b",", b"\r\n")) + data[place:]
    return Request(number, data, body, good=False)


@dataclass
class Backend:
    """The application behind the protocol. It answers with what it read, and notes the proxy's ids."""

    ids: Counter[str] = field(default_factory=Counter)
    read: int = 0
    wrong: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message["body"]
            more = message["more_body"]
        ids = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-proxy-id"]
        self.note(scope["path"], ids)
        content = {"path": scope["path"], "digest": hashlib.sha256(body).hexdigest()}
        encoded = json.dumps(content).encode()
        headers = [(b"content-length", str(len(encoded)).encode()), (b"x-seen-id", ",".join(ids).encode("latin-1"))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": encoded})

    def note(self, path: str, ids: list[str]) -> None:
        self.read += 1
        self.ids.update(ids)
        if len(ids) != 1 or self.ids[ids[0]] > 1:
            self.wrong.append(f"the application read {path} with the ids {ids}: the proxy passed on no such request")


def send_all(port: int, segments: Sequence[bytes], wanted: int) -> bytes:
    """Everything that comes back until `wanted` answers are there, the other end closes, or it falls silent."""
    received = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BrokenPipeError, ConnectionResetError):
            for segment in segments:
                connection.sendall(segment)
        while received.count(b"HTTP/1.1 ") < wanted and (part := connection.recv(65536)):
            received += part
    return received


@dataclass
class Duel:
    """One proxy before one backend, and what was found."""

    name: str
    port: int
    backend: Backend
    rng: random.Random
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def run(self, requests: int, until: float) -> None:
        while self.sent < requests and time.monotonic() < until:
            hostile = self.rng.random() < 0.5
            make = hostile_request if hostile else good_request
            batch = [make(self.sent + offset, self.rng) for offset in range(self.rng.choice((1, 1, 2, 4)))]
            self.ask(batch)
            self.ask([good_request(self.sent, self.rng)])  # somebody else

    def ask(self, batch: Sequence[Request]) -> None:
        self.sent += len(batch)
        data = b"".join(request.data for request in batch)
        before = len(self.backend.wrong)
        received = send_all(self.port, random_cuts(data, self.rng, 4), len(batch))
        faults = self.backend.wrong[before:] + list(self.faults(batch, received))
        self.wrong += [f"{self.name}: {fault}; sent {data!r}" for fault in faults]

    def faults(self, batch: Sequence[Request], received: bytes) -> Iterator[str]:
        try:
            answers = read_answers(received)
        except (HTTPException, ValueError):  # broken off by a proxy that refused what followed, or of a HEAD
            answers = []
        self.statuses.update(answer.status for answer in answers)
        if any(answer.status == 500 for answer in answers):
            yield "a server failed"
        yield from (fault for answer in answers for fault in unequal_ids(answer))
        if all(request.good for request in batch):
            yield from wrong_answers(batch, answers)


def unequal_ids(answer: Answer) -> Iterator[str]:
    seen, passed_on = answer.headers.get("x-seen-id"), answer.headers.get("x-proxy-id")
    if seen is not None and seen != passed_on:
        yield f"the proxy gave the answer to {seen} as that to {passed_on}"


def wrong_answers(batch: Sequence[Request], answers: Sequence[Answer]) -> Iterator[str]:
    if len(answers) != len(batch):
        yield f"{len(batch)} good requests have {len(answers)} answers"
    for request, answer in zip(batch, answers, strict=False):
        expected = {"path": f"/{request.number}", "digest": hashlib.sha256(request.body).hexdigest()}
        if answer.status != 200 or answer.json() != expected:
            yield f"request {request.number} was answered with {answer.status} {answer.body!r}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def service_port(app: Any) -> Iterator[int]:
    """A server of the service around `app`, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = create_server(cast("Any", app), Settings(), listener)

    def serve() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


@contextmanager
def proxy_before(service: int, name: str) -> Iterator[int]:
    """The proxy of that name in PROXIES before a port of this machine. Gives its port."""
    program, extra = PROXIES[name]
    port = free_port()
    template = NGINX if program == "nginx" else HAPROXY
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proxy.cfg"
        path.write_text(template.format(port=port, service=service, extra=extra))
        path.chmod(0o644)
        Path(folder).chmod(0o777)  # nginx's worker is another user where its master is root
        binary = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") or program
        options = ["-p", folder, "-c", str(path)] if program == "nginx" else ["-db", "-q", "-f", str(path)]
        with subprocess.Popen([binary, *options], stderr=subprocess.DEVNULL) as process:
            try:
                wait_for(lambda: listens(port))
                yield port
            finally:
                process.terminate()


def installed(name: str) -> bool:
    return shutil.which(PROXIES[name][0], path=f"{os.environ['PATH']}:/usr/sbin") is not None


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    late = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > late:
            raise TimeoutError("a server did not start")
        time.sleep(0.01)


def run_duel(name: str, requests: int, seed: int, limit_s: float) -> Duel:
    """Sends that many requests through one proxy; fewer if time is up."""
    backend = Backend()
    with service_port(backend) as service, proxy_before(service, name) as port:
        duel = Duel(name, port, backend, random.Random(f"{seed} {name}"))
        duel.run(requests, time.monotonic() + limit_s)
    return duel


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares how a proxy and this service read the same requests.")
    parser.add_argument("--requests", type=int, default=2000, help="in total, shared by the proxies")
    parser.add_argument("--proxies", nargs="+", choices=PROXIES, default=list(PROXIES), help="one after another")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="for each proxy")
    options = parser.parse_args(arguments)
    missing = [name for name in options.proxies if not installed(name)]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    share = -(-options.requests // len(options.proxies))
    duels = [run_duel(name, share, options.seed, options.limit_s) for name in options.proxies]
    for duel in duels:
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(duel.statuses.items()))
        print(f"{duel.name}: {duel.sent} requests, {duel.backend.read} reached the service; answers {statuses}")
        for fault in duel.wrong[:20]:
            print(f"  {fault}")
    wrong = sum(len(duel.wrong) for duel in duels)
    print(f"{sum(duel.sent for duel in duels)} requests, seed {options.seed}: {wrong} desynchronised")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
