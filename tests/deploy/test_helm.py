"""The Helm chart, rendered by Helm's own library, against the Kustomize manifests and Kubernetes' schemas."""

import copy
import json
import re
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from model_store.json_object import Json
from service.settings import setting_docs
from tests.deploy.test_files import DEPLOY, NEEDS_PROMTOOL, PROMETHEUS, VERSION, promtool
from tests.deploy.test_kubernetes import KUBERNETES, NEEDS_KUBECTL, built, container, validate

helm: Final = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: it has no wheel here")

CHART: Final = DEPLOY / "helm" / "tombola"
SCHEMA: Final = json.loads((CHART / "values.schema.json").read_text("utf-8"))
WHOLE: Final = {"monitoring": {"enabled": True}, "autoscaling": {"adapter": {"enabled": True}}}
VARIANTS: Final = ("gpu", "grpc", "tracing")
OWN: Final = {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart"}
"""Labels that Helm's conventions add."""


def rendered(values: Json | None = None, name: str = "tombola") -> dict[tuple[str, str], Json]:
    """(kind, name) -> the manifest that an installation would send."""
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values or {})
        files: dict[str, str] = chart.render(values or {}, name=name, namespace="tombola")
    pages = [page for file, text in files.items() if file.endswith(".yaml") for page in yaml.safe_load_all(text)]
    return {(page["kind"], page["metadata"]["name"]): page for page in pages if page}


def variant(name: str) -> Json:
    values: Json = yaml.safe_load((CHART / f"values-{name}.yaml").read_text("utf-8"))
    return values


def without_own_labels(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without_own_labels(value) for key, value in document.items() if key not in OWN}
    return [without_own_labels(item) for item in document] if isinstance(document, list) else document


def merged(first: Json, second: Json) -> Json:
    both = copy.deepcopy(first)
    for key, value in second.items():
        both[key] = merged(both.get(key, {}), value) if isinstance(value, dict) else value
    return both


@pytest.mark.parametrize("values", [{}, WHOLE, *map(variant, VARIANTS)], ids=str)
def test_helm_s_linter_has_nothing_against_the_chart(values: Json) -> None:
    report = helm.lint(str(CHART), values, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@NEEDS_KUBECTL
@pytest.mark.parametrize("overlay", ["base", *(f"overlays/{name}" for name in VARIANTS)])
def test_the_chart_renders_what_kustomize_builds(overlay: str) -> None:
    """But for the labels of Helm's conventions, and the namespace, which `helm install --create-namespace` makes."""
    name = overlay.removeprefix("overlays/")
    values = merged(WHOLE, {} if name == "base" else variant(name))
    pages = [*built(KUBERNETES / overlay), *built(KUBERNETES / "adapter")]
    expected = {(page["kind"], page["metadata"]["name"]): page for page in pages if page["kind"] != "Namespace"}
    made = {key: without_own_labels(page) for key, page in rendered(values).items()}
    assert made.keys() == expected.keys()
    for key, page in made.items():
        if page["kind"] == "Deployment":
            for each in (page, expected[key]):
                container(each)["env"].sort(key=lambda variable: variable["name"])
        if page["kind"] == "ConfigMap":
            page["data"], expected[key]["data"] = (
                {k: v.strip() for k, v in each["data"].items()} for each in (page, expected[key])
            )
        assert page == expected[key], key


@pytest.mark.parametrize("values", [WHOLE, *map(variant, VARIANTS)], ids=["whole", *VARIANTS])
def test_what_is_rendered_is_valid_and_its_settings_exist(values: Json) -> None:
    made = rendered(values)
    for page in made.values():
        validate(page)
    names = {variable["name"] for variable in container(made["Deployment", "tombola"])["env"]}
    assert {name for name in names if name.startswith("TOMBOLA_")} <= {each.variable for each in setting_docs()}


def test_each_switch_takes_away_its_own_manifests() -> None:
    off = {"enabled": False}
    bare = {"autoscaling": off, "podDisruptionBudget": off, "networkPolicy": off, "replicas": 3}
    made = rendered(bare)
    assert sorted(kind for kind, _ in made) == ["Deployment", "Service", "Service", "ServiceAccount"]
    assert made["Deployment", "tombola"]["spec"]["replicas"] == 3
    assert "replicas" not in rendered()["Deployment", "tombola"]["spec"]  # the autoscaler's, not an upgrade's
    added = {"HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"}
    assert {kind for kind, _ in rendered()} == {kind for kind, _ in made} | added
    assert {kind for kind, _ in rendered(WHOLE)} - {kind for kind, _ in rendered()} == {
        "ServiceMonitor",
        "PrometheusRule",
        "ConfigMap",
    }


def test_values_reach_the_pod() -> None:
    values = {
        "image": {"repository": "registry.example/tombola", "digest": f"sha256:{'ab' * 32}"},
        "imagePullSecrets": ["registry"],
        "adminToken": {"existingSecret": "mine", "key": "word"},
        "library": f"s3://models/robust#sha256={'cd' * 32}",
        "settings": {"MAX_BATCH_SIZE": "64", "API_KEYS_FILE": "/etc/keys"},
        "state": {"existingClaim": "audits"},
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"disk": "fast"},
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "service": {"type": "LoadBalancer", "port": 8080},
        "grpc": {"enabled": True, "port": 9002},
        "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    }
    made = rendered(values, name="other")
    for page in made.values():
        validate(page)
    deployment = made["Deployment", "other"]
    pod = deployment["spec"]["template"]["spec"]
    assert container(deployment)["image"] == f"registry.example/tombola:{VERSION}@sha256:{'ab' * 32}"
    env = {variable["name"]: variable["value"] for variable in container(deployment)["env"]}
    assert env["TOMBOLA_MAX_BATCH_SIZE"] == "64"
    assert env["TOMBOLA_LIBRARY"] == values["library"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["admin"]["secret"]["items"] == [{"key": "word", "path": "token"}]
    assert volumes["admin"]["secret"]["secretName"] == "mine"
    assert volumes["state"]["persistentVolumeClaim"] == {"claimName": "audits"}
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"disk": "fast"}, [{"name": "registry"}])
    service = made["Service", "other"]["spec"]
    assert (service["type"], [port["port"] for port in service["ports"]]) == ("LoadBalancer", [8080, 9002])
    assert made["ServiceMonitor", "other"]["metadata"]["labels"]["release"] == "prometheus"


