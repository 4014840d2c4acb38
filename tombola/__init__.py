"""Tombola: image classification by a fresh random ensemble of adversarially robust lottery tickets.

The names are listed once, in __init__.pyi. Each is imported from its module when it is first used, so that
`import tombola` takes milliseconds.
"""

from functools import cache
from typing import Any


@cache
def modules() -> dict[str, str]:
    """Every exported name, and the module that it comes from."""
    import ast
    from pathlib import Path

    listed = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8")).body
    statements = [node for node in listed if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in statements for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(modules())
    if name in modules():
        from importlib import import_module

        return getattr(import_module(modules()[name]), name)
    raise AttributeError(f"module 'tombola' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(modules())
