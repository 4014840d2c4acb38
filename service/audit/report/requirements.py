"""The gate of a pipeline: whether a report meets requirements. It decides on intervals, never on the point."""

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.audit.errors import AuditRejected
from service.audit.report.model import Interval, Report
from service.audit.report.verdicts import headline, judge_measurement, percent, with_bounds
from service.audit.stats import paired_difference

Outcome = Literal["met", "below", "not a measurement", "too few images"]
EXIT_CODES: Final[dict[Outcome, int]] = {"met": 0, "below": 3, "not a measurement": 4, "too few images": 5}
PRECEDENCE: Final[tuple[Outcome, ...]] = ("not a measurement", "below", "too few images", "met")
UNITS: Final = {"h": "hours", "d": "days", "w": "weeks"}
MAX_USEFUL_IMAGES: Final = 1_000_000  # more are no advice


@dataclass(frozen=True)
class Requirements:
    """What a report has to meet. None: not required."""

    robust_lower: float | None = None  # the least lower bound of robust accuracy, a fraction
    max_drop: float | None = None  # the most points that robust accuracy may fall below the baseline's
    against: Report | None = None  # the baseline
    require: Literal["valid", "warnings"] = "valid"  # the least verdict of the measurement
    max_age: timedelta | None = None

    def __post_init__(self) -> None:
        if self.robust_lower is not None and not 0 <= self.robust_lower <= 1:
            raise AuditRejected(f"robust-lower {self.robust_lower:g}; expected a fraction from 0 to 1: 25 % is 0.25")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise AuditRejected(f"max-drop {self.max_drop:g}; expected points from 0 to 100")
        if (self.max_drop is None) != (self.against is None):
            raise AuditRejected("max-drop and against belong together: how many points, below which report")


class Finding(BaseModel):
    """One requirement and what became of it."""

    model_config = ConfigDict(frozen=True)

    requirement: str
    outcome: Outcome
    measured: str
    images_needed: int | None = Field(default=None, description="about how many images would decide it")


