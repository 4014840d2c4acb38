"""A report in the formats that pipelines read: JUnit, SARIF, Markdown, a model card."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree as ET

from service.audit.errors import AuditRejected
from service.audit.report.model import REPORT, Check, Interval, Report
from service.audit.report.verdicts import has_figures, headline, judge_measurement, percent

SARIF_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LOCATION: Final = "manifest.json"  # of the library: readers of SARIF refuse results without a file
LEVELS: Final = {"fail": "error", "warn": "warning"}


@dataclass(frozen=True)
class Format:
    """One way to write a report."""

    name: str
    filename: str
    media_type: str
    write: Callable[[Report], str]


def to_json(report: Report) -> str:
    return report.as_bytes().decode()


def to_junit(report: Report) -> str:
    """One test case for each check, and one for the measurement. A hard failure is a failure, a warning is output."""
    root = ET.Element("testsuites", name="tombola audit")
    suite = ET.SubElement(root, "testsuite", name=f"audit of library {report.library.digest[:12]}")
    cases = [junit_measurement(report), *(junit_check(check) for check in report.checks)]
    suite.extend(cases)
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": 0,
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    for element in (root, suite):
        element.attrib |= {name: str(count) for name, count in counts.items()}
    suite.attrib |= {"time": f"{report.timings.seconds:g}", "timestamp": report.timings.finished_at[:19]}
    properties = ET.Element("properties")
    for name, value in figures_by_name(report).items():
        ET.SubElement(properties, "property", name=name, value=value)
    suite.insert(0, properties)
    for element in root.iter():
        element.text = element.text and printable(element.text)
        element.attrib |= {name: printable(value) for name, value in element.attrib.items()}
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)


def printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def junit_measurement(report: Report) -> ET.Element:
    case = ET.Element("testcase", classname="tombola.audit", name="measurement")
    judgement = judge_measurement(report)
    if not has_figures(report):
        ET.SubElement(case, "failure", message=judgement.word).text = judgement.reason
    ET.SubElement(case, "system-out").text = headline(report)
    return case


def junit_check(check: Check) -> ET.Element:
    case = ET.Element("testcase", classname="tombola.audit.checks", name=f"{check.id:02d} {check.name}")
    text = f"{check.criterion}; found: {check.value}"
    if check.outcome == "fail":
        ET.SubElement(case, "failure", message=check.value).text = text
    elif check.outcome in ("skipped", "no power"):
        ET.SubElement(case, "skipped", message=check.value)
    else:
        ET.SubElement(case, "system-out").text = f"{check.outcome}: {text}"
    return case


def figures_by_name(report: Report) -> dict[str, str]:
    """What the figures hold for, and the figures themselves where something was measured."""
    audit = report.audit
    rows = {
        "verdict": report.verdict,
        "norm": audit.norm,
        "epsilon_255": f"{audit.headline:g}",
        "images": str(report.data.images),
        "profile": audit.profile,
        "library": report.library.digest,
        "report": report.digest,
    }
    if has_figures(report):
        for name, interval in (intervals_of(report) | differences_of(report)).items():
            rows |= {name: f"{interval.value:.6f}", f"{name}_low": f"{interval.low:.6f}"}
            rows[f"{name}_high"] = f"{interval.high:.6f}"
    return rows


def intervals_of(report: Report) -> dict[str, Interval]:
    ours = report.ours
    return {"clean": ours.clean.expected, "robust": ours.robust.expected, "ten_tries": ours.robust.tries["k10"]}


def differences_of(report: Report) -> dict[str, Interval]:
    """What the secret is worth, where it was measured."""
    return {} if report.secrecy is None else {"secrecy": report.secrecy.difference}


def to_sarif(report: Report) -> str:
    """SARIF 2.1.0: a rule for each check, a result for each that failed or warned, and one with the figures."""
    rules = [sarif_rule(check) for check in report.checks]
    flagged = [check for check in report.checks if check.outcome in LEVELS]
    results = [sarif_result(report, rule_id(check), LEVELS[check.outcome], check.value) for check in flagged]
    rules.append(
        {
            "id": "robust-accuracy",
            "name": "RobustAccuracy",
            "shortDescription": {"text": "Accuracy under the attacks that were run"},
            "defaultConfiguration": {"level": "note"},
        }
    )
    level = "note" if has_figures(report) else "error"
    results.append(sarif_result(report, "robust-accuracy", level, headline(report)))
    driver = {
        "name": "tombola audit",
        "semanticVersion": semantic_version(report.versions.get("tombola", "")),
        "rules": rules,
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"tombola-audit/{report.digest[:12]}"},
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": figures_by_name(report),
    }
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def semantic_version(text: str) -> str:
    return text if text[:1].isdigit() else "0.0.0"


def rule_id(check: Check) -> str:
    return f"check-{check.id:02d}"


def sarif_rule(check: Check) -> dict[str, Any]:
    return {
        "id": rule_id(check),
        "name": "".join(word.capitalize() for word in check.name.split()),
        "shortDescription": {"text": check.name},
        "fullDescription": {"text": check.criterion},
        "defaultConfiguration": {"level": "error" if check.hard else "warning"},
    }


def sarif_result(report: Report, rule: str, level: str, text: str) -> dict[str, Any]:
    location = {"physicalLocation": {"artifactLocation": {"uri": LOCATION}, "region": {"startLine": 1}}}
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": text},
        "locations": [location],
        "partialFingerprints": {"library/rule/v1": f"{report.library.digest[:32]}/{rule}"},
    }


def to_markdown(report: Report) -> str:
    """A summary for a pipeline's page."""
    judgement = judge_measurement(report)
    lines = [f"### Audit of library `{report.library.digest[:12]}`", "", escape(headline(report)), ""]
    lines += [f"**Measurement: {judgement.word}.** {escape(judgement.reason)}", ""]
    if has_figures(report):
        lines += ["| | % | 95 % |", "|---|---:|---|"]
        lines += [
            f"| {name.replace('_', ' ')} | {percent(each.value)} | [{percent(each.low)}, {percent(each.high)}] |"
            for name, each in intervals_of(report).items()
        ]
        lines += [
            f"| {name} (points) | {100 * each.value:+.1f} | [{100 * each.low:+.1f}, {100 * each.high:+.1f}] |"
            for name, each in differences_of(report).items()
        ]
        lines.append("")
    flagged = [check for check in report.checks if check.outcome in LEVELS]
    if flagged:
        lines += ["| check | outcome | found |", "|---|---|---|"]
        lines += [f"| {each.id} {escape(each.name)} | {each.outcome} | {escape(each.value)} |" for each in flagged]
        lines.append("")
    lines.append(f"Report `{report.digest[:12]}`, commit `{report.versions.get('commit', 'unknown')[:12]}`.")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text from a library or a data set, as the cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`").replace("\n", " ")


def to_card(report: Report) -> str:
    """A model card: Hugging Face's `model-index` as YAML (JSON is YAML), and the summary below it.

    A report without a measurement has no metrics.
    """
    audit = report.audit
    threat = f"{audit.norm}, epsilon {audit.headline:g}/255"
    metrics = [
        {
            "type": "accuracy",
            "name": f"{name.replace('_', ' ')}" + (f" ({threat})" if name != "clean" else ""),
            "value": round(100 * interval.value, 2),
            "args": {"low": round(100 * interval.low, 2), "high": round(100 * interval.high, 2), "confidence": 0.95},
        }
        for name, interval in (intervals_of(report).items() if has_figures(report) else ())
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": report.data.name, "type": report.data.name, "args": card_args(report)},
        "metrics": metrics,
    }
    name = f"tombola-{report.library.digest[:12]}"
    head = {"pipeline_tag": "image-classification", "tags": ["adversarial-robustness"]}
    body: dict[str, Any] = {**head, "model-index": [{"name": name, "results": [result] if metrics else []}]}
    model = "\n".join(f"- {escape(key)}: {escape(value)}" for key, value in report.threat_model.items())
    return f"---\n{json.dumps(body, indent=1)}\n---\n\n{to_markdown(report)}\n## Threat model\n\n{model}\n"


def card_args(report: Report) -> dict[str, Any]:
    return {"images": report.data.images, "digest": report.data.digest, "profile": report.audit.profile}


FORMATS: Final[dict[str, Format]] = {
    each.name: each
    for each in (
        Format("json", REPORT, "application/json", to_json),
        Format("junit", "junit.xml", "application/xml", to_junit),
        Format("sarif", "report.sarif", "application/sarif+json", to_sarif),
        Format("md", "summary.md", "text/markdown; charset=utf-8", to_markdown),
        Format("card", "card.md", "text/markdown; charset=utf-8", to_card),
    )
}


def format_named(name: str) -> Format:
    """Raises AuditRejected."""
    if name not in FORMATS:
        raise AuditRejected(f"format {name!r:.40}; expected one of {', '.join(FORMATS)}, html")
    return FORMATS[name]
