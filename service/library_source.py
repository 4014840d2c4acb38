"""Libraries from elsewhere: fetched into STATE_DIR, pinned by digest, verified whole before they are opened.

A location is `https://HOST/PATH#sha256=DIGEST`, `s3://` and `hf://` by fsspec, or `oci://` for a registry. What lies
there is a library's folder as it is: manifest.json and the tickets that it names. DIGEST is the library's, as
`tombola check` prints it.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from model_store import manifest as manifests
from model_store.errors import LibraryRejected
from model_store.files import sync_folder
from model_store.library import MANIFEST, Library, open_library
from model_store.ticket import MAX_FILE_BYTES
from service.oci_registry import Artifact, parse_reference
from service.outbound import http_client, read_at_most
from service.settings import Settings, ensure_state_dir

log = logging.getLogger(__name__)

WEB: Final = ("http", "https")
REGISTRY: Final = "oci"
STORES: Final = {"s3": "s3fs", "hf": "huggingface_hub"}
"""Schemes of fsspec and the package that each needs."""
PIN: Final = re.compile(r"sha256=([0-9a-f]{64})")
TIMEOUT_S: Final = 60.0  # of each wait for bytes
CHUNK: Final = 1 << 20
FOLDER: Final = "libraries"
KEPT: Final = 2  # fetched libraries that stay beside those in use: the way back from a bad one needs no network
ABANDONED_S: Final = 86_400.0  # age from which a half-fetched library belongs to no process
Step = Callable[[str], None]


@dataclass(frozen=True)
class Location:
    """Where a library is. url: without the digest. digest: None where any library will do."""

    url: str
    digest: str | None

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme


def parse_location(text: str, *, pinned: bool = True) -> Location:
    """Raises LibraryRejected: an unknown scheme, a secret in it, or no digest where one is needed."""
    url, _, fragment = text.partition("#")
    parts = urlsplit(url)
    if parts.scheme not in (*WEB, *STORES, REGISTRY):
        raise LibraryRejected(f"{parts.scheme}://: expected a folder, or {', '.join((*WEB, *STORES, REGISTRY))}")
    if parts.username or parts.password or parts.query:
        raise LibraryRejected(f"{parts.scheme}://{parts.hostname}: no credentials and no query in a library's location")
    pin = PIN.fullmatch(fragment)
    if pin is None and (pinned or fragment):
        raise LibraryRejected(f"{url}: expected #sha256= and the library's digest after it, 64 hex digits")
    if parts.scheme == REGISTRY:
        parse_reference(url)
    return Location(url.rstrip("/"), pin[1] if pin else None)


def local_library(settings: Settings, on_step: Step = lambda _: None) -> Path | None:
    """The folder of the settings' library, fetched first if it is elsewhere; None for the embedded one.

    Raises LibraryRejected.
    """
    if not isinstance(settings.library, str):
        return settings.library
    location = parse_location(settings.library)
    folder = ensure_state_dir(settings) / FOLDER / str(location.digest)
    if not folder.is_dir():
        on_step(f"fetching the library from {location.url}")
        fetch(location, folder)
    with suppress(OSError):
        os.utime(folder)  # its last use, for remove_unused
    return folder


def remove_unused(settings: Settings, in_use: Collection[Path]) -> list[Path]:
    """Removes fetched libraries but those in use and the KEPT that were used last, and halves that were left behind.

    Each is renamed first: whoever opens it meanwhile finds the whole library or none.
    """
    root = settings.state_dir / FOLDER
    kept = {path.absolute() for path in in_use}
    removed = []
    try:
        ages = {path: path.stat().st_mtime for path in root.iterdir() if path.is_dir() and not path.is_symlink()}
        whole = [path for path in ages if re.fullmatch("[0-9a-f]{64}", path.name) and path.absolute() not in kept]
        old = sorted(whole, key=lambda path: ages[path])[: max(0, len(whole) - KEPT)]
        for path in old:
            part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
            path.rename(part)
            shutil.rmtree(part, ignore_errors=True)
            removed.append(path)
        for path, changed in ages.items():
            if path.name.startswith(".") and path.suffix == ".part" and time.time() - changed > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
    except FileNotFoundError:  # nothing was ever fetched, or another process removes the same
        return removed
    except OSError as error:
        log.warning("%s: old libraries stay: %s", root, error)
    return removed


def fetch(location: Location, folder: Path) -> Library:
    """Fetches a library into a folder that is not there yet: whole and verified, or not at all.

    Raises LibraryRejected: unreachable, damaged, or of another digest.
    """
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    try:
        (part / "tickets").mkdir(parents=True)
        with reader(location) as read:
            data = read(MANIFEST, manifests.MAX_MANIFEST_BYTES)
            manifest = parse_manifest(location, data)
            (part / MANIFEST).write_bytes(data)
            for entry in manifest.entries:
                ticket = read(entry.file, MAX_FILE_BYTES)
                if hashlib.sha256(ticket).hexdigest() != entry.sha256:
                    raise LibraryRejected(f"{location.url}/{entry.file}: other bytes than the manifest says")
                (part / entry.file).write_bytes(ticket)
        open_library(part)
        install(part, folder)
    except OSError as error:
        raise LibraryRejected(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return open_library(folder)


def parse_manifest(location: Location, data: bytes) -> manifests.Manifest:
    try:
        manifest = manifests.parse(data)
    except LibraryRejected as error:
        raise LibraryRejected(f"{location.url}/{MANIFEST}: {error}") from None
    if location.digest not in (None, manifest.digest):
        raise LibraryRejected(f"{location.url}: digest {manifest.digest}; expected {location.digest}")
    return manifest


def install(part: Path, folder: Path) -> None:
    """Gives the folder its name. Of two processes that fetch the same library, either may win."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


