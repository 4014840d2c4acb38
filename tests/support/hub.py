"""A hub of models on this machine: the part of Hugging Face's API that fsspec uses to read and to commit files."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote

from tests.support.http_server import running

REPOSITORY: Final = "acme/robust"
API: Final = f"/api/models/{REPOSITORY}"
COMMIT: Final = "0123456789" * 4
UNKNOWN: Final = {"X-Error-Code": "RepoNotFound"}


class Hub(ThreadingHTTPServer):
    """files: of REPOSITORY, by path. tokens: what was sent as authorization, by request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def entries(self, names: list[str]) -> list[dict[str, Any]]:
        known = {name: self.files[name] for name in names if name in self.files}
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
            for name, data in known.items()
        ]

    def commit(self, lines: bytes) -> dict[str, Any]:
        for line in map(json.loads, lines.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.url}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server)

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.hub.tokens.append(self.headers.get("authorization"))
        path = unquote(self.path).split("?")[0]
        if re.fullmatch(rf"{API}(/revision/main)?", path):
            self.answer(200, {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        elif match := re.fullmatch(rf"{API}/tree/main/?(.*)", path):
            inside = [name for name in self.hub.files if name.rpartition("/")[0] == match[1]]
            self.answer(200, self.hub.entries(inside))
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/main/(.+)", path):
            self.send_part(self.hub.files[match[1]])
        else:
            self.answer(404, headers=UNKNOWN)

    def send_part(self, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if match is None:
            self.answer(200, data)
            return
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        self.answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def do_POST(self) -> None:
        self.hub.tokens.append(self.headers.get("authorization"))
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(self.path).split("?")[0]
        if path == f"{API}/paths-info/main":
            self.answer(200, self.hub.entries(parse_qs(body.decode())["paths"]))
        elif path == f"{API}/preupload/main":
            upload = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": each["path"], **upload} for each in json.loads(body)["files"]]})
        elif path == f"{API}/commit/main":
            self.answer(200, self.hub.commit(body))
        else:
            self.answer(404, headers=UNKNOWN)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    with running(server):
        yield server
