"""Audits on CUDA. No GPU is needed: see tests/support/pretend_cuda.py. Figures are those of the CPU, bit for bit."""

import random
import re
import shutil
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from model_store.json_object import Json
from model_store.library import Library
from model_store.policy import Policy
from model_store.processor import has_bfloat16
from service.audit import attack_runner, plan
from service.audit.attack_runner import AuditRun, RunOptions
from service.audit.checks import attacks, model, report
from service.audit.checks.base import CheckContext, evaluate_check
from service.audit.checks.run import CHECKS
from service.audit.config import Audit, ProfileName
from service.audit.evaluation.draws import draws_of
from service.audit.evaluation.members import CandidateSet, Member
from service.audit.evaluation.scoring import score_exactly, scores
from service.audit.profiles import PROFILES, REACH, Profile
from service.audit.run import run_audit
from service.settings import Settings
from tests.support.audit_models import faint_digits, small_cnn, tiny, undefended
from tests.support.pretend_cuda import pretend_cuda

pytestmark = pytest.mark.usefixtures("quick_audits")
IMAGES: Final = 5
FEW: Final = 3  # steps, restarts, probes: of whatever an attack counts
PROBES: Final = 40  # of a query attack; with fewer HopSkipJump never begins


def shorten(settings: Any) -> Any:
    """An attack's settings with every count made small."""
    numbers = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if type(getattr(settings, field.name)) is int
    }
    return replace(settings, **{name: min(n, PROBES if name == "probes" else FEW) for name, n in numbers.items()})


def shorten_profile(profile: Profile) -> Profile:
    """The same attacks and checks, each as short as it can be."""
    values = {field.name: getattr(profile, field.name) for field in fields(profile)}
    small: dict[str, Any] = {name: min(n, IMAGES) for name, n in values.items() if type(n) is int}
    for name, value in values.items():
        if isinstance(value, tuple) and value and isinstance(value[0], tuple) and is_dataclass(value[0][1]):
            small[name] = tuple((attack, shorten(settings)) for attack, settings in value)
    return replace(profile, **small)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, profile in PROFILES.items():
        monkeypatch.setitem(PROFILES, name, shorten_profile(profile))
    monkeypatch.setattr(plan, "REACH", shorten(REACH))
    monkeypatch.setattr(attack_runner, "has_bfloat16", lambda: False)  # which CUDA is compared with
    for module in (model, attacks, report):
        monkeypatch.setattr(module, "PROBE", shorten(model.PROBE))


def audit_two(folder: Path, profile: ProfileName, device: torch.device) -> AuditRun:
    """An audit of two small networks, one of which is drawn for each image."""
    torch.manual_seed(0)
    networks = [deepcopy(network).to(device) for network in (undefended(), small_cnn().eval().requires_grad_(False))]
    library = tiny(folder / "library", ("resnet18",))
    members = tuple(Member(entry.name, network, 1.0) for entry, network in zip(library.entries, networks, strict=True))
    law = Policy.switching([0, 1], 2)
    candidates = CandidateSet(members, 2, ("resnet18", "resnet18"), law, device)
    audit = Audit(profile, images=IMAGES, epsilons=(4.0, 8.0))
    return AuditRun(
        folder / "audit", audit, library, faint_digits(IMAGES), RunOptions(device=str(device)), candidates=candidates
    )


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "smoke"])  # its attacks are in the others
def test_every_attack_of_a_profile_runs_on_cuda(profile: ProfileName, tmp_path: Path) -> None:
    on_cpu = audit_two(tmp_path / "cpu", profile, torch.device("cpu"))
    on_cpu.attack()
    with pretend_cuda() as cuda:
        on_cuda = audit_two(tmp_path / "cuda", profile, cuda)
        weights = [weight for member in on_cuda.candidates.members for weight in member.network.parameters()]
        assert {weight.device for weight in weights} == {cuda}
        on_cuda.attack()
    for one, other in zip(on_cpu.outcomes, on_cuda.outcomes, strict=True):
        assert torch.equal(one.pixels, other.pixels), one.step.id
        assert torch.equal(one.logits, other.logits), one.step.id