def test_two_releases_in_one_namespace_find_their_own_pods_alone() -> None:
    first, second = rendered(WHOLE, name="first"), rendered(WHOLE, name="second")
    assert not first.keys() & second.keys()
    own = first["Deployment", "first"]["spec"]["template"]["metadata"]["labels"].items()
    other = second["Deployment", "second"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        first["Deployment", "first"]["spec"]["selector"]["matchLabels"],
        first["Service", "first"]["spec"]["selector"],
        first["Service", "first-admin"]["spec"]["selector"],
        first["PodDisruptionBudget", "first"]["spec"]["selector"]["matchLabels"],
        first["NetworkPolicy", "first"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= own
        assert not selector.items() <= other
    monitor = first["ServiceMonitor", "first"]["spec"]["selector"]["matchLabels"].items()
    assert monitor <= first["Service", "first-admin"]["metadata"]["labels"].items()
    assert not monitor <= second["Service", "second-admin"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"misspelt": 1}, "misspelt"),
        ({"image": {"tag": "latest"}}, "image.tag"),
        ({"image": {"digest": "sha256:12"}}, "image.digest"),
        ({"settings": {"MAX_BATCH_SIZE": 1000000}}, "settings.MAX_BATCH_SIZE"),  # YAML would make it 1e+06
        ({"settings": {"ADMIN_HOST": "127.0.0.1"}}, "ADMIN_HOST"),
        ({"settings": {"GRPC": "true"}}, "GRPC"),  # grpc.enabled opens the port, too
        ({"library": "s3://models/robust"}, "library"),
        ({"autoscaling": {"minReplicas": 0}}, "autoscaling.minReplicas"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(values: Json, place: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(place.replace(".", "/"))):
        rendered(values)


def leaves(values: Json, schema: Json, place: str = "") -> dict[str, Json]:
    """place -> schema, of every value; what the schema does not name has none."""
    below: dict[str, Json] = {}
    for key, value in values.items():
        inner: Json = schema.get("properties", {}).get(key, {})
        path = f"{place}{key}"
        below |= leaves(value, inner, f"{path}.") if "properties" in inner else {path: inner}
    return below


def test_every_value_is_described_as_its_comment_says_and_the_schema_has_no_others() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    text = (CHART / "values.yaml").read_text("utf-8")
    values = yaml.safe_load(text)
    jsonschema.Draft7Validator(SCHEMA).validate(values)
    described = {place: schema.get("description") for place, schema in leaves(values, SCHEMA).items()}
    comments = {
        " ".join(part.strip() for part in re.sub(r"^# -- ", "", comment.strip()).split("# "))
        for comment in re.findall(r"^ *(# -- .*\n(?: *# .*\n)*)", text, re.MULTILINE)
    }
    assert {re.sub(r"\s+", " ", comment) for comment in comments} == set(described.values())
    assert set(SCHEMA["properties"]) == {*values, "global"}


def test_the_chart_s_versions_are_the_project_s() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["version"] == chart["appVersion"] == VERSION
    assert [variant(name)["image"]["tag"] for name in ("gpu", "tracing")] == [f"{VERSION}-cuda", f"{VERSION}-tracing"]


def test_a_packaged_chart_holds_the_rules_themselves(tmp_path: Path) -> None:
    """They are links in the checkout."""
    archive = helm.package(str(CHART), destination=str(tmp_path))
    with helm.Chart.load(archive) as chart:
        files = {file["name"]: file["data"] for file in chart.files}
    assert files["files/rules.yml"] == (PROMETHEUS / "rules.yml").read_text("utf-8")
    assert files["files/adapter.yaml"] == (KUBERNETES / "adapter" / "adapter.yaml").read_text("utf-8")


@NEEDS_PROMTOOL
def test_the_adapter_s_query_is_each_pod_s_queue(tmp_path: Path) -> None:
    """As prometheus-adapter fills it in for the pods of an autoscaler; the metric is the one that the HPA names."""
    (rule,) = yaml.safe_load((KUBERNETES / "adapter" / "adapter.yaml").read_text("utf-8"))["rules"]
    series = rule["seriesQuery"].split("{")[0]
    (metric,) = rendered()["HorizontalPodAutoscaler", "tombola"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == series
    query = rule["metricsQuery"]
    for name, value in (("Series", series), ("LabelMatchers", 'namespace="n",pod=~"a|b"'), ("GroupBy", "pod")):
        query = query.replace(f"<<.{name}>>", value)
    inputs = [
        {"series": f'{series}{{namespace="{namespace}", pod="{pod}"}}', "values": value}
        for namespace, pod, value in (("n", "a", "40"), ("n", "b", "8"), ("other", "a", "5"))
    ]
    samples = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in (("a", 40), ("b", 8))]
    test = {"input_series": inputs, "promql_expr_test": [{"expr": query, "eval_time": "0m", "exp_samples": samples}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [{"interval": "1m", **test}]}))
    promtool("test", "rules", str(tmp_path / "test.yml"))