class GateResult(BaseModel):
    """All requirements together."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    exit_code: int
    findings: list[Finding]
    headline: str


def parse_age(text: str) -> timedelta:
    """12h, 30d or 4w. Raises AuditRejected."""
    match = re.fullmatch(r"(\d{1,6})([hdw])", text)
    if match is None:
        raise AuditRejected(f"max-age {text!r:.40}; expected a number and h, d or w, such as 30d")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def judge(report: Report, requirements: Requirements, now: datetime | None = None) -> GateResult:
    """Holds a report against requirements.

    Args:
      report: whose digest has been checked.
      requirements: all of them are judged, and each has a finding.
      now: for the report's age.

    Returns:
      The gravest outcome first decides: not a measurement, below, too few images, met.
    """
    findings = [check_measurement(report, requirements)]
    if requirements.max_age is not None:
        findings.append(check_age(report, requirements.max_age, now or datetime.now(UTC)))
    if requirements.robust_lower is not None:
        findings.append(check_floor(report, requirements.robust_lower))
    if requirements.against is not None and requirements.max_drop is not None:
        findings.append(check_drop(report, requirements.against, requirements.max_drop))
    outcome = next(each for each in PRECEDENCE if any(finding.outcome == each for finding in findings))
    return GateResult(outcome=outcome, exit_code=EXIT_CODES[outcome], findings=findings, headline=headline(report))


def check_measurement(report: Report, requirements: Requirements) -> Finding:
    judgement, requirement = judge_measurement(report), f"the measurement is {requirements.require}"
    enough = report.verdict == "valid" or (requirements.require == "warnings" and report.verdict == "warnings")
    believable = judgement.tone != "bad" and report.audit.profile != "smoke"
    outcome: Outcome = "met" if enough and believable else "not a measurement"
    return Finding(requirement=requirement, outcome=outcome, measured=f"{judgement.word}: {judgement.reason}")


def check_age(report: Report, most: timedelta, now: datetime) -> Finding:
    hours = most.total_seconds() / 3600
    requirement = f"at most {hours / 24:g} days old" if hours >= 48 else f"at most {hours:g} hours old"
    try:
        ended = datetime.fromisoformat(report.timings.finished_at)
    except ValueError:
        return Finding(requirement=requirement, outcome="not a measurement", measured="its date cannot be read")
    age = now - (ended if ended.tzinfo else ended.replace(tzinfo=UTC))
    fresh = timedelta(hours=-24) <= age <= most  # a clock may be wrong by hours, not by days
    words = f"{age.total_seconds() / 86400:.1f} days, ended {report.timings.finished_at}"
    return Finding(requirement=requirement, outcome="met" if fresh else "not a measurement", measured=words)


def check_floor(report: Report, floor: float) -> Finding:
    robust, images = report.ours.robust.expected, report.data.images
    requirement = f"the lower bound of robust accuracy is at least {percent(floor)} %"
    return decide(requirement, robust, floor, images, with_bounds(robust))


def check_drop(report: Report, baseline: Report, most: float) -> Finding:
    requirement = f"robust accuracy is at most {most:g} points below report {baseline.digest[:12]}"
    if reason := incomparable(report, baseline):
        return Finding(requirement=requirement, outcome="not a measurement", measured=reason)
    difference = difference_of(report, baseline)
    value, low, high = (100 * each for each in (difference.value, difference.low, difference.high))
    images = min(report.data.images, baseline.data.images)
    return decide(requirement, difference, -most / 100, images, f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]")


def incomparable(report: Report, baseline: Report) -> str:
    """Why two robust accuracies say nothing of each other; empty if they do."""
    pairs = {
        "norm": (baseline.audit.norm, report.audit.norm),
        "epsilon": (f"{baseline.audit.headline:g}", f"{report.audit.headline:g}"),
        "profile": (baseline.audit.profile, report.audit.profile),
        "attacks": (", ".join(baseline.audit.attacks) or "all", ", ".join(report.audit.attacks) or "all"),
        "data set": (baseline.data.name, report.data.name),
    }
    differing = [f"{name} {before} there, {now} here" for name, (before, now) in pairs.items() if before != now]
    if judge_measurement(baseline).tone == "bad":
        differing.append("the baseline is no measurement")
    return f"not comparable: {'; '.join(differing)}" if differing else ""


def difference_of(report: Report, baseline: Report) -> Interval:
    """Robust accuracy less the baseline's: paired on the same images, else with both errors."""
    if report.data.ids_digest == baseline.data.ids_digest:
        ours, theirs = (each.per_image["tombola"].robust for each in (report, baseline))
        value, low, high = paired_difference(ours, theirs)
        return Interval(value=value, low=low, high=high)
    new, old = report.ours.robust.expected, baseline.ours.robust.expected
    value = new.value - old.value
    down = math.hypot(new.value - new.low, old.high - old.value)
    up = math.hypot(new.high - new.value, old.value - old.low)
    return Interval(value=value, low=value - down, high=value + up)


def decide(requirement: str, interval: Interval, least: float, images: int, words: str) -> Finding:
    """Met if the whole interval is at or above `least`, below if the whole is beneath it, else too few images."""
    if interval.low >= least:
        return Finding(requirement=requirement, outcome="met", measured=words)
    if interval.high < least:
        return Finding(requirement=requirement, outcome="below", measured=words)
    needed = images_needed(interval, least, images)
    advice = f"about {needed:,} would decide it" if needed else "it lies too near for any number to decide it"
    words = f"{words}, n = {images}: the interval holds {100 * least:g} %; {advice}"
    return Finding(requirement=requirement, outcome="too few images", measured=words, images_needed=needed)


def images_needed(measured: Interval, least: float, images: int) -> int | None:
    """How many would take the bound past `least`, if the value stayed: an interval narrows with the root of n."""
    away = measured.value - least
    width = measured.value - measured.low if away > 0 else measured.high - measured.value
    if away == 0:
        return None
    needed = math.ceil(round(images * (width / away) ** 2, 6))  # 400.0000001 are 400
    return needed if needed <= MAX_USEFUL_IMAGES else None
