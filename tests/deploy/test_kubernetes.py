"""The manifests for Kubernetes and KServe against the real schemas, and against what the service needs."""

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from model_store.json_object import Json
from service.observability.metrics import PREFIX, TABLE
from service.settings import SERVICE_LINK, Settings, setting_docs
from tests.deploy.test_files import DEPLOY, PROMETHEUS, VERSION

KUBERNETES: Final = DEPLOY / "kubernetes"
BASE: Final = KUBERNETES / "base"
VERSIONS: Final = ("1.30", "1.34")  # autoscaling/v2 and policy/v1 are older
OPERATOR: Final = ("ServiceMonitor", "PrometheusRule")
NEEDS_KUBECTL: Final = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def documents(folder: Path) -> list[Json]:
    files = sorted(file for file in folder.glob("*.yaml") if file.name != "kustomization.yaml")
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def one(kind: str, name: str = "tombola") -> Json:
    (document,) = [item for item in documents(BASE) if item["kind"] == kind and item["metadata"]["name"] == name]
    return document


def validate(document: Json) -> None:
    """Against Kubernetes' own schemas, unknown keys refused; the operator's kinds against its models."""
    if document["kind"] in OPERATOR:
        models = import_module("cloudcoil.models.prometheus_operator.v1")  # in seconds: not where no test needs it
        model = getattr(models, document["kind"])
        assert model.model_validate(document).model_dump(by_alias=True, exclude_unset=True, mode="json") == document
        return
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def built(folder: Path) -> list[Json]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pod(deployment: Json | None = None) -> Json:
    spec: Json = (deployment or one("Deployment"))["spec"]["template"]["spec"]
    return spec


def container(deployment: Json | None = None) -> Json:
    (only,) = pod(deployment)["containers"]
    return dict(only)


def test_the_base_s_manifests_are_valid() -> None:
    kinds = [document["kind"] for document in documents(BASE)]
    for document in documents(BASE):
        validate(document)
    expected = "Deployment HorizontalPodAutoscaler Namespace NetworkPolicy PodDisruptionBudget PrometheusRule"
    assert sorted(kinds) == [*expected.split(), "Service", "Service", "ServiceAccount", "ServiceMonitor"]


@pytest.mark.parametrize("kind", ["Deployment", "ServiceMonitor"])
def test_a_misspelt_key_is_refused(kind: str) -> None:
    document = one(kind)
    document["spec"]["misspelt"] = 1
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
        validate(document)


