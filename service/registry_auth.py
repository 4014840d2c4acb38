"""Who may read a registry: its challenges, and the credentials that the user named for it.

The token server's protocol is https://distribution.github.io/distribution/spec/auth/token/.
"""

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode
from urllib.request import parse_http_list

from model_store.errors import LibraryRejected, os_error_text

FILE_VARIABLE: Final = "OCI_AUTH_FILE"
HUB: Final = "registry-1.docker.io"
HUB_NAMES: Final = ("docker.io", "index.docker.io")  # of Docker Hub, whose registry has another
HUB_KEY: Final = "https://index.docker.io/v1/"  # how files of credentials name it
SCHEME: Final = re.compile(r"(?:^|,)\s*(basic|bearer)\s+", re.IGNORECASE)
TOKEN: Final = re.compile(r"[\w.~+/=-]+", re.ASCII)
Challenge = Mapping[str, str]


@dataclass(frozen=True)
class Credentials:
    user: str
    password: str = field(repr=False)

    @property
    def header(self) -> str:
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}"


def credentials_of(host: str) -> Credentials | None:
    """OCI_USERNAME and OCI_PASSWORD, or host's entry in the file that OCI_AUTH_FILE names. Nothing else is read.

    host: with its port, if it has one.  Raises LibraryRejected: a file that cannot be used.
    """
    user, password = os.environ.get("OCI_USERNAME"), os.environ.get("OCI_PASSWORD")
    if user and password:
        return Credentials(user, password)
    path = os.environ.get(FILE_VARIABLE)
    return read_auth_file(Path(path), host) if path else None


def read_auth_file(path: Path, host: str) -> Credentials | None:
    """The entry of a registry in a file as `docker login` writes it, such as ~/.docker/config.json."""
    try:
        auths = json.loads(path.read_bytes()).get("auths", {})
        keys = (host, f"https://{host}", *((HUB_KEY, *HUB_NAMES) if host == HUB else ()))
        entries = [auths[key] for key in keys if key in auths]
        texts = [base64.b64decode(entry["auth"], validate=True).decode() for entry in entries if entry.get("auth")]
    except OSError as error:
        raise LibraryRejected(f"{FILE_VARIABLE}: {os_error_text(error)}") from None
    except (ValueError, AttributeError, TypeError):
        raise LibraryRejected(f"{FILE_VARIABLE} {path}: expected what `docker login` writes") from None
    if not texts:
        return None
    user, _, password = texts[0].partition(":")
    return Credentials(user, password)


def parse_challenges(values: Sequence[str]) -> dict[str, Challenge]:
    """Values of WWW-Authenticate -> parameters by scheme, in lower case; other schemes are left out."""
    challenges: dict[str, Challenge] = {}
    for value in values:
        _, *parts = SCHEME.split(value)
        for scheme, parameters in zip(parts[::2], parts[1::2], strict=True):
            named = (item.split("=", 1) for item in parse_http_list(parameters) if "=" in item)
            challenges.setdefault(scheme.lower(), {name.strip().lower(): text.strip('" ') for name, text in named})
    return challenges


def token_url(realm: str, challenge: Challenge, scope: str) -> str:
    """scope: where the challenge names none."""
    scopes = (challenge.get("scope") or scope).split(" ")
    query = [("service", challenge["service"])] if "service" in challenge else []
    return f"{realm}{'&' if '?' in realm else '?'}{urlencode([*query, *(('scope', each) for each in scopes)])}"


def parse_token(data: bytes) -> str | None:
    """A token server's answer; None for anything but a token."""
    try:
        answer: Any = json.loads(data)
        token = answer.get("token") or answer.get("access_token")
    except (ValueError, AttributeError):
        return None
    return token if isinstance(token, str) and TOKEN.fullmatch(token) else None
