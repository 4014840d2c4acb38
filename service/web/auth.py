"""Who may ask: API keys on the public plane (optional), one bearer token on the admin plane."""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import BadRequest, ErrorMessage, RateLimited, Unauthorized
from service.observability.metrics import Metrics
from service.settings import SettingsRejected
from service.web.body import unique_headers

log = logging.getLogger(__name__)

LINE: Final = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<digest>[0-9a-f]{64})")
CREDENTIAL_PARAMS: Final = frozenset(("access_token", "api_key", "api-key", "apikey", "authorization", "key", "token"))
FAILURES: Final = 10  # wrong credentials from one address at once, then one every PAUSE_S
PAUSE_S: Final = 6.0
ADDRESSES: Final = 1024  # remembered
# Of the admin plane. The console asks for the token itself; the OpenAPI document is the same on every server.
OPEN_PATHS: Final = ("/health/live", "/health/ready", "/", "/docs", "/openapi.json")
OPEN_FOLDERS: Final = ("/console/", "/docs/")
# For the OpenAPI documents.
KEY_SCHEMES: Final[Mapping[str, dict[str, Any]]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, where this server requires one."},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same key."},
}
KEY_SECURITY: Final[Sequence[dict[str, Any]]] = ({"bearer": []}, {"header": []})
ADMIN_SCHEMES: Final[Mapping[str, dict[str, Any]]] = {
    "adminToken": {"type": "http", "scheme": "bearer", "description": "The admin token."}
}
ADMIN_SECURITY: Final[Sequence[dict[str, Any]]] = ({"adminToken": []},)
ADMIN_REFUSES: Final = (Unauthorized, RateLimited)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def bearer(headers: Mapping[bytes, bytes]) -> str | None:
    scheme, _, secret = headers.get(b"authorization", b"").partition(b" ")
    return secret.strip().decode("latin-1") if scheme.lower() == b"bearer" and secret else None


def refuse_credentials_in_url(scope: Scope) -> None:
    """URLs end up in logs, histories and referrers. Raises BadRequest."""
    query = scope["query_string"]
    if query and any(
        name.lower() in CREDENTIAL_PARAMS for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    ):
        raise BadRequest(ErrorMessage.TOKEN_IN_URL)


def address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "unknown"


class ApiKeyStore:
    """The accepted API keys, as SHA-256; without a file, everybody is accepted. `reload` reads the file again."""

    def __init__(self, path: Path | None, metrics: Metrics) -> None:
        self.path = path
        self.metrics = metrics
        self.owners = {} if path is None else read_keys(path)

    def reload(self) -> None:
        """A file that cannot be read changes nothing: the old keys stay."""
        if self.path is None:
            return
        try:
            self.owners = read_keys(self.path)
        except SettingsRejected as error:
            log.error("API keys not reloaded, the old ones stay: %s", error)  # noqa: TRY400 -- says all there is

    def client(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Who asks: the owner of the key, or the address where no keys are used. Raises Unauthorised."""
        refuse_credentials_in_url(scope)
        if self.path is None:
            return address(scope)
        given = bearer(headers) or headers.get(b"x-api-key", b"").decode("latin-1")
        owner = self.owner(given)
        if owner is None:
            self.metrics.inc("auth_failures_total", plane="public")
            raise Unauthorized(ErrorMessage.KEY_REQUIRED)
        return f"key:{owner}"

    def owner(self, key: str) -> str | None:
        """In the same time whichever key it is, and whether it is one."""
        client = None
        given = digest(key)
        for known, name in self.owners.items():
            if hmac.compare_digest(given, known):
                client = name
        return client


def read_keys(path: Path) -> dict[str, str]:
    """Lines of `<name> <SHA-256 of the key in hex>`; empty lines and # comments are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsRejected(f"{path}: cannot be read as a file of API keys ({type(error).__name__})") from None
    owners: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        parts = LINE.fullmatch(text)
        if parts is None:
            raise SettingsRejected(f"{path}: line {number}: expected `<name> <SHA-256 of the key, 64 hex digits>`")
        owners[parts["digest"]] = parts["name"]
    return owners


class FailedLoginLimiter:
    """Failed attempts by address: FAILURES at once, then one every PAUSE_S; meanwhile even a right token waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.until: dict[str, float] = {}  # when each address is even again

    def check(self, address: str) -> None:
        """Raises RateLimited."""
        excess = self.until.get(address, 0.0) - self.clock() - (FAILURES - 1) * PAUSE_S
        if excess > 0:
            raise RateLimited(ErrorMessage.FAILURES, retry_after=int(excess) + 1)

    def note(self, address: str) -> None:
        now = self.clock()
        self.until[address] = max(now, self.until.pop(address, now)) + PAUSE_S
        if len(self.until) > ADDRESSES:
            del self.until[next(iter(self.until))]  # the one that has not failed for longest


class AdminAuthMiddleware:
    """Middleware of the admin plane: nothing passes without the token, but the health probes, the files of the console
    and of /docs, and /metrics where the settings say so."""

    def __init__(self, app: ASGIApp, *, token: str, metrics: Metrics, metrics_open: bool) -> None:
        self.app = app
        self.expected = digest(token)
        self.metrics = metrics
        self.open_paths = {*OPEN_PATHS, "/metrics"} if metrics_open else set(OPEN_PATHS)
        self.failures = FailedLoginLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refuse_credentials_in_url(scope)
            if scope["path"] not in self.open_paths and not scope["path"].startswith(OPEN_FOLDERS):
                self.check(scope)
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raises Unauthorised, RateLimited."""
        client = address(scope)
        self.failures.check(client)
        given = bearer(unique_headers(scope))
        if given is None or not hmac.compare_digest(digest(given), self.expected):
            self.failures.note(client)
            self.metrics.inc("auth_failures_total", plane="admin")
            raise Unauthorized(ErrorMessage.TOKEN_REQUIRED)
