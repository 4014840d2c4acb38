"""The files that operators deploy: alert rules, dashboard, compose file, manifests. Nothing here starts a server."""

import json
import os
import random
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from model_store.json_object import Json
from model_store.policy import Policy, draw_theta, expected_size
from service.observability.metrics import PREFIX, PUBLISH_EVERY, TABLE, Metrics
from service.scheduling.scheduler import DrawStatistics
from service.settings import Settings, setting_docs
from tests.support.serving import stand_in_library

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
PROMETHEUS: Final = DEPLOY / "prometheus"
VERSION: Final[str] = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text("utf-8"))["project"]["version"]
NEEDS_PROMTOOL: Final = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def rules() -> list[Json]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[Json]:
    return [rule for rule in rules() if "alert" in rule]


def dashboard() -> Json:
    board: Json = json.loads((DEPLOY / "grafana" / "tombola.json").read_text("utf-8"))
    return board


def panels() -> list[Json]:
    """Rows and panels, those of folded rows included."""
    return [each for panel in dashboard()["panels"] for each in (panel, *panel.get("panels", ()))]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def exported() -> set[str]:
    """Every series name that /metrics can show."""
    names = {f"{PREFIX}{row.name}" for row in TABLE if row.kind != "histogram"}
    for row in TABLE:
        if row.kind == "histogram":
            names |= {f"{PREFIX}{row.name}_{part}" for part in ("bucket", "sum", "count")}
    return names


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=PROMETHEUS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Prometheus and Grafana


def test_rules_and_dashboard_ask_for_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    expressions = "\n".join([*queries(), *(rule["expr"] for rule in rules())])
    assert set(re.findall(r"\btombola_\w+", expressions)) <= exported()
    assert set(re.findall(r"\btombola:[\w:]+", expressions)) <= recorded


def test_what_the_law_expects_is_counted_beside_what_was_drawn() -> None:
    policy, metrics = Policy.over(["a", "a", "b", "b"]), Metrics()
    tally = DrawStatistics(stand_in_library(policy), metrics)  # its tickets share their labels, so that all are summed
    thetas = [draw_theta(policy, random.Random(seed)) for seed in range(PUBLISH_EVERY)]
    tally.add(SimpleNamespace(thetas=thetas, tasks=()))  # type: ignore[arg-type]
    drawn, expected = (
        metrics.value(f"draws{part}_total", structure="resnet18", density="0.5") for part in ("", "_expected")
    )
    assert drawn == sum(len(theta.members) for theta in thetas)
    assert expected == pytest.approx(PUBLISH_EVERY * expected_size(policy))


def test_every_kind_of_trouble_has_an_alert_and_every_alert_a_section_in_the_runbook() -> None:
    sections = set(re.findall(r"^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text("utf-8"), re.MULTILINE))
    assert {alert["alert"] for alert in alerts()} == sections
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"RUNBOOK.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket", "info")


def test_every_alert_is_seen_to_fire_and_to_keep_quiet() -> None:
    cases = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text("utf-8"))["tests"]
    seen = {(case["alertname"], bool(case["exp_alerts"])) for test in cases for case in test["alert_rule_test"]}
    assert seen == {(alert["alert"], fires) for alert in alerts() for fires in (True, False)}


@NEEDS_PROMTOOL
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", "rules.yml")
    promtool("check", "config", "prometheus.yml")


@NEEDS_PROMTOOL
def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yml")


