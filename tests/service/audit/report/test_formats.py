"""The report in other tools' formats, read by other tools, and its published schema."""

import json
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import yaml
from sarif_pydantic import Sarif

from service.audit.errors import AuditRejected
from service.audit.report.formats import FORMATS, format_named, to_card, to_junit, to_markdown, to_sarif
from service.audit.report.model import SCHEMA, Report, schema
from tests.service.audit.report.conftest import PUBLISHED, changed


def flagged() -> Report:
    """One hard failure and one warning, with what text can hold."""
    fields = changed().as_json()
    rows = fields["checks"]
    rows[4] |= {"outcome": "fail", "value": 'a | b <script> & "c"\x1b[0m'}
    rows[7] |= {"outcome": "warn"}
    rows[9] |= {"outcome": "skipped"}
    return changed(checks=rows, verdict="invalid", failed=[rows[4]["id"]], warned=[rows[7]["id"]])


def test_the_published_schema_is_the_model_s() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == schema()
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_published_report_follows_the_published_schema(published: Report) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    validator.validate(json.loads(PUBLISHED.read_text("utf-8")))
    validator.validate(published.as_json())
    lacking = published.as_json()
    del lacking["systems"]["tombola"]["robust"]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(lacking)


def test_reading_a_report_changes_nothing_of_it(published: Report) -> None:
    assert published.as_json() == json.loads(PUBLISHED.read_text("utf-8"))


def test_junit_counts_what_its_cases_say(published: Report) -> None:
    for report, failures in ((published, 0), (flagged(), 2)):
        root = ET.fromstring(to_junit(report))  # noqa: S314 -- our own text
        cases = list(root.iter("testcase"))
        assert len(cases) == len(report.checks) + 1 == int(root.attrib["tests"])
        assert len(list(root.iter("failure"))) == failures == int(root.attrib["failures"])
        assert len(list(root.iter("skipped"))) == int(root.attrib["skipped"])
        values = {row.attrib["name"]: row.attrib["value"] for row in root.iter("property")}
        assert ("robust_low" in values) == (failures == 0)


def test_sarif_is_read_by_another_reader_and_names_each_flagged_check() -> None:
    report = flagged()
    (run,) = Sarif.model_validate_json(to_sarif(report)).runs
    results = run.results or []
    assert {result.rule_id: result.level.value for result in results if result.level} == {
        "check-05": "error",
        "check-08": "warning",
        "robust-accuracy": "error",
    }
    rules = {rule["id"] for rule in json.loads(to_sarif(report))["runs"][0]["tool"]["driver"]["rules"]}
    assert rules == {f"check-{check.id:02d}" for check in report.checks} | {"robust-accuracy"}
    for result in json.loads(to_sarif(report))["runs"][0]["results"]:
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "manifest.json"


def test_fingerprints_last_from_one_audit_to_the_next() -> None:
    """A reader that tracks findings must know the same finding again in tomorrow's report of the same library."""

    def prints(report: Report) -> list[Any]:
        return [result["partialFingerprints"] for result in json.loads(to_sarif(report))["runs"][0]["results"]]

    assert prints(changed()) == prints(changed(audit={"seed": 7}))
    assert prints(changed()) != prints(changed(library={"digest": "f" * 64}))


def test_markdown_keeps_its_tables_whole(published: Report) -> None:
    text = to_markdown(flagged())
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == rows[-1].replace("\\|", "").count("|") for line in rows)
    figure = f"{100 * published.robust.value:.1f}"
    assert figure in to_markdown(published)
    assert figure not in text  # an invalid audit has no figure


def test_the_card_begins_with_a_model_index(published: Report) -> None:
    head = yaml.safe_load(to_card(published).split("---\n")[1])
    (model,) = head["model-index"]
    (result,) = model["results"]
    metrics = {metric["name"]: metric for metric in result["metrics"]}
    assert metrics["robust (linf, epsilon 8/255)"]["value"] == pytest.approx(100 * published.robust.value, abs=0.1)
    assert metrics["clean"]["args"]["low"] < metrics["clean"]["value"] < metrics["clean"]["args"]["high"]
    assert result["dataset"]["args"]["images"] == published.data.images
    assert yaml.safe_load(to_card(flagged()).split("---\n")[1])["model-index"][0]["results"] == []


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(AuditRejected, match=f"expected one of {', '.join(FORMATS)}, html"):
        format_named("pdf")
