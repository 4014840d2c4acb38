"""Libraries as artifacts in an OCI registry: Debian's docker-registry on this machine, and what it must not be."""

import base64
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from model_store.errors import LibraryRejected
from model_store.library import MANIFEST, Library
from service.library_source import fetch, local_library, parse_location, push
from service.oci_registry import Artifact, parse_reference
from service.outbound import http_client
from service.registry_auth import Credentials, credentials_of, parse_challenges, parse_token
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
DAY: Final = timedelta(days=1)
PASSWORD: Final = "of-a-test"
BCRYPT: Final = "$2b$04$4LWEjDbUhoAImT1yGfTBT.jt4a8n7H/spfKkzT5MAgPNoteBnewA2"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return tiny_library(tmp_path / "library")


@contextmanager
def registry(folder: Path, **more: Any) -> Iterator[str]:
    """host:port of a registry that keeps its blobs in a folder."""
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    config = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}}
    config |= {"http": {"addr": address}, "log": {"level": "error"}, **more}
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


class TokenServer:
    """Gives tokens to `me`, and to nobody else; a registry trusts its key. It keeps what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder(name, name, self.key.public_key(), x509.random_serial_number(), now, now + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.bundle = folder / "tokens.pem"
        self.bundle.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        self.scopes: list[str] = []

    def config(self, realm: str) -> dict[str, Any]:
        token = {"realm": realm, "service": "models", "issuer": "tokens", "rootcertbundle": str(self.bundle)}
        return {"auth": {"token": token}}

    def answer(self, url: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        query = parse_qs(urlsplit(url).query)
        self.scopes += query["scope"]
        expected = f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"
        if headers.get("authorization") != expected or query["service"] != ["models"]:
            return 401, {}, b""
        access = [
            dict(zip(("type", "name", "actions"), [*scope.split(":")[:2], scope.split(":")[2].split(",")], strict=True))
            for scope in query["scope"]
        ]
        return 200, {}, json.dumps({"token": self.token(access)}).encode()

    def token(self, access: list[dict[str, Any]]) -> str:
        """A JSON web token (RFC 7519) in ES256, with its certificate."""
        now = int(time.time())
        chain = [base64.b64encode(self.certificate.public_bytes(Encoding.DER)).decode()]
        claims: dict[str, Any] = {"iss": "tokens", "aud": "models", "sub": "me", "jti": "1", "access": access}
        claims |= {"iat": now - 60, "nbf": now - 60, "exp": now + 300}
        parts = [unpadded(json.dumps(part).encode()) for part in ({"alg": "ES256", "typ": "JWT", "x5c": chain}, claims)]
        r, s = decode_dss_signature(self.key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256())))
        return ".".join([*parts, unpadded(r.to_bytes(32) + s.to_bytes(32))])


def unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@needs_registry
def test_a_registry_with_tokens_and_a_store_of_blobs_elsewhere(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Docker Hub and GHCR work: a token server gives tokens, and reads of blobs are sent to a store."""
    tokens, store = TokenServer(tmp_path), tmp_path / "registry" / "data"
    seen: list[Mapping[str, str]] = []

    def blob(url: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        seen.append(headers)
        return 200, {}, (store / url.lstrip("/")).read_bytes()

    with http_server(tokens.answer) as realm, http_server(blob) as blobs:
        leads = {"storage": [{"name": "redirect", "options": {"baseurl": f"http://{blobs}/"}}]}
        more = {"middleware": leads, **tokens.config(f"http://{realm}/token")}
        with registry(tmp_path / "registry", **more) as host:
            location = parse_location(f"oci://{host}/models/robust:1", pinned=False)
            with pytest.raises(
                LibraryRejected, match=rf"is http://{realm}/token: status 401 for no user; set OCI_USER"
            ):
                push(library, location)
            file = tmp_path / "config.json"
            monkeypatch.setenv("OCI_AUTH_FILE", str(file))
            file.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(b"me:wrong").decode()}}}))
            with pytest.raises(LibraryRejected, match="/token: status 401 for me"):
                push(library, location)
            file.write_text(
                json.dumps({"auths": {host: {"auth": base64.b64encode(f"me:{PASSWORD}".encode()).decode()}}})
            )
            push(library, location)
            assert tokens.scopes[-1] == "repository:models/robust:pull,push"
            assert fetch(location, tmp_path / "copy").digest == library.digest
            assert tokens.scopes[-1] == "repository:models/robust:pull"
    assert len(seen) >= len(library.manifest.entries) + 1
    assert all("authorization" not in headers for headers in seen)


