"""The operator's guide, the threat model and the security policy: names that exist, links that lead somewhere, figures
that are those of the data beside them, defaults that are the defaults."""

import json
import re
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from model_store.policy import expected_size
from service.benchmarks import capacity, output_leakage, rounding, timing_leakage
from service.observability.metrics import PREFIX, TABLE
from service.settings import OTHER_VARIABLES, setting_docs
from tests.support.serving import some_rows, tiny_library
from tombola.cli import main

ROOT: Final = Path(__file__).parents[2]
GUIDES: Final = [
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "deploy" / "RUNBOOK.md",
]
ALL: Final = [ROOT / "README.md", *GUIDES]
TABLES: Final = {
    "capacity.json": ("OPERATING.md", capacity.table),
    "latency.json": ("THREATS.md", timing_leakage.table),
    "rounding.json": ("OPERATING.md", rounding.table),
    "precision.json": ("THREATS.md", output_leakage.table),
}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def exposed() -> set[str]:
    """Names of series as queries write them."""
    parts = ("", "_bucket", "_sum", "_count")
    return {f"{PREFIX}{row.name}{part}" for row in TABLE for part in parts}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_every_setting_and_metric_that_a_page_names_exists(page: Path) -> None:
    variables = set(re.findall(r"\bTOMBOLA_[A-Z_]*[A-Z]\b", text(page)))
    assert variables <= {row.variable for row in setting_docs()} | OTHER_VARIABLES
    assert set(re.findall(r"\btombola_[a-z_]+[a-z]\b", text(page))) <= exposed()


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text(page))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_a_reader_of_the_readme_finds_every_guide() -> None:
    readme = text(ROOT / "README.md")
    assert all(f"({page.relative_to(ROOT)})" in readme for page in GUIDES)


def test_the_policy_s_defaults_are_the_defaults() -> None:
    stated = re.findall(r"`(TOMBOLA_\w+)` = ([\w.]+)", text(ROOT / "SECURITY.md"))
    defaults = {row.variable: row.default for row in setting_docs()}
    assert len(stated) >= 10
    assert stated == [(name, defaults[name]) for name, _ in stated]


def test_every_setting_that_bears_on_theta_is_in_the_threat_model_with_its_cost() -> None:
    section = text(ROOT / "docs" / "THREATS.md").split("## What each setting costs")[1]
    names = "OUTPUT_DETAIL TOP_K LATENCY_QUANTUM_MS MAX_BATCH_SIZE RATE_IMAGES_PER_S RATE_BURST_IMAGES API_KEYS_FILE"
    assert all(f"`TOMBOLA_{name}`" in section for name in [*names.split(), "MAX_IMAGES", "TRACING", "METRICS_OPEN"])


@pytest.mark.parametrize("figures", TABLES)
def test_the_tables_are_those_of_the_figures_beside_them(figures: str) -> None:
    page, table = TABLES[figures]
    assert table(json.loads(text(ROOT / "docs" / figures))) in text(ROOT / "docs" / page)


# Where the figures come from


def test_replicas_by_hand() -> None:
    """1,000 images/s of 3 ms keep 3 cores busy; replicas of 2 cores at 60 % have 1.2 of them each: 2.5, so 3."""
    assert capacity.replicas(1000, 3.0) == 3
    assert capacity.replicas(1, 3.0) == 1
    assert capacity.replicas(1_000_000, 2.4, cores=4, share=0.5) == 1200


def test_what_names_theta_right_by_hand() -> None:
    """Answer a: twice 1 and once 2; answer b: 3. Naming 1 and 3 is right three times out of four."""
    assert output_leakage.guess_accuracy([b"a", b"a", b"a", b"b"], [1, 1, 2, 3]) == 0.75


def test_more_digits_never_tell_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_leakage, "DRAWS", 500)
    library = tiny_library(tmp_path / "library")
    leaked = output_leakage.disclosure(library, torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    for what in ("theta", "n"):
        rates = [rates[what] for name, rates in leaked["guess_accuracy"].items() if name != "label"]
        assert rates == sorted(rates)
        assert (
            leaked["by_prior"][what]
            <= leaked["guess_accuracy"]["label"][what]
            <= leaked["guess_accuracy"]["full"][what]
        )
    assert leaked["guess_accuracy"]["full"]["theta"] == 1
    assert expected_size(library.policy) > 1


def test_what_eight_bits_change_is_measured_on_images_that_chose_no_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounding, "CALIBRATION_IMAGES", 30)
    library = tiny_library(tmp_path / "library")
    np.savez(tmp_path / "data.npz", images=some_rows(40).transpose(0, 2, 3, 1), labels=np.arange(40) % 10)
    measured, others = rounding.measured_images(tmp_path / "data.npz", library, 10)
    assert (len(measured), len(others)) == (10, 30)
    assert not {row.tobytes() for row in measured.pixels.numpy()} & {row.tobytes() for row in others}
    figures = tmp_path / "figures.json"
    command = [
        "bench",
        "rounding",
        "--library",
        str(library.path),
        "--state-dir",
        str(tmp_path / "state"),
        "--images",
        "10",
    ]
    assert main([*command, "--data", str(tmp_path / "data.npz"), "--json", str(figures)]) == 0
    assert "under PGD-20" in capsys.readouterr().out.splitlines()[-1]
    result = json.loads(figures.read_text())
    assert [row["ticket"] for row in result["tickets"]] == [entry.name for entry in library.entries]
    for row in result["tickets"]:
        for kind in ("clean", "pgd"):
            change = row[kind]["int8"]["accuracy"] - row[kind]["float32"]
            assert row[kind]["int8"]["difference"]["value"] == pytest.approx(change, abs=0.002)


def test_a_server_s_cost_is_measured_on_a_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library, page, figures = tiny_library(tmp_path / "library"), tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("before\n<!-- tombola bench capacity -->\nold\n<!-- end -->\nafter\n")
    words = ["bench", "capacity", "--library", str(library.path), "--engine", "torch", "--threads", "1"]
    words += ["--state-dir", str(tmp_path / "state"), "--images", "64", "--json", str(figures), "--into", str(page)]
    assert main(words) == 0
    result = json.loads(figures.read_text())
    assert result["one"]["images"] == 64
    assert result["one"]["cpu_ms"] > 0
    assert result["series"] > len(TABLE)
    assert page.read_text("utf-8") == f"before\n{capacity.table(result)}\n<!-- end -->\nafter\n"
    assert "processor time" in capsys.readouterr().out.splitlines()[-1]
