"""Libraries in OCI registries: an artifact with one layer for each file, as `oras push` would lay it out.

A location is `oci://HOST[:PORT]/NAME[:TAG]` or `...@sha256:DIGEST`. The registry is asked over https, on loopback over
http. Every blob is held against its digest.

Whom the registry names is called, too: its token server, and stores that it redirects reads to. Only over https, and
never inside a network that is not public unless the registry is there itself. Stores get no credentials.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from model_store.errors import LibraryRejected
from service.outbound import http_client, in_public_network, read_at_most
from service.registry_auth import (
    FILE_VARIABLE,
    HUB,
    HUB_NAMES,
    Challenge,
    credentials_of,
    parse_challenges,
    parse_token,
    token_url,
)

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.tombola.library.v1"
FILE_TYPE: Final = "application/vnd.tombola.library.file.v1"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
EMPTY: Final = b"{}"  # the artifact's config, which says nothing
TITLE: Final = "org.opencontainers.image.title"  # a layer's path, by the specification's annotation
MAX_MANIFEST_BYTES: Final = 4 << 20  # what registries themselves accept
MAX_ANSWER_BYTES: Final = 1 << 20  # of what is no file: tokens, errors
MAX_REDIRECTS: Final = 5
REDIRECTS: Final = (301, 302, 303, 307, 308)
READING: Final = ("GET", "HEAD")
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
CREDENTIALS_HINT: Final = f"set OCI_USERNAME and OCI_PASSWORD, or {FILE_VARIABLE}"
TIMEOUT_S: Final = 60.0  # of each wait for bytes
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
REFERENCE: Final = re.compile(
    r"/(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?P<tag>\w[\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Reference:
    """A registry's address, a repository in it, and a tag or a digest."""

    registry: str
    name: str
    version: str

    def url(self, path: str) -> str:
        return f"{self.registry}/v2/{self.name}/{path}"


def parse_reference(url: str) -> Reference:
    """oci://host/robust/cifar:2026 -> its parts; a tag that is not named is `latest`. Raises LibraryRejected."""
    parts = urlsplit(url)
    match = REFERENCE.fullmatch(parts.path)
    if match is None or not parts.netloc:
        raise LibraryRejected(f"{url}: expected oci://HOST/NAME:TAG or oci://HOST/NAME@sha256:DIGEST")
    scheme = "http" if parts.hostname in LOOPBACK else "https"
    host = HUB if parts.netloc in HUB_NAMES else parts.netloc
    return Reference(f"{scheme}://{host}", match["name"], match["digest"] or match["tag"] or "latest")


@dataclass(frozen=True)
class Answer:
    """What the registry, or whom it redirected to, answered. url: who that was."""

    url: str
    status: int
    headers: Any  # httpx.Headers
    data: bytes