Read = Callable[[str, int], bytes]
"""(file in the library's folder, most bytes) -> its bytes. Raises LibraryRejected."""


@contextmanager
def reader(location: Location) -> Iterator[Read]:
    if location.scheme == REGISTRY:
        with Artifact(location.url) as artifact:
            yield artifact.read
        return
    if location.scheme not in WEB:
        store = open_store(location)
        yield lambda name, most: read_store(store, f"{location.url}/{name}", most)
        return
    with http_client(timeout_s=TIMEOUT_S) as client:
        yield lambda name, most: read_web(client, f"{location.url}/{name}", most)


def read_web(client: Any, url: str, most: int) -> bytes:
    import httpx

    try:
        with client.stream("GET", url) as response:
            if response.is_redirect:
                raise LibraryRejected(f"{url}: leads to {response.headers.get('location')}; name that instead")
            if response.status_code != 200:
                raise LibraryRejected(f"{url}: status {response.status_code}")
            data = read_at_most(response, most)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LibraryRejected(f"{url}: {type(error).__name__}: {error}") from None
    if data is None:
        raise LibraryRejected(f"{url}: more than {most} bytes, which is the limit")
    return data


def open_store(location: Location) -> Any:
    """A file system of fsspec. Credentials are those of its own variables, such as AWS_ACCESS_KEY_ID.

    Neither a proxy of the environment nor a cloud's metadata service is asked, unless its variable says so.
    """
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    try:
        import fsspec

        options: dict[str, Any] = {"config_kwargs": {"proxies": {}}} if location.scheme == "s3" else {}
        if location.scheme == "hf":
            import huggingface_hub

            # Its own would take a proxy from the environment, and wait for ever. The Hub leads to its stores.
            huggingface_hub.set_client_factory(lambda: http_client(timeout_s=TIMEOUT_S, follow_redirects=True))
        return fsspec.filesystem(location.scheme, skip_instance_cache=True, **options)
    except ImportError:
        package = STORES[location.scheme]
        raise LibraryRejected(f"{location.url}: needs {package}; `pip install tombola[{location.scheme}]`") from None


def read_store(store: Any, url: str, most: int) -> bytes:
    try:
        with store.open(url, "rb") as file:
            data: bytes = file.read(most + 1)
    except Exception as error:  # noqa: BLE001 -- each file system has errors of its own
        raise LibraryRejected(f"{url}: {one_line(error)}") from None
    if len(data) > most:
        raise LibraryRejected(f"{url}: more than {most} bytes, which is the limit")
    return data


def one_line(error: Exception) -> str:
    """Its kind and the beginning of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def push(library: Library, location: Location) -> str:
    """Puts a library where a store is; the manifest last, so that readers see the old library or the new one.

    Returns:
      The location with its digest, for TOMBOLA_LIBRARY.

    Raises:
      LibraryRejected: a place that cannot be written to.
    """
    if location.scheme in WEB:
        writable = ", ".join((*STORES, REGISTRY))
        raise LibraryRejected(f"{location.url}: only {writable} can be written to; copy the folder instead")
    names = [*(entry.file for entry in library.manifest.entries), MANIFEST]
    if location.scheme == REGISTRY:
        with Artifact(location.url) as artifact:
            artifact.write({name: (library.path / name).read_bytes() for name in names})
        return f"{location.url}#sha256={library.digest}"
    store = open_store(location)
    try:
        for name in names:
            store.pipe_file(f"{location.url}/{name}", (library.path / name).read_bytes())
    except Exception as error:  # noqa: BLE001 -- each file system has errors of its own
        raise LibraryRejected(f"{location.url}: {one_line(error)}") from None
    return f"{location.url}#sha256={library.digest}"