def test_every_check_runs_on_cuda_and_finds_the_same(tmp_path: Path) -> None:
    on_cpu = audit_two(tmp_path / "cpu", "standard", torch.device("cpu"))
    on_cpu.attack()
    expected = evaluate_all(on_cpu)
    shutil.copytree(tmp_path / "cpu" / "audit", tmp_path / "cuda" / "audit")  # the attacks are not run again
    with pretend_cuda() as cuda:
        on_cuda = audit_two(tmp_path / "cuda", "standard", cuda)
        on_cuda.attack()
        assert evaluate_all(on_cuda) == expected


def evaluate_all(run: AuditRun) -> list[Json]:
    """The table of checks, whatever they find."""
    context = CheckContext(run)
    return [evaluate_check(check, context) for check in CHECKS]


def test_exact_scores_are_computed_on_the_gpu() -> None:
    """Every state of a law over three groups; the members' logits come from the CPU, where they are stored."""
    law = Policy.over(["a", "a", "b", "b", "c", "c"])
    draws = draws_of(law, 100, random.Random(0))
    logits, labels = torch.randn(6, 4, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    on_cpu = score_exactly(scores(logits, labels, draws), logits, labels, law)
    with pretend_cuda() as cuda:
        on_cuda = score_exactly(scores(logits, labels, draws.to(cuda)), logits, labels, law, device=cuda)
        assert {on_cuda.right.device.type, on_cuda.any_wrong.device.type} == {"cpu"}
    assert torch.equal(on_cpu.right, on_cuda.right)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny(tmp_path_factory.mktemp("library"), ("resnet18",))


def attacked(library: Library, folder: Path, device: str, **options: Any) -> CheckContext:
    audit = Audit("standard", images=IMAGES, attacks=("eot-mean-loss",), epsilons=(8.0,))
    run = AuditRun(folder, audit, library, faint_digits(IMAGES), RunOptions(device=device, **options))
    run.attack()
    return CheckContext(run)


def test_a_gpu_s_half_precision_is_a_warning_that_says_what_it_changes(library: Library, tmp_path: Path) -> None:
    """The audit is compared with the float32 engine; the difference of what is served is measured, not failed."""
    on_cpu = model.same_model(attacked(library, tmp_path / "cpu", "cpu", precision="float32"))
    assert on_cpu.ok, on_cpu.value
    with pretend_cuda():
        result = model.same_model(attacked(library, tmp_path / "cuda", "cuda"))
    assert (result.ok, result.warn) == (False, True)
    assert re.search(
        r"served in float16, audited in float32: logits within [1-9]\.\de-0[34], "
        r"accuracy [+-]\d\.\d\d points on 5 clean images, [+-]\d\.\d\d points on 5 attacked images",
        result.value,
    )


@pytest.mark.skipif(not has_bfloat16(), reason="needs a processor that multiplies in bfloat16")
def test_a_processor_s_bfloat16_is_such_a_warning_too(library: Library, tmp_path: Path) -> None:
    result = model.same_model(attacked(library, tmp_path, "cpu"))
    assert (result.ok, result.warn) == (False, True)
    assert "served in bfloat16, audited in float32: logits within" in result.value


def test_an_engine_that_differs_in_float32_fails_the_audit(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = attacked(library, tmp_path, "cpu")
    logits = model.engine_logits(library, context.pixels, Settings(state_dir=tmp_path, precision="float32"))
    assert isinstance(logits, torch.Tensor)
    monkeypatch.setattr(model, "engine_logits", lambda *_, **__: logits * (1 + 1e-4))
    result = model.same_model(context)
    assert (result.ok, result.warn) == (False, False)


def test_a_whole_audit_has_the_same_report_on_cuda(library: Library, tmp_path: Path) -> None:
    audit, data = Audit("smoke", images=IMAGES, epsilons=(8.0,)), faint_digits(IMAGES)
    expected = run_audit(tmp_path / "cpu", audit, library, data)
    with pretend_cuda():
        assert run_audit(tmp_path / "cuda", audit, library, data, RunOptions(device="cuda")).digest == expected.digest
    assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
