"""The gate decides on the interval, and says what it needs to know more."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.audit.command import judge_report
from service.audit.errors import AuditError, AuditRejected
from service.audit.report.model import Interval, Report
from service.audit.report.requirements import Requirements, images_needed, judge, parse_age
from tests.service.audit.report.conftest import PUBLISHED, changed, with_robust


@pytest.mark.parametrize(
    ("low", "high", "outcome", "code"),
    [
        (0.25, 0.35, "met", 0),  # the lower bound is the floor itself
        (0.249, 0.40, "too few images", 5),  # the value alone would pass
        (0.10, 0.30, "too few images", 5),  # the value alone would fail
        (0.10, 0.249, "below", 3),
    ],
)
def test_the_floor_is_held_against_the_interval(low: float, high: float, outcome: str, code: int) -> None:
    report = with_robust((low + high) / 2, low, high)
    result = judge(report, Requirements(robust_lower=0.25))
    assert (result.outcome, result.exit_code) == (outcome, code)


def test_the_images_needed_narrow_the_interval_to_the_floor() -> None:
    """Hand-worked: 30 % less 8 points on 100 images; the floor is 4 points away, half as far: 400 images."""
    assert images_needed(Interval(value=0.30, low=0.22, high=0.38), 0.26, 100) == 400
    assert images_needed(Interval(value=0.30, low=0.22, high=0.38), 0.34, 100) == 400
    assert images_needed(Interval(value=0.30, low=0.22, high=0.38), 0.30, 100) is None
    n = images_needed(Interval(value=0.30, low=0.20, high=0.42), 0.27, 128)
    assert n is not None
    assert 0.30 - 0.10 * math.sqrt(128 / n) >= 0.27
    assert 0.30 - 0.10 * math.sqrt(128 / (n - 1)) < 0.27
    (finding,) = judge(with_robust(0.3, 0.22, 0.38, data={"images": 128}), Requirements(robust_lower=0.26)).findings[1:]
    assert finding.images_needed == 512
    assert "about 512 would decide it" in finding.measured


@pytest.mark.parametrize(
    "parts",
    [
        {"verdict": "invalid", "failed": [5]},
        {"verdict": "warnings", "warned": [5]},
        {"audit": {"profile": "smoke"}},
        {"data": {"name": "generated"}},
    ],
)
def test_what_is_no_measurement_never_passes(parts: dict[str, Any]) -> None:
    result = judge(with_robust(0.9, 0.8, 0.95, **parts), Requirements(robust_lower=0.1))
    assert result.exit_code == 4


def test_warnings_pass_where_they_are_allowed() -> None:
    report = with_robust(0.9, 0.8, 0.95, verdict="warnings", warned=[5])
    assert judge(report, Requirements(robust_lower=0.1, require="warnings")).exit_code == 0


@pytest.fixture(scope="module")
def passed() -> Report:
    """As if the published report had passed every check."""
    return changed()


def test_a_report_grows_old(passed: Report) -> None:
    ended = datetime.fromisoformat(passed.timings.finished_at)
    for days, code in ((29, 0), (31, 4), (-2, 4)):
        requirements = Requirements(max_age=parse_age("30d"))
        assert judge(passed, requirements, ended + timedelta(days=days)).exit_code == code, days
    unreadable = changed(timings={"finished": "last week"})
    assert judge(unreadable, Requirements(max_age=parse_age("30d")), datetime.now(UTC)).exit_code == 4


def shifted(passed: Report, points: float) -> Report:
    """Every image's chance moved by so many points: the paired difference has no width."""
    rows = passed.per_image["tombola"].robust
    moved = [min(1.0, max(0.0, p + points / 100)) for p in rows]
    per_image = {"tombola": {"clean": passed.per_image["tombola"].clean, "robust": moved}}
    return changed(per_image=per_image)


def test_a_drop_below_the_baseline_is_paired_on_the_same_images(passed: Report) -> None:
    assert judge(passed, Requirements(max_drop=2, against=passed)).exit_code == 0
    worse = shifted(passed, -30)
    (_, finding) = judge(worse, Requirements(max_drop=2, against=passed)).findings
    assert finding.outcome == "below"
    assert "points [" in finding.measured


def test_other_images_are_compared_with_both_errors(passed: Report) -> None:
    others = changed(data={"ids_digest": "0" * 64})
    result = judge(others, Requirements(max_drop=2, against=passed))
    assert result.exit_code == 5  # so few images tell no two points
    assert judge(others, Requirements(max_drop=30, against=passed)).exit_code == 0


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"audit": {"norm": "l2"}}, "norm linf there, l2 here"),
        ({"audit": {"headline": 4.0}}, "epsilon 8 there, 4 here"),
        ({"audit": {"profile": "full"}}, "profile standard there, full here"),
        ({"data": {"name": "others.zip"}}, "data set cifar10-jpeg.zip there, others.zip here"),
    ],
)
def test_other_threats_are_not_compared(passed: Report, parts: dict[str, Any], text: str) -> None:
    result = judge(changed(**parts), Requirements(max_drop=50, against=passed))
    assert result.exit_code == 4
    assert text in result.findings[1].measured


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"robust_lower": 25}, "25 % is 0.25"),
        ({"robust_lower": -0.1}, "from 0 to 1"),
        ({"robust_lower": math.nan}, "from 0 to 1"),
        ({"max_drop": 2}, "belong together"),
    ],
)
def test_requirements_that_mean_nothing_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(AuditRejected, match=text):
        Requirements(**fields)


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1.5d", "30 d", "30y", ""])
def test_an_age_has_a_unit(age: str) -> None:
    with pytest.raises(AuditRejected, match="such as 30d"):
        parse_age(age)


# The command


def test_the_command_prints_each_requirement_and_exits_with_the_gravest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(with_robust(0.285, 0.215, 0.361, timings={"finished": "2026-11-01T00:00:00+00:00"}).as_bytes())
    assert judge_report(path, robust_lower=0.2) == 0
    shown = capsys.readouterr().out
    assert "met" in shown
    assert "the lower bound of robust accuracy is at least 20.0 %" in shown
    assert judge_report(path, robust_lower=0.25) == 5
    assert judge_report(path, robust_lower=0.4) == 3
    assert judge_report(path, robust_lower=0.2, max_drop=2, against=path, require="valid") == 0
    assert judge_report(path, robust_lower=0.4, max_age="1h") == 4
    capsys.readouterr()
    assert judge_report(path, robust_lower=0.2, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "met"


def test_a_changed_report_passes_no_judge_report(tmp_path: Path) -> None:
    fields = json.loads(PUBLISHED.read_text("utf-8"))
    fields["systems"]["tombola"]["robust"]["expected"]["low"] = 0.9
    (tmp_path / "report.json").write_text(json.dumps(fields))
    with pytest.raises(AuditError, match="digest does not hold"):
        judge_report(tmp_path / "report.json", robust_lower=0.25)