def test_the_dashboard_s_panels_are_numbered_titled_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert len({panel["title"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        x, y, wide, high = (panel["gridPos"][name] for name in "xywh")
        cells = {(column, row) for column in range(x, x + wide) for row in range(y, y + high)}
        assert x + wide <= 24
        assert not cells & taken
        taken |= cells


def test_every_panel_explains_itself_and_leads_to_the_runbook() -> None:
    (runbook,) = [variable for variable in dashboard()["templating"]["list"] if variable["name"] == "runbook"]
    assert runbook["query"] == runbook["current"]["value"]
    mounts = [volume.split(":") for volume in compose()["services"]["grafana"]["volumes"]]
    assert [place for source, place, _ in mounts if source == "./RUNBOOK.md"] == [
        f"/usr/share/grafana{runbook['query']}"
    ]
    names = {alert["alert"].lower(): alert["alert"] for alert in alerts()}
    for panel in panels():
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            (link,) = panel["links"]
            anchor = link["url"].removeprefix("${runbook}#")
            assert link["title"] == f"Runbook: {names[anchor]}"


def test_series_without_a_value_are_in_no_legend() -> None:
    for panel in panels():
        if panel["type"] == "timeseries":
            hidden = {
                override["matcher"]["options"]["reducer"]
                for override in panel["fieldConfig"]["overrides"]
                if override["matcher"]["id"] == "byValue"
                and override["properties"]
                == [{"id": "custom.hideFrom", "value": {"legend": True, "tooltip": True, "viz": False}}]
            }
            assert hidden == {"allIsZero", "allIsNull"}, panel["title"]


def test_the_dashboard_draws_the_thresholds_of_the_burn_alerts() -> None:
    for kind, alert in (("availability", "Error"), ("latency", "Latency")):
        (panel,) = [panel for panel in panels() if panel["title"] == f"{kind.capitalize()}: burn rate"]
        lines = {step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]} - {None}
        text = "\n".join(rule["expr"] for rule in alerts() if rule["alert"].startswith(f"Tombola{alert}Budget"))
        assert {float(number) for number in re.findall(r"> ([\d.]+)", text)} == lines
        shown = {target["expr"].split("{")[0].removeprefix("max(") for target in panel["targets"]}
        assert set(re.findall(r"tombola:slo:\w+", text)) == shown


def test_the_dashboard_shows_what_an_operator_asks_for() -> None:
    expressions = "\n".join(queries())
    wanted = (
        "http_requests_total http_request_duration_seconds_bucket queue_wait_seconds_bucket member_batch_size_bucket"
    )
    wanted += " batch_seconds_bucket shed_total draws_total draws_expected_total audit_accuracy library_info"
    assert all(f"{PREFIX}{name}" in expressions for name in wanted.split())


# Docker


# Of the Prometheus data source's own, which the schema leaves to each data source.
NOT_IN_SCHEMA: Final = {"/annotations/list/0/titleFormat"}


def test_grafana_s_own_schema_knows_every_field_of_the_dashboard() -> None:
    """Read into Grafana's types and written again: what they do not know would be lost or changed."""
    register_default_plugins()
    assert set(changed(dashboard(), through_grafana(dashboard()))) == NOT_IN_SCHEMA
    wrong = dashboard()
    wrong["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    wrong["panels"][-2]["targets"][0]["expression"] = "up"
    unknown = set(changed(wrong, through_grafana(wrong))) - NOT_IN_SCHEMA
    last = f"/panels/{len(wrong['panels']) - 2}/targets/0/expression"
    assert unknown == {"/panels/1/fieldConfig/defaults/unitt", last}


def through_grafana(content: Json) -> Json:
    written: Json = json.loads(JSONEncoder().encode(Dashboard.from_json(content)))
    return written


def changed(before: Any, after: Any, path: str = "") -> list[str]:
    """Where `before` has something that `after` has not."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            place
            for key, value in before.items()
            for place in (changed(value, after[key], f"{path}/{key}") if key in after else [f"{path}/{key}"])
        ]
    return [] if before == after else [path]


def test_the_image_is_told_settings_that_exist() -> None:
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text("utf-8")
    variables = set(re.findall(r"\b(TOMBOLA_\w+)=", dockerfile))
    assert variables
    assert variables <= {setting.variable for setting in setting_docs()}


def compose() -> Json:
    content: Json = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return content


@pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="docker-compose is not installed (Debian: docker-compose)"
)
def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder)
    command = ["docker-compose", "-f", "compose.yaml", "config"]
    pinned = f"registry.example/tombola:{VERSION}@sha256:{'ab' * 32}"
    for variables, image in (({}, f"tombola:{VERSION}"), ({"SERVICE_IMAGE": pinned}, pinned)):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=os.environ | variables, check=False
        )
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["services"]["tombola"]["image"] == image


IMAGE: Final = re.compile(r"^[\w./-]*\b(\w+):([\w.-]+)(?:@sha256:[0-9a-f]{64})?$")


def images(document: Any) -> Iterator[str]:
    """Every `image:` of a document."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if key == "image" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from images(value)


def test_every_image_is_named_by_its_version_and_may_be_pinned_by_its_digest() -> None:
    files = [file for file in DEPLOY.rglob("*.yaml") if "templates" not in file.parts]
    named = [name for file in files for page in yaml.safe_load_all(file.read_text("utf-8")) for name in images(page)]
    for name in named:
        default = re.fullmatch(r"\$\{\w+:-([^}]+)\}", name)  # of the compose file: a variable may name another
        match = IMAGE.fullmatch(default[1] if default else name)
        if name != "tombola":  # of the Deployment: Kustomize replaces it
            assert match is not None, name
            assert match[2] != "latest"
            assert match[1] != "tombola" or match[2] == VERSION
    tags = [
        image["newTag"]
        for file in (DEPLOY / "kubernetes").rglob("kustomization.yaml")
        for image in yaml.safe_load(file.read_text("utf-8")).get("images", ())
    ]
    assert sorted(tags) == [VERSION, f"{VERSION}-cuda", f"{VERSION}-tracing"]
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text("utf-8")
    assert f"\nARG VERSION={VERSION}\n" in dockerfile
    assert set(re.findall(r"\btombola:([\w.]+)", dockerfile)) == {VERSION}


def test_no_file_or_page_names_an_image_s_tag_latest() -> None:
    pages = [*DEPLOY.rglob("*"), *(DEPLOY.parent / "docs").rglob("*.md"), DEPLOY.parent / "Dockerfile"]
    texts = {page: page.read_text("utf-8") for page in pages if page.is_file() and page.suffix != ".json"}
    assert [str(page) for page, text in texts.items() if re.search(r"\b\w+:-?latest\b", text)] == []


def test_compose_runs_the_cpu_image_alone_unless_monitoring_is_chosen() -> None:
    services = compose()["services"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "tombola": None,
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }
    build = services["tombola"]["build"]["args"]
    assert build["VERSION"] == VERSION
    assert build["TORCH_INDEX_URL"].endswith("/whl/cpu}")
    assert services["grafana"]["secrets"] == ["grafana-password"]
    ignored = (DEPLOY.parent / ".gitignore").read_text("utf-8").split()
    assert {f"deploy/{name}" for name in compose()["secrets"]} <= set(ignored)


def test_compose_mounts_files_that_exist_and_names_settings_that_exist() -> None:
    services = compose()["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    files = [name for name in mounted if name.startswith("./")]
    assert len(files) == 6
    assert all((DEPLOY / name).is_file() for name in files)
    assert set(services["tombola"]["environment"]) <= {setting.variable for setting in setting_docs()}


def test_compose_locks_the_service_up_and_publishes_only_classification() -> None:
    service = compose()["services"]["tombola"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["secrets"] == ["admin-token"]
    assert [port for port in service["ports"] if not port.startswith("127.0.0.1:")] == ["8000:8000"]
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().drain_delay_s + Settings().drain_timeout_s
