"""The messages are made when the module is imported."""

from typing import Any

def __getattr__(name: str) -> Any: ...
