"""REFERENCE.md, from the code: every setting, every metric, every route."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from fastapi import FastAPI

from service.lifecycle import create_service
from service.observability.metrics import PREFIX, TABLE
from service.settings import Settings, setting_docs
from service.web.server import Server

HEAD = """\
# Reference

Made from the code by `python -m tools.reference > docs/REFERENCE.md`; a test holds it to that.

## Settings

A flag of `tombola serve` wins over its variable, a variable over `tombola.toml` (keys such as `max_batch_size`), and
the file over the default. `tombola serve --help` prints the same table. `TOMBOLA_CONFIG` or `--config` names another
file. The commands that make libraries read `TOMBOLA_CACHE` (decoded data sets) and `TOMBOLA_CHECKPOINT_SECONDS`.
"""


def page() -> str:
    """The whole page in Markdown."""
    settings = [(f"`{row.variable}`", f"`{row.flag}`", row.unit, row.default, row.meaning) for row in setting_docs()]
    metrics = [
        (f"`{PREFIX}{row.name}`", row.kind, ", ".join(f"`{name}`" for name, _ in row.labels), row.meaning)
        for row in TABLE
    ]
    parts = [
        HEAD,
        table(("variable", "flag", "unit", "default", "meaning"), settings),
        "\n## Metrics\n\n`GET /metrics` of the admin plane, beside `process_*`.\n",
        table(("name", "type", "labels", "meaning"), metrics),
    ]
    for title, app in apps():
        parts += [f"\n## {title}\n", table(("method", "path", "what"), sorted(routes(app), key=lambda row: row[1]))]
    return "\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def apps() -> Iterator[tuple[str, FastAPI]]:
    """Both planes as they are served."""
    with tempfile.TemporaryDirectory() as folder:
        service = create_service(Settings(state_dir=Path(folder), port=0, admin_port=0))
        for title, plane in zip(("Public plane", "Admin plane"), service.planes, strict=True):
            assert isinstance(plane, Server)
            for socket in (plane.listener, plane.dup_listener):
                socket.close()
            yield title, cast("FastAPI", plane.config.app)


def routes(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    for path, methods in app.openapi()["paths"].items():
        for method, about in methods.items():
            meaning = about.get("description", about.get("summary", ""))
            yield method.upper(), f"`{path}`", meaning.split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    print(page())
