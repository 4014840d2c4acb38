"""Which build of torch `make` installs, by the driver that is there and what the index lists."""

import pytest

from tools import choose_torch

LISTED = {
    "torch": ["2.15.0+cpu", "2.14.0", "2.13.0+cpu", "2.12.0+cpu", "2.12.0", "2.9.0+cpu", "2.13.0+cu130"],
    "torchvision": ["0.30.0+cpu", "0.29.0", "0.28.1+cpu", "0.28.0+cpu", "0.27.0+cpu"],
}

BOUNDS = {"torch": ((2, 10), (2, 15)), "torchvision": ((0, 25), (0, 30))}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver, before an index that lists CPU builds beside others."""
    monkeypatch.setattr(choose_torch, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(choose_torch, "listed_versions", LISTED.__getitem__)
    monkeypatch.setattr(choose_torch, "bounds", lambda package: BOUNDS[package])


def test_without_a_driver_the_newest_cpu_builds_that_are_allowed_and_belong_together() -> None:
    constraints, reason = choose_torch.choose("auto")
    assert constraints == ["torch==2.13.0+cpu", "torchvision==0.28.1+cpu"]
    assert "no NVIDIA driver" in reason


def test_with_a_driver_the_index_s_own_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_torch, "has_nvidia_driver", lambda: True)
    assert choose_torch.choose("auto")[0] == []
    assert choose_torch.choose("cpu")[0] == ["torch==2.13.0+cpu", "torchvision==0.28.1+cpu"]


def test_an_index_without_cpu_builds_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_torch, "listed_versions", lambda _: ["2.14.0", "2.13.0"])
    constraints, reason = choose_torch.choose("auto")
    assert constraints == []
    assert "lists no CPU wheels" in reason


def test_a_torchvision_for_cuda_never_comes_beside_a_torch_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be imported there. The newest pair that is whole is taken, or none."""
    listed = {"torch": ["2.13.0+cpu", "2.12.0+cpu"], "torchvision": ["0.28.0", "0.27.0+cpu"]}
    monkeypatch.setattr(choose_torch, "listed_versions", listed.__getitem__)
    assert choose_torch.choose("cpu")[0] == ["torch==2.12.0+cpu", "torchvision==0.27.0+cpu"]
    listed["torchvision"] = ["0.28.0", "0.27.0"]
    assert choose_torch.choose("cpu")[0] == []


def test_the_choice_can_be_overridden() -> None:
    assert choose_torch.choose("default")[0] == []


def test_a_choice_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["choose_torch.py", "gpu"])
    assert choose_torch.main() == 2
    assert capsys.readouterr().err == "TORCH=gpu: expected one of auto, cpu, default\n"


def test_a_release_without_its_suffixes() -> None:
    assert choose_torch.release("2.13.0+cpu") == (2, 13, 0)
    assert choose_torch.release("2.13.0rc1") == (0,)
