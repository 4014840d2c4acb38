"""The published report, and changed copies of it whose digests hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.audit.report.model import Report, digest_of_report, read_report

PUBLISHED = Path("service/audit/results/report.json")
Change = Callable[..., Report]


@pytest.fixture(scope="session")
def published() -> Report:
    return read_report(PUBLISHED)


def changed(**parts: Any) -> Report:
    """The published report as if it had passed every check, with other fields. A dict is merged into what is there."""
    fields = json.loads(PUBLISHED.read_text("utf-8"))
    fields |= {"verdict": "valid", "failed": [], "warned": []}
    for row in fields["checks"]:
        row["outcome"] = "pass" if row["outcome"] in ("warn", "no power") else row["outcome"]
    for name, value in parts.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    fields["digest"] = digest_of_report(fields)
    return Report.model_validate(fields)


def with_robust(value: float, low: float, high: float, **parts: Any) -> Report:
    """As if robust accuracy had been measured so."""
    report = changed(**parts).as_json()
    report["systems"]["tombola"]["robust"]["expected"] = {"value": value, "low": low, "high": high}
    report["digest"] = digest_of_report(report)
    return Report.model_validate(report)