@NEEDS_KUBECTL
@pytest.mark.parametrize("folder", ["base", "overlays/gpu", "overlays/grpc", "overlays/tracing"])
def test_kustomize_builds_valid_manifests_in_one_namespace(folder: str) -> None:
    made = built(KUBERNETES / folder)
    assert len(made) == len(documents(BASE))
    for document in made:
        validate(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "tombola"
        assert document["metadata"]["labels"]["app.kubernetes.io/name"] == "tombola"


@NEEDS_KUBECTL
def test_the_gpu_overlay_asks_for_a_gpu_and_keeps_the_rest() -> None:
    (base,) = [item for item in built(BASE) if item["kind"] == "Deployment"]
    (gpu,) = [item for item in built(KUBERNETES / "overlays" / "gpu") if item["kind"] == "Deployment"]
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container(gpu)["image"] == f"tombola:{VERSION}-cuda"
    assert {"name": "TOMBOLA_DEVICE", "value": "cuda"} in container(gpu)["env"]
    assert pod(gpu)["securityContext"] == pod(base)["securityContext"]
    assert all(variable in container(gpu)["env"] for variable in container(base)["env"])


@NEEDS_KUBECTL
def test_the_tracing_overlay_opens_the_way_to_a_collector_and_no_other() -> None:
    made = built(KUBERNETES / "overlays" / "tracing")
    (deployment,) = [item for item in made if item["kind"] == "Deployment"]
    environment = {variable["name"]: variable["value"] for variable in container(deployment)["env"]}
    assert environment["TOMBOLA_TRACING"] == "true"
    assert container()["env"][0] in container(deployment)["env"]
    (policy,) = [item for item in made if item["kind"] == "NetworkPolicy"]
    ports = [(port["protocol"], port["port"]) for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert ports == [("TCP", 4318), ("UDP", 53), ("TCP", 53)]
    assert all("namespaceSelector" in target for rule in policy["spec"]["egress"] for target in rule["to"])
    assert policy["spec"]["ingress"] == one("NetworkPolicy")["spec"]["ingress"]


def test_a_pod_has_time_to_drain() -> None:
    slept = re.fullmatch(r"import time; time.sleep\((\d+)\)", container()["lifecycle"]["preStop"]["exec"]["command"][2])
    assert slept is not None
    drain = Settings().drain_delay_s + Settings().drain_timeout_s
    assert pod()["terminationGracePeriodSeconds"] > int(slept[1]) + drain


def test_probes_ask_the_public_plane_what_each_is_for() -> None:
    assert {"name": "http", "containerPort": 8000} in container()["ports"]
    for probe, path in (("startup", "ready"), ("liveness", "live"), ("readiness", "ready")):
        http_get = container()[f"{probe}Probe"]["httpGet"]
        assert http_get == {"path": f"/health/{path}", "port": "http"}


def test_a_pod_runs_with_as_little_as_the_restricted_standard_allows() -> None:
    assert pod()["securityContext"]["runAsNonRoot"]
    assert pod()["securityContext"]["runAsUser"] == pod()["securityContext"]["fsGroup"] == 10001
    assert not pod()["automountServiceAccountToken"]
    context = container()["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}


@NEEDS_KUBECTL
def test_the_grpc_overlay_opens_grpc_to_whoever_may_reach_http_and_to_nobody_else() -> None:
    made = {(page["kind"], page["metadata"]["name"]): page for page in built(KUBERNETES / "overlays" / "grpc")}
    deployment = made["Deployment", "tombola"]
    assert {"name": "TOMBOLA_GRPC", "value": "true"} in container(deployment)["env"]
    ports = {port["name"]: port["containerPort"] for port in container(deployment)["ports"]}
    assert ports == {"http": 8000, "admin": 8001, "grpc": Settings().grpc_port}
    (port,) = [port for port in made["Service", "tombola"]["spec"]["ports"] if port["name"] == "grpc"]
    assert (port["port"], port["targetPort"], port["appProtocol"]) == (8002, "grpc", "kubernetes.io/h2c")
    public, admin = made["NetworkPolicy", "tombola"]["spec"]["ingress"]
    assert [port["port"] for port in public["ports"]] == ["http", "grpc"]
    assert admin == one("NetworkPolicy")["spec"]["ingress"][1]


def test_variables_are_settings_and_kubernetes_adds_none() -> None:
    variables = {variable["name"] for variable in container()["env"]}
    assert variables <= {setting.variable for setting in setting_docs()}
    assert not pod()["enableServiceLinks"]
    assert SERVICE_LINK.fullmatch("TOMBOLA_SERVICE_HOST")  # and if somebody turns them on, they are passed over


def test_nothing_goes_out_and_the_admin_plane_is_for_marked_namespaces() -> None:
    policy = one("NetworkPolicy")["spec"]
    assert "Egress" in policy["policyTypes"]
    assert policy["egress"] == []
    (admin,) = [rule for rule in policy["ingress"] if rule["ports"][0]["port"] == "admin"]
    assert admin["from"] == [{"namespaceSelector": {"matchLabels": {"tombola/admin": "true"}}}]


def test_selectors_find_the_pods() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert one(kind)["spec"]["selector"]["matchLabels"].items() <= labels
    for service in ("tombola", "tombola-admin"):
        assert one("Service", service)["spec"]["selector"].items() <= labels
    assert (
        one("ServiceMonitor")["spec"]["selector"]["matchLabels"]
        == one("Service", "tombola-admin")["metadata"]["labels"]
    )


def test_replicas_follow_the_queue() -> None:
    (metric,) = one("HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert [row.kind for row in TABLE if f"{PREFIX}{row.name}" == name] == ["gauge"]
    assert int(metric["pods"]["target"]["averageValue"]) == Settings().max_batch_size


def test_the_operator_gets_the_same_rules() -> None:
    assert one("PrometheusRule")["spec"] == yaml.safe_load((PROMETHEUS / "rules.yml").read_text())


# KServe


def runtime() -> Json:
    (document,) = yaml.safe_load_all((DEPLOY / "kserve" / "runtime.yaml").read_text())
    return dict(document)


def inference_service() -> Json:
    (document,) = yaml.safe_load_all((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
    return dict(document)


def test_the_runtime_s_containers_and_volumes_are_a_valid_pod() -> None:
    spec = {key: runtime()["spec"][key] for key in ("containers", "volumes")}
    for version in VERSIONS:
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}, version, strict=True
        )
    variables = {variable["name"] for variable in spec["containers"][0]["env"]}
    assert variables <= {setting.variable for setting in setting_docs()}


def test_the_inference_service_asks_for_what_the_runtime_offers() -> None:
    model = inference_service()["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime()["metadata"]["name"]
    (offered,) = runtime()["spec"]["supportedModelFormats"]
    assert model["modelFormat"].items() <= offered.items()
    assert runtime()["spec"]["protocolVersions"] == ["v2", "grpc-v2"]
    assert model["protocolVersion"] in runtime()["spec"]["protocolVersions"]
    assert inference_service()["metadata"]["name"] == "tombola"


def kserve_package() -> Path:
    """Where KServe's Python package lies, in an environment of its own."""
    code = "from importlib.util import find_spec; print(find_spec('kserve').origin)"
    done = subprocess.run([os.environ["KSERVE_PYTHON"], "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).parent


def kserve_class(package: Path, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """JSON key -> type of one of KServe's models, read from its Python package without running it."""
    file = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    tree = ast.parse((package / "models" / f"{file}.py").read_text())
    (model,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    tables = {ast.unparse(node.targets[0]): node.value for node in model.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(tables["attribute_map"]), ast.literal_eval(tables["openapi_types"])


def unknown(package: Path, document: Any, kind: str, place: str) -> Iterator[str]:
    """Keys that KServe's model of this kind does not have. Kubernetes' own kinds are checked elsewhere."""
    inner = re.fullmatch(r"list\[(\w+)\]", kind)
    if inner is not None:
        for item in document:
            yield from unknown(package, item, inner[1], place)
    elif re.match(r"V1(alpha|beta)1", kind):
        keys, types = kserve_class(package, kind)
        names = {key: attribute for attribute, key in keys.items()}
        for key, value in document.items():
            if key not in names:
                yield f"{place}.{key}"
            else:
                yield from unknown(package, value, types[names[key]], f"{place}.{key}")


@pytest.mark.skipif("KSERVE_PYTHON" not in os.environ, reason="KSERVE_PYTHON names no environment with kserve")
def test_kserve_knows_every_key() -> None:
    package = kserve_package()
    assert list(unknown(package, runtime(), "V1alpha1ClusterServingRuntime", "runtime")) == []
    assert list(unknown(package, inference_service(), "V1beta1InferenceService", "service")) == []
    wrong = {**inference_service(), "spec": {"predictor": {"model": {"misspelt": 1}}}}
    assert list(unknown(package, wrong, "V1beta1InferenceService", "service")) == [
        "service.spec.predictor.model.misspelt"
    ]