@contextmanager
def http_server(answer: Callable[[str, Mapping[str, str]], tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """host:port of a server whose answers are a function of path and headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, data = answer(self.path, {name.lower(): value for name, value in self.headers.items()})
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


@contextmanager
def wrong_registry(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A registry that answers each path below /v2/a/ as it is told, and everything else with 404."""

    def answer(url: str, _: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        return answers.get(url.removeprefix("/v2/a/"), (404, {}, b"{}" * 100))

    with http_server(answer) as host:
        yield host


def manifest(digest: str, size: int, name: str = MANIFEST) -> tuple[int, dict[str, str], bytes]:
    layer = {"digest": digest, "size": size, "annotations": {"org.opencontainers.image.title": name}}
    return 200, {}, json.dumps({"layers": [layer]}).encode()


def leads_to(place: str) -> Any:
    return {"manifests/latest": (307, {"location": place}, b"")}


def asks_for(challenge: str) -> Any:
    return {"manifests/latest": (401, {"www-authenticate": challenge}, b"")}


GOOD: Final = hashlib.sha256(b"data").hexdigest()


@pytest.mark.parametrize(
    ("answers", "version", "message"),
    [
        ({}, "latest", "status 404"),
        ({"manifests/latest": (200, {}, b"[]")}, "latest", "expected an OCI image manifest"),
        ({"manifests/latest": (200, {}, b'{"layers": [1]}')}, "latest", "expected an OCI image manifest"),
        (leads_to("http://192.0.2.1/x?secret"), "latest", "leads to http://192.0.2.1/x; expected https"),
        (leads_to("https://me@192.0.2.1/x"), "latest", "leads to 192.0.2.1; expected a host without credentials"),
        (leads_to("http://[/x"), "latest", r"leads to 'http://\[/x'; expected a URL"),
        (leads_to("latest"), "latest", "more than 5 redirects"),
        (asks_for('Bearer realm="http://192.0.2.1/token"'), "latest", "token server is http://192.0.2.1/token; expect"),
        (asks_for("Bearer realm="), "latest", "status 404 for no user"),
        (asks_for("Negotiate"), "latest", "status 401, unknown authentication; set OCI_USERNAME and OCI_PASSWORD, or"),
        (asks_for('Basic realm="models"'), "latest", "status 401, Basic authentication; set OCI_USERNAME"),
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


def test_a_store_that_a_registry_leads_to_is_told_no_credentials_and_cannot_ask_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OCI_USERNAME", "me")
    monkeypatch.setenv("OCI_PASSWORD", PASSWORD)
    seen: list[Mapping[str, str]] = []

    def store(_: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        seen.append(headers)
        return 401, {"www-authenticate": 'Basic realm="a store of somebody else"'}, b""

    def registry(_: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        if "authorization" not in headers:
            return 401, {"www-authenticate": 'Basic realm="models"'}, b""
        return 307, {"location": f"http://{elsewhere}/blob?signature=secret"}, b""

    with (
        http_server(store) as elsewhere,
        http_server(registry) as host,
        Artifact(f"oci://{host}/a") as artifact,
        pytest.raises(LibraryRejected, match="status 401 for me") as refused,
    ):
        artifact.read(MANIFEST, 1000)
    assert len(seen) == 1
    assert "authorization" not in seen[0]
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("place", ["https://10.0.0.1/x", "https://169.254.169.254/token", "https://localhost/x"])
def test_a_public_registry_does_not_lead_into_a_private_network(place: str) -> None:
    with Artifact("oci://1.1.1.1/a") as artifact:
        artifact.check_place("leads to", "https://8.8.8.8/x")
        with pytest.raises(LibraryRejected, match="it has no public address, and the registry has"):
            artifact.check_place("leads to", place)
    with Artifact("oci://10.0.0.2/a") as artifact:
        artifact.check_place("leads to", place)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            ['Bearer realm="https://a/token",service="registry,a",scope="repository:a/b:pull,push"'],
            {"bearer": {"realm": "https://a/token", "service": "registry,a", "scope": "repository:a/b:pull,push"}},
        ),
        (["Basic realm=a, bearer Realm=b"], {"basic": {"realm": "a"}, "bearer": {"realm": "b"}}),
        (["Negotiate", "basic realm=a"], {"basic": {"realm": "a"}}),
        (["Bearer realm=,,x,=y"], {"bearer": {"realm": "", "": "y"}}),
        ([], {}),
    ],
)
def test_challenges_are_read_as_http_writes_them(values: list[str], expected: Any) -> None:
    assert parse_challenges(values) == expected


def test_credentials_are_read_from_the_file_that_is_named_and_from_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"auth": base64.b64encode(b"me:a:b").decode()}
    file = tmp_path / ".docker" / "config.json"
    file.parent.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    file.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": entry, "ghcr.io": entry}, "credsStore": "x"}))
    assert credentials_of("ghcr.io") is None
    monkeypatch.setenv("OCI_AUTH_FILE", str(file))
    assert credentials_of("ghcr.io") == Credentials("me", "a:b")
    assert parse_reference("oci://docker.io/me/robust").registry == "https://registry-1.docker.io"
    assert credentials_of("registry-1.docker.io") == Credentials("me", "a:b")
    assert credentials_of("models.example") is None
    assert "a:b" not in repr(credentials_of("ghcr.io"))


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"auths": {"h": {"auth": "%"}}}', '{"auths": {"h": 1}}'])
def test_a_file_of_credentials_that_is_none_is_refused_by_its_name(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCI_AUTH_FILE", str(tmp_path / "a.json"))
    with pytest.raises(LibraryRejected, match=r"OCI_AUTH_FILE: .*/a\.json: No such file"):
        Artifact("oci://h/a")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(LibraryRejected, match=r"OCI_AUTH_FILE .*/a\.json: expected what `docker login` writes"):
        Artifact("oci://h/a")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a\\nb"}'])
def test_an_answer_without_a_token_is_none(data: bytes) -> None:
    assert parse_token(data) is None
    assert parse_token(b'{"access_token": "a.b-c_d"}') == "a.b-c_d"


def test_a_registry_cannot_send_an_upload_to_somebody_else() -> None:
    answers = {"blobs/uploads/": (202, {"location": "http://192.0.2.1/upload"}, b"")}
    message = r"uploads to http://192\.0\.2\.1/upload; only the registry itself is sent files"
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
