"""Libraries in OCI registries: an artifact with one layer for each file, as `oras push` would lay it out.

A location is `oci://HOST[:PORT]/NAME[:TAG]` or `...@sha256:DIGEST`. The registry is asked over https, on loopback over
http. Every blob is held against its digest. Nobody but the registry is called: its redirects are refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from model_store.errors import LibraryRejected
from service.outbound import http_client

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.tombola.library.v1"
FILE_TYPE: Final = "application/vnd.tombola.library.file.v1"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
EMPTY: Final = b"{}"  # the artifact's config, which says nothing
TITLE: Final = "org.opencontainers.image.title"  # a layer's path, by the specification's annotation
MAX_MANIFEST_BYTES: Final = 4 << 20  # what registries themselves accept
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
    return Reference(f"{scheme}://{parts.netloc}", match["name"], match["digest"] or match["tag"] or "latest")


class Artifact:
    """A library in a registry. Use it in a `with`; every method raises LibraryRejected, which names the URL."""

    def __init__(self, url: str) -> None:
        self.reference = parse_reference(url)
        user, password = (os.environ.get(f"OCI_{name}") for name in ("USERNAME", "PASSWORD"))
        self.client = http_client(timeout_s=TIMEOUT_S, auth=(user, password) if user and password else None)
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
        import httpx

        data = bytearray()
        try:
            with self.client.stream("GET", url, headers={"accept": accept, "accept-encoding": "identity"}) as response:
                check_status(response, url, 200)
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > most:
                        raise LibraryRejected(f"{url}: more than the {most} bytes that are read")
        except httpx.HTTPError as error:
            raise LibraryRejected(f"{url}: {type(error).__name__}: {error}") from None
        return bytes(data)

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
        if self.ask("HEAD", self.reference.url(f"blobs/{digest}"), 200, 404).status_code == 404:
            begun = self.reference.url("blobs/uploads/")
            place = urljoin(begun, self.ask("POST", begun, 202).headers.get("location", ""))
            if urlsplit(place)[:2] != urlsplit(begun)[:2]:
                raise LibraryRejected(f"{begun}: uploads to {place}; only the registry itself is called")
            form = {"content-type": "application/octet-stream"}
            place += ("&" if urlsplit(place).query else "?") + f"digest={digest}"
            self.ask("PUT", place, 201, content=data, headers=form)
        return {"digest": digest, "size": len(data)}

    def ask(self, method: str, url: str, *expected: int, **options: Any) -> Any:
        import httpx

        try:
            response = self.client.request(method, url, **options)
        except httpx.HTTPError as error:
            raise LibraryRejected(f"{url}: {type(error).__name__}: {error}") from None
        check_status(response, url, *expected)
        return response


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(url: str, data: bytes, expected: str) -> None:
    if digest_of(data) != expected:
        raise LibraryRejected(f"{url}: other bytes, {digest_of(data)}; expected {expected}")


def check_status(response: Any, url: str, *expected: int) -> None:
    if response.status_code in expected:
        return
    if response.is_redirect:
        raise LibraryRejected(f"{url}: leads to {response.headers.get('location', '')[:200]}; redirects are refused")
    if response.status_code == 401:
        scheme = response.headers.get("www-authenticate", "").split(" ")[0]
        raise LibraryRejected(f"{url}: status 401, {scheme or 'no'} authentication; set OCI_USERNAME and OCI_PASSWORD")
    raise LibraryRejected(f"{url}: status {response.status_code}; expected {expected[0]}")