class Artifact:
    """A library in a registry. Use it in a `with`; every method raises LibraryRejected, which names the URL."""

    def __init__(self, url: str) -> None:
        self.reference = parse_reference(url)
        self.credentials = credentials_of(urlsplit(self.reference.registry).netloc)
        self.client = http_client(timeout_s=TIMEOUT_S)
        self.authorization: str | None = None  # once the registry has asked for one
        self.files: dict[str, tuple[str, int]] | None = None

    def __enter__(self) -> "Artifact":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    # Reading

    def read(self, name: str, most: int) -> bytes:
        """A file of the library, of at most so many bytes."""
        if self.files is None:
            self.files = self.read_files()
        if name not in self.files:
            raise LibraryRejected(f"{self.reference.url('manifests/' + self.reference.version)}: has no file {name}")
        digest, size = self.files[name]
        url = self.reference.url(f"blobs/{digest}")
        if size > most:
            raise LibraryRejected(f"{url}: {size} bytes; at most {most} are read")
        data = self.download(url, size)
        check_digest(url, data, digest)
        return data

    def read_files(self) -> dict[str, tuple[str, int]]:
        """Path -> digest and size, from the artifact's manifest."""
        url = self.reference.url(f"manifests/{self.reference.version}")
        data = self.download(url, MAX_MANIFEST_BYTES, accept=MANIFEST_TYPE)
        if self.reference.version.startswith("sha256:"):
            check_digest(url, data, self.reference.version)
        try:
            layers = json.loads(data)["layers"]
            files = {layer["annotations"][TITLE]: (str(layer["digest"]), int(layer["size"])) for layer in layers}
        except (ValueError, KeyError, TypeError, AttributeError):
            expected = f"expected an OCI image manifest whose layers have the annotation {TITLE}"
            raise LibraryRejected(f"{url}: {expected}") from None
        for name, (digest, _) in files.items():
            if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) is None:
                raise LibraryRejected(f"{url}: {name}: digest {digest[:80]!r}; expected sha256: and 64 hex digits")
        return files

    def download(self, url: str, most: int, accept: str = "*/*") -> bytes:
        return self.ask("GET", url, 200, most=most, headers={"accept": accept, "accept-encoding": "identity"}).data

    # Writing

    def write(self, files: Mapping[str, bytes]) -> str:
        """Uploads the files, then the manifest that names them; its digest."""
        layers = [
            {**self.upload(data), "mediaType": FILE_TYPE, "annotations": {TITLE: name}} for name, data in files.items()
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {**self.upload(EMPTY), "mediaType": EMPTY_TYPE},
            "layers": layers,
        }
        data = json.dumps(manifest, separators=(",", ":")).encode()
        url = self.reference.url(f"manifests/{self.reference.version}")
        self.ask("PUT", url, 201, content=data, headers={"content-type": MANIFEST_TYPE})
        return digest_of(data)

    def upload(self, data: bytes) -> dict[str, Any]:
        """A blob, unless the registry has it; its descriptor."""
        digest = digest_of(data)
        if self.ask("HEAD", self.reference.url(f"blobs/{digest}"), 200, 404).status == 404:
            begun = self.reference.url("blobs/uploads/")
            place = join(begun, self.ask("POST", begun, 202).headers.get("location", ""))
            if not self.is_registry(place):
                raise LibraryRejected(
                    f"{begun}: uploads to {without_query(place)}; only the registry itself is sent files"
                )
            form = {"content-type": "application/octet-stream"}
            place += ("&" if urlsplit(place).query else "?") + f"digest={digest}"
            self.ask("PUT", place, 201, content=data, headers=form)
        return {"digest": digest, "size": len(data)}

    # Both

    def ask(
        self,
        method: str,
        url: str,
        *expected: int,
        most: int = MAX_ANSWER_BYTES,
        headers: Mapping[str, str] = NOTHING,
        content: bytes | None = None,
    ) -> Answer:
        """Asks the registry, and once more with what it then asks for."""
        answer = self.follow(method, url, most, headers, content)
        if answer.status == 401 and self.is_registry(answer.url):
            self.authorization = self.authorize(answer, "pull" if method in READING else "pull,push")
            answer = self.follow(method, url, most, headers, content)
        if answer.status in expected:
            return answer
        if answer.status in (401, 403):
            raise LibraryRejected(f"{url}: status {answer.status} for {self.who}")
        raise LibraryRejected(f"{url}: status {answer.status}; expected {expected[0]}")

    def follow(self, method: str, url: str, most: int, headers: Mapping[str, str], content: bytes | None) -> Answer:
        """Reads where the registry leads. Somebody else is not told who asks."""
        place = url
        for _ in range(MAX_REDIRECTS + 1):
            secret = {"authorization": self.authorization} if self.authorization and self.is_registry(place) else {}
            answer = self.send(method, place, most, {**headers, **secret}, content)
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                return answer
            place = join(place, answer.headers["location"])
            if method not in READING:
                raise LibraryRejected(f"{url}: leads to {without_query(place)}; only reads are redirected")
            self.check_place(f"{url}: leads to", place)
        raise LibraryRejected(f"{url}: more than {MAX_REDIRECTS} redirects")

    def send(
        self, method: str, url: str, most: int, headers: Mapping[str, str], content: bytes | None = None
    ) -> Answer:
        import httpx

        shown = without_query(url)
        try:
            with self.client.stream(method, url, headers=headers, content=content) as response:
                limit = most if response.status_code == 200 else MAX_ANSWER_BYTES
                data = read_at_most(response, limit)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LibraryRejected(f"{shown}: {type(error).__name__}: {error}") from None
        if data is None:
            raise LibraryRejected(f"{shown}: more than the {limit} bytes that are read")
        return Answer(url, response.status_code, response.headers, data)

    def is_registry(self, url: str) -> bool:
        return urlsplit(url)[:2] == urlsplit(self.reference.registry)[:2]

    def check_place(self, role: str, url: str) -> None:
        """Whether the registry may lead there. role: what the place is said to be, and by which URL."""
        own, place = urlsplit(self.reference.registry), urlsplit(url)
        on_loopback = own.scheme == "http" and place.scheme == "http" and place.hostname in LOOPBACK
        if place.scheme != "https" and not on_loopback:
            raise LibraryRejected(f"{role} {without_query(url)}; expected https")
        if place.username or place.password or not place.hostname:
            raise LibraryRejected(f"{role} {place.hostname}; expected a host without credentials")
        if in_public_network(own.hostname or "") and not in_public_network(place.hostname):
            raise LibraryRejected(f"{role} {without_query(url)}; it has no public address, and the registry has")

    # Credentials

    def authorize(self, refused: Answer, actions: str) -> str:
        """The header that a 401 asks for."""
        challenges = parse_challenges(refused.headers.get_list("www-authenticate"))
        if "bearer" in challenges:
            return f"Bearer {self.fetch_token(refused.url, challenges['bearer'], actions)}"
        if "basic" in challenges and self.credentials is not None:
            return self.credentials.header
        scheme = "Basic" if "basic" in challenges else "unknown"
        raise LibraryRejected(f"{refused.url}: status 401, {scheme} authentication; {CREDENTIALS_HINT}")

    def fetch_token(self, refused: str, challenge: Challenge, actions: str) -> str:
        """From the server that the registry names. It is told the credentials: that is what they are for."""
        realm = join(refused, challenge.get("realm", ""))
        role = f"{refused}: its token server is"
        self.check_place(role, realm)
        url = token_url(realm, challenge, f"repository:{self.reference.name}:{actions}")
        headers = {"authorization": self.credentials.header} if self.credentials else NOTHING
        answer = self.send("GET", url, MAX_ANSWER_BYTES, headers)
        if answer.status != 200:
            raise LibraryRejected(f"{role} {without_query(realm)}: status {answer.status} for {self.who}")
        token = parse_token(answer.data)
        if token is None:
            raise LibraryRejected(f"{role} {without_query(realm)}; expected JSON with a token from it")
        return token

    @property
    def who(self) -> str:
        return self.credentials.user if self.credentials else f"no user; {CREDENTIALS_HINT}"


def join(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError:
        raise LibraryRejected(f"{without_query(base)}: leads to {url[:200]!r}; expected a URL") from None


def without_query(url: str) -> str:
    """For errors: what a store is asked for may be signed there."""
    return url.partition("?")[0][:300]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(url: str, data: bytes, expected: str) -> None:
    if digest_of(data) != expected:
        raise LibraryRejected(f"{url}: other bytes, {digest_of(data)}; expected {expected}")
