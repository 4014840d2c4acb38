"""Two verdicts that are never mixed: whether the measurement may be believed, and where its result lies."""

from dataclasses import dataclass
from typing import Final, Literal

from service.audit.report.model import GENERATED, Interval, Report

NOT_MEASURED: Final = "not a measurement"


@dataclass(frozen=True)
class Judgement:
    """One verdict in words. tone: how a page colours it."""

    word: str
    reason: str
    tone: Literal["good", "caution", "bad", "neutral"]


def has_figures(report: Report) -> bool:
    """Whether the accuracies mean anything: an ensemble that labels its own images is right by definition."""
    return report.data.name != GENERATED and report.verdict != "invalid"


def judge_measurement(report: Report) -> Judgement:
    """Whether the figures may be believed."""
    if report.verdict == "invalid":
        failed = ", ".join(map(str, report.failed))
        return Judgement(NOT_MEASURED, f"Hard checks failed: {failed}. The figures mean nothing.", "bad")
    if report.data.name == GENERATED:
        reason = "The images are generated and labelled by the ensemble itself. The audit shows that the attacks run."
        return Judgement(NOT_MEASURED, reason, "bad")
    cautions = []
    if report.audit.profile == "smoke":
        cautions.append(f"Profile smoke attacks {report.data.images} images: no figure to quote.")
    if report.audit.attacks:
        cautions.append(f"Only chosen attacks ran: {', '.join(report.audit.attacks)}. Others may do more.")
    if report.warned:
        cautions.append(f"Checks with warnings: {', '.join(map(str, report.warned))}.")
    if powerless := [check.id for check in report.checks if check.outcome == "no power" and check.hard]:
        cautions.append(f"Checks without the power to fail: {', '.join(map(str, powerless))}.")
    if cautions:
        return Judgement("valid with warnings", " ".join(cautions), "caution")
    return Judgement("valid", f"All {ran(report)} checks that ran passed.", "good")


def ran(report: Report) -> int:
    return sum(check.outcome not in ("skipped", "no power") for check in report.checks)


def judge_result(report: Report, floor: float | None) -> Judgement:
    """Where the robust accuracy lies. floor: the least that its lower bound may be, as a fraction."""
    if not has_figures(report):
        return Judgement(NOT_MEASURED, "There is no result.", "neutral")
    if floor is None:
        return Judgement("no floor set", "Nobody has said yet how much is enough.", "neutral")
    robust = report.ours.robust.expected
    if robust.low >= floor:
        return Judgement("above the floor", f"The lower bound is at or above {percent(floor)} %.", "good")
    if robust.high < floor:
        return Judgement("below the floor", f"Even the upper bound is below {percent(floor)} %.", "bad")
    return Judgement("not shown to reach the floor", f"The interval holds {percent(floor)} %.", "bad")


def headline(report: Report) -> str:
    """The one line worth quoting, with its conditions."""
    audit = report.audit
    conditions = f"{audit.norm}, epsilon {audit.headline:g}/255, n = {report.data.images}, profile {audit.profile}"
    if not has_figures(report):
        judgement = judge_measurement(report)
        return f"{judgement.word} ({conditions}). {judgement.reason}"
    ours = report.ours
    only = f" (of them only {', '.join(audit.attacks)})" if audit.attacks else ""
    return (
        f"Accuracy under the attacks run{only}: {with_bounds(ours.robust.expected)} ({conditions}); "
        f"clean {percent(ours.clean.expected.value)} %."
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_bounds(interval: Interval) -> str:
    return f"{percent(interval.value)} % [{percent(interval.low)}, {percent(interval.high)}]"
