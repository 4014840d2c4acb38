"""Files of the package that are served as they are, each with a content security policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from service.errors import NotFound

KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
NOTHING: Final = "default-src 'none'; base-uri 'none'; form-action 'none'"


def read_folder(folder: Path, policies: Mapping[str, str]) -> dict[str, Response]:
    """Every file of a kind above as its answer, by name. policies: content security policies of pages, by name."""
    return {path.name: answer(path, policies) for path in sorted(folder.iterdir()) if path.suffix in KINDS}


def answer(path: Path, policies: Mapping[str, str]) -> Response:
    policy = policies.get(path.name, f"{NOTHING}; frame-ancestors 'none'")
    headers = {"content-type": KINDS[path.suffix], "content-security-policy": policy, **HEADERS}
    return Response(path.read_bytes(), headers=headers)


def find(files: Mapping[str, Response], request: Request) -> Response:
    """The file that the path names. Raises NotFound."""
    content = files.get(request.path_params["name"])
    if content is None:
        raise NotFound
    return content
