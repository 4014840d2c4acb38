"""Libraries as artifacts in an OCI registry: Debian's docker-registry on this machine, and what it must not be."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from model_store.errors import LibraryRejected
from model_store.library import MANIFEST, Library
from service.library_source import fetch, local_library, parse_location, push
from service.oci_registry import Artifact, parse_reference
from service.outbound import http_client
from service.settings import Settings
from tests.deploy.test_prometheus import free_port
from tests.support.http_server import running
from tests.support.serving import tiny_library
from tests.support.side_effects import listening
from tests.support.waiting import until
from tombola.cli import main

needs_registry = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="docker-registry is not installed (Debian: docker-registry)"
)
PASSWORD: Final = "of-a-test"
BCRYPT: Final = "$2b$04$4LWEjDbUhoAImT1yGfTBT.jt4a8n7H/spfKkzT5MAgPNoteBnewA2"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return tiny_library(tmp_path / "library")


@contextmanager
def registry(folder: Path, **auth: Any) -> Iterator[str]:
    """host:port of a registry that keeps its blobs in a folder."""
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    config = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}}
    config |= {"http": {"addr": address}, "log": {"level": "error"}, **auth}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers(address))
            yield address
        finally:
            process.kill()


def answers(address: str) -> bool:
    import httpx

    with http_client(timeout_s=5) as client:
        try:
            return bool(client.get(f"http://{address}/v2/").status_code in (200, 401))
        except httpx.HTTPError:
            return False


@needs_registry
def test_a_library_is_pushed_pulled_and_served_by_tag_and_by_digest(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry(tmp_path / "registry") as host, listening() as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        assert main(["library", "push", str(library.path), f"oci://{host}/models/robust:1"]) == 0
        location = capsys.readouterr().out.strip()
        assert location == f"oci://{host}/models/robust:1#sha256={library.digest}"
        assert push(library, parse_location(location)) == location  # what is there is not uploaded again
        folder = local_library(Settings(library=location, state_dir=tmp_path / "state"))
        assert folder == tmp_path / "state" / "libraries" / library.digest
        with http_client(timeout_s=5) as client:
            shown = client.get(
                f"http://{host}/v2/models/robust/manifests/1",
                headers={"accept": "application/vnd.oci.image.manifest.v1+json"},
            )
        titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in shown.json()["layers"]]
        assert sorted(titles) == sorted([MANIFEST, *(entry.file for entry in library.manifest.entries)])
        pinned = f"oci://{host}/models/robust@{shown.headers['docker-content-digest']}"
        assert main(["library", "pull", pinned, str(tmp_path / "copy")]) == 0
        assert main(["library", "diff", pinned, str(tmp_path / "copy")]) == 0
        assert capsys.readouterr().out.endswith(": 0 differences\n")
        assert proxy.heard == []
        other = tiny_library(tmp_path / "other", structures=("resnet18",))
        push(other, parse_location(location))
        with pytest.raises(LibraryRejected, match=f"digest {other.digest}; expected {library.digest}"):
            fetch(parse_location(location), tmp_path / "refused")


@needs_registry
def test_a_registry_with_a_password_is_given_that_of_the_environment(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users").write_text(f"me:{BCRYPT}\n")
    auth = {"auth": {"htpasswd": {"realm": "models", "path": str(tmp_path / "users")}}}
    with registry(tmp_path / "registry", **auth) as host:
        location = parse_location(f"oci://{host}/robust", pinned=False)
        with pytest.raises(LibraryRejected, match="status 401, Basic authentication; set OCI_USERNAME"):
            push(library, location)
        monkeypatch.setenv("OCI_USERNAME", "me")
        monkeypatch.setenv("OCI_PASSWORD", PASSWORD)
        push(library, location)
        assert fetch(location, tmp_path / "copy").digest == library.digest


@contextmanager
def wrong_registry(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A registry that answers each path below /v2/a/ as it is told, and everything else with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, data = answers.get(self.path.removeprefix("/v2/a/"), (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815 -- http.server's names
        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with running(server):
        yield f"127.0.0.1:{server.server_port}"


def manifest(digest: str, size: int, name: str = MANIFEST) -> tuple[int, dict[str, str], bytes]:
    layer = {"digest": digest, "size": size, "annotations": {"org.opencontainers.image.title": name}}
    return 200, {}, json.dumps({"layers": [layer]}).encode()


GOOD: Final = hashlib.sha256(b"data").hexdigest()


@pytest.mark.parametrize(
    ("answers", "version", "message"),
    [
        ({}, "latest", "status 404"),
        ({"manifests/latest": (200, {}, b"[]")}, "latest", "expected an OCI image manifest"),
        ({"manifests/latest": (200, {}, b'{"layers": [1]}')}, "latest", "expected an OCI image manifest"),
        ({"manifests/latest": (302, {"location": "http://192.0.2.1/x"}, b"")}, "latest", "leads to http://192.0.2.1/x"),
        ({"manifests/latest": manifest("sha256:12", 4)}, "latest", "expected sha256: and 64 hex digits"),
        ({"manifests/latest": manifest(f"sha256:{GOOD}", 4, "other")}, "latest", f"has no file {MANIFEST}"),
        ({"manifests/latest": manifest(f"sha256:{GOOD}", 2000)}, "latest", "2000 bytes; at most 1000 are read"),
        ({f"manifests/sha256:{GOOD}": manifest(f"sha256:{GOOD}", 4)}, f"sha256:{GOOD}", "other bytes, sha256:"),
        (
            {"manifests/latest": manifest(f"sha256:{GOOD}", 4), f"blobs/sha256:{GOOD}": (200, {}, b"DATA")},
            "latest",
            "other bytes, sha256:",
        ),
        (
            {"manifests/latest": manifest(f"sha256:{GOOD}", 4), f"blobs/sha256:{GOOD}": (200, {}, b"data and more")},
            "latest",
            "more than the 4 bytes",
        ),
    ],
)
def test_what_is_not_the_artifact_that_was_named_is_refused(answers: Any, version: str, message: str) -> None:
    mark = "@" if version.startswith("sha256:") else ":"
    with wrong_registry(answers) as host, Artifact(f"oci://{host}/a{mark}{version}") as artifact:
        with pytest.raises(LibraryRejected, match=message) as refused:
            artifact.read(MANIFEST, 1000)
        assert str(refused.value).startswith(f"http://{host}/v2/a/")


def test_a_registry_cannot_send_an_upload_to_somebody_else() -> None:
    answers = {"blobs/uploads/": (202, {"location": "http://192.0.2.1/upload"}, b"")}
    message = r"uploads to http://192\.0\.2\.1/upload; only the registry itself"
    with (
        wrong_registry(answers) as host,
        Artifact(f"oci://{host}/a") as artifact,
        pytest.raises(LibraryRejected, match=message),
    ):
        artifact.write({MANIFEST: b"{}"})


@pytest.mark.parametrize(
    ("url", "registry", "name", "version"),
    [
        ("oci://models.example/robust", "https://models.example", "robust", "latest"),
        ("oci://models.example:5000/a/b-c:v1.0", "https://models.example:5000", "a/b-c", "v1.0"),
        (f"oci://localhost:5000/a@sha256:{GOOD}", "http://localhost:5000", "a", f"sha256:{GOOD}"),
    ],
)
def test_a_reference_has_a_registry_a_repository_and_a_version(
    url: str, registry: str, name: str, version: str
) -> None:
    reference = parse_reference(url)
    assert (reference.registry, reference.name, reference.version) == (registry, name, version)


@pytest.mark.parametrize("url", ["oci://host", "oci:///a", "oci://host/A", "oci://host/a:", "oci://host/a@sha256:12"])
def test_a_reference_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(LibraryRejected, match=r"expected oci://HOST/NAME:TAG or oci://HOST/NAME@sha256:DIGEST"):
        parse_location(url, pinned=False)
