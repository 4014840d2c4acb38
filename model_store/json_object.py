"""JSON from outside: what an object is in Python, its digest, and what is wrong with one in a line."""

import hashlib
import json
from typing import Any

from pydantic import ValidationError

Json = dict[str, Any]


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def first_error(error: ValidationError) -> str:
    """Where the first fault is, what is wrong, and what was found."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where or 'JSON'}: {fault['msg']}, found {fault['input']!r:.80}"
