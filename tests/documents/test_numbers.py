"""Every number in a setting's help and in the operator's guide is that of the code, the manifests or the data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from service.benchmarks.capacity import SHARE
from service.engine.factory import CALIBRATION_IMAGES
from service.errors import DeadlineExceeded, Overloaded, RateLimited, UnsupportedMediaType
from service.observability.tracing import PATIENCE_S
from service.settings import Settings, setting_docs
from service.web.inference import DIGITS
from tombola.cli import REFUSED

ROOT: Final = Path(__file__).parents[2]
BASE: Final = ROOT / "deploy" / "kubernetes" / "base"
NUMBER: Final = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
NAMES: Final = re.compile(r"IPv[46]|UTF-8|SHA-256|cuda:1|/v[12]|`TOMBOLA_[^`]*`|INT8_IMAGES|^\d\. ", re.MULTILINE)
OF_SETTINGS: Final[dict[str, set[float]]] = {
    "port": {0},  # what tests of whole servers use
    "admin_port": {0},
    "int8_images": {8},
    "threads": {0},
    "body_memory_bytes": {Overloaded.status},
    "pixel_memory_bytes": {Overloaded.status},
    "max_requests": {Overloaded.status},
    "max_queue_size": {Overloaded.status},
    "rate_images_per_s": {RateLimited.status, 0},
    "deadline_s": {DeadlineExceeded.status},
    "latency_quantum_ms": {0},
    "engine_restarts": {1},  # tests/service/test_lifecycle.py ends such a process
    "audits_queue": {429},  # tests/service/admin/test_audit_jobs.py fills it
    "grpc_port": {0},
    "log_requests": {5, Overloaded.status},  # 5xx
}


def numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in NUMBER.findall(NAMES.sub("", text))}


def test_every_number_in_a_setting_s_help_is_the_code_s() -> None:
    in_help = {row.name: numbers(row.meaning) for row in setting_docs()}
    assert {name: values for name, values in in_help.items() if values} == OF_SETTINGS


def test_words_for_numbers_in_a_setting_s_help_are_the_code_s() -> None:
    meaning = {row.name: row.meaning for row in setting_docs()}
    defaults = Settings()
    assert ("two decimals" in meaning["output_detail"]) == (DIGITS == 2)
    assert ("One full request" in meaning["rate_burst_images"]) == (defaults.rate_burst_images == defaults.max_images)
    assert ("embedded one" in meaning["library"]) == (defaults.library is None)


def manifest(name: str) -> Any:
    return yaml.safe_load((BASE / f"{name}.yaml").read_text("utf-8"))


def container() -> Any:
    return manifest("deployment")["spec"]["template"]["spec"]["containers"][0]


def objective(kind: str) -> float:
    """Per cent, from the recorded rule."""
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text("utf-8")
    (share,) = re.findall(rf"tombola:slo:{kind}_objective\n +expr: vector\(([\d.]+)\)", rules)
    return round(100 * float(share), 6)


def startup_minutes() -> float:
    probe = container()["startupProbe"]
    return float(probe["periodSeconds"] * probe["failureThreshold"] / 60)


OF_GUIDE: Final[dict[str, Callable[[], object]]] = {
    r"public plane\*\* \((\d+)\)": lambda: Settings().port,
    r"admin plane\*\* \((\d+)\)": lambda: Settings().admin_port,
    r"; exit (\d) \|": lambda: 0,  # tests/service/test_lifecycle.py
    r"\| exit (1) \| the engine died": lambda: 1,  # tests/service/test_lifecycle.py
    r"\| exit (\d) \| a setting": lambda: REFUSED,
    r"Another type gets (\d+)": lambda: UnsupportedMediaType.status,
    r"the manifests' (\d+) GiB": lambda: int(container()["resources"]["limits"]["memory"].removesuffix("Gi")),
    r"opens port (\d+)": lambda: Settings().grpc_port,
    r"u = ([\d.]+)": lambda: SHARE,
    r"\| (\d+) \| `maxReplicas`": lambda: manifest("hpa")["spec"]["maxReplicas"],
    r"`averageValue: (\d+)`": lambda: Settings().max_batch_size,
    r"`maxSurge: (\d+)`": lambda: manifest("deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"],
    r"`maxUnavailable: (\d+)`": lambda: manifest("poddisruptionbudget")["spec"]["maxUnavailable"],
    r"folder; (\d+) of them are used": lambda: CALIBRATION_IMAGES,
    r"Every ticket then runs in (8) bits": lambda: 8,
    r"([\d.]+) % of the requests do not fail": lambda: objective("availability"),
    r"([\d.]+) % of the answers take": lambda: objective("latency"),
}


def guide() -> str:
    """The operator's guide without code, links' targets and sections that a command writes."""
    text = (ROOT / "docs" / "OPERATING.md").read_text("utf-8")
    for written in (r"<!-- tombola bench.*?<!-- end -->", r"^```.*?^```", r"\]\([^)]*\)"):
        text = re.sub(written, "", text, flags=re.DOTALL | re.MULTILINE)
    return NAMES.sub("", text)


@pytest.mark.parametrize("pattern", OF_GUIDE)
def test_a_number_of_the_guide_is_the_one_that_is_true(pattern: str) -> None:
    stated = re.findall(pattern, guide())
    assert stated, pattern
    expected = OF_GUIDE[pattern]()
    assert [float(each) for each in stated] == [expected] * len(stated)


def test_the_guide_has_no_number_that_nothing_holds() -> None:
    text = guide()
    for pattern in OF_GUIDE:
        text = re.sub(pattern, "", text)
    lines = [line for line in text.splitlines() if NUMBER.search(line)]
    assert not lines, lines


def test_words_for_numbers_in_the_guide_are_true() -> None:
    text = guide()
    assert ("startup probe allows five minutes" in text) == (startup_minutes() == 5)
    assert ("within two seconds" in text) == (PATIENCE_S == 2)
    assert int(manifest("hpa")["spec"]["metrics"][0]["pods"]["target"]["averageValue"]) == Settings().max_batch_size
