"""Models of strangers: what is accepted as it is, and what is refused with what was found and expected."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_store.input_spec import CIFAR10_INPUT
from service.audit.api import audit, from_arrays
from service.audit.command import INVALID
from service.audit.errors import AuditRejected, DataRejected, ModelFailed
from service.audit.report.model import digest_holds
from service.audit.target import Target, count_multiply_adds
from tests.support.audit_models import faint_digits, small_cnn, undefended
from tombola.cli import main


class Answers(nn.Module):
    """A network whose answer is given."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def linear(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :10]


def raising(_: Tensor) -> Tensor:
    raise RuntimeError("shapes do not\nmatch")


BAD: dict[str, tuple[nn.Module, str]] = {
    "raises": (Answers(raising), r"raises RuntimeError: shapes do not match for images \[4, 3, 32, 32\]"),
    "nan": (Answers(lambda images: linear(images) * float("nan")), "not finite numbers; expected logits"),
    "wrong shape": (
        Answers(lambda images: images.flatten(1)[:, :7]),
        r"answers \[4, 7\] to 4 images; expected \[4, 10\]",
    ),
    "one row": (Answers(lambda images: linear(images)[:1]), r"answers \[1, 10\]"),
    "no tensor": (Answers(lambda images: (linear(images),)), "answers a tuple; expected a tensor"),
    "probabilities": (Answers(lambda images: linear(images).softmax(dim=1)), "probabilities; expected logits"),
    "labels": (Answers(lambda images: linear(images).round().long()), "not finite numbers|expected logits"),
    "train mode": (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 10)), "in train mode .* call .eval()"),
    "random": (Answers(lambda images: linear(images + torch.rand_like(images))), "equal calls differ by .* a law"),
    "batch": (Answers(lambda images: linear(images - images.mean(dim=0))), "with the others of its batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_models_that_cannot_be_measured_are_refused(name: str) -> None:
    network, text = BAD[name]
    with pytest.raises(AuditRejected, match=text) as refusal:
        Target.from_torch(network, 10, name=name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": []}, "expected a torch module or a list"),
        ({"model": "resnet"}, "expected a torch module"),
        ({"classes": 1}, "at least 2"),
        ({"law": "median"}, "expected one of one, mean"),
        ({"mean": (0.5,)}, "three numbers each"),
        ({"std": (1, 0, 1)}, "deviations above 0"),
    ],
)
def test_requests_that_mean_nothing_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(AuditRejected, match=text):
        Target.from_torch(**{"model": Answers(linear), "classes": 10, **arguments})


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("nothing", "expected package.module:factory"),
        ("no.such.module:make", "cannot be imported .ModuleNotFoundError"),
        ("tests.service.audit.test_target:missing", "cannot be imported .AttributeError"),
        ("tests.service.audit.test_target:broken_factory", "raises ZeroDivisionError"),
        ("tests.service.audit.test_target:DIGITS", "raises TypeError"),
    ],
)
def test_factories_that_cannot_be_called_are_refused(reference: str, text: str) -> None:
    with pytest.raises(AuditRejected, match=text):
        Target.from_factory(reference, 10)


DIGITS = 10


def broken_factory() -> nn.Module:
    return [][1 // 0]


def make_network() -> nn.Module:
    return undefended()


def test_a_factory_s_model_is_the_same_target_as_the_model() -> None:
    made = Target.from_factory("tests.service.audit.test_target:make_network", 10)
    assert made.digest == Target.from_torch(undefended(), 10).digest
    torch.manual_seed(1)
    assert made.digest != Target.from_torch(small_cnn().eval(), 10).digest


def test_normalisation_goes_into_the_model() -> None:
    images = torch.rand(2, 3, 32, 32)
    (network,) = Target.from_torch(Answers(linear), 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)).networks
    assert torch.allclose(network(images), linear((images - 0.5) / 0.2))  # the first ten pixels are red's


def test_multiply_adds_are_counted_by_hand() -> None:
    """A layer of 3072 to 10 numbers is 30,720 of them."""
    assert count_multiply_adds(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), (32, 32)) == 30_720


def make_wide_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 64, 3)).eval()


def test_a_model_of_another_size_is_audited_where_its_size_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", "--model", "tests.service.audit.test_target:make_wide_network"]
    (tmp_path / "classes").write_text("a\nb\nc\n")
    np.savez(tmp_path / "own.npz", images=np.zeros((6, 48, 64, 3), np.uint8), labels=np.arange(6) % 3)
    words += ["--classes", str(tmp_path / "classes"), "--data", str(tmp_path / "own.npz"), "--out", str(tmp_path / "a")]
    words += ["--profile", "smoke", "--images", "3", "--attacks", "fgsm", "--epsilons", "8"]
    assert main(words) == 2  # 32x32 where nobody says
    assert "mat1 and mat2 shapes cannot be multiplied" in capsys.readouterr().err
    assert main([*words, "--size", "48x"]) == 2
    assert capsys.readouterr().err.startswith("tombola: --size 48x: expected a side such as 64, or 48x64")
    assert main([*words, "--size", "48x64"]) in (0, INVALID)
    assert "model tests.service.audit.test_target:make_wide_network" in capsys.readouterr().out
    assert main(["audit", "--size", "64", "--profile", "smoke"]) == 2
    assert "--size is for models of other kinds; a library says its own size" in capsys.readouterr().err


def test_weights_that_would_be_unpickled_are_refused() -> None:
    with pytest.raises(AuditRejected, match=r"expected a \.safetensors file"):
        Target.from_timm("resnet18", Path("weights.pth"), 10)


def test_a_model_is_audited_from_images_to_report(tmp_path: Path) -> None:
    """An undefended network: right on most clean digits, on none under attack. What needs a library is skipped."""
    target = Target.from_torch(undefended(), 10, name="digits-cnn")
    digits = faint_digits(8)
    report = audit(target, data=(digits.pixels, digits.labels), profile="smoke", epsilons=[8], out=tmp_path, threads=1)
    assert report.clean.value >= 0.75
    assert report.robust.value <= 0.1
    assert report.library.tickets == ["digits-cnn"]
    assert report.library.digest == target.digest
    (same,) = [check for check in report.checks if check.id == 3]
    assert same.outcome == "skipped"
    assert "library" in same.value
    assert digest_holds(json.loads((tmp_path / "report.json").read_text("utf-8")))
    assert "digits-cnn" in (tmp_path / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "digits.onnx"
    options: dict[str, Any] = {"input_names": ["images"], "dynamic_axes": {"images": {0: "n"}}, "opset_version": 13}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of opset 13 is the older one
        torch.onnx.export(undefended(), (torch.rand(1, 3, 32, 32),), str(path), dynamo=False, **options)
    return path


def test_a_model_and_its_onnx_file_have_the_same_figures(onnx_file: Path, tmp_path: Path) -> None:
    digits = faint_digits(8)
    arguments: dict[str, Any] = {"data": (digits.pixels, digits.labels), "profile": "smoke", "epsilons": [2, 8]}
    first = audit(Target.from_torch(undefended(), 10), out=tmp_path / "torch", threads=1, **arguments)
    second = audit(Target.from_onnx(onnx_file, 10), out=tmp_path / "onnx", threads=1, **arguments)
    assert first.clean == second.clean
    assert abs(first.robust.value - second.robust.value) <= 1 / 8
    assert [check.outcome for check in first.checks] == [check.outcome for check in second.checks]


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_files_that_are_no_onnx_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AuditRejected, match=r"model\.onnx: cannot be converted to torch"):
        Target.from_onnx(path, 10)


class FailsLater(nn.Module):
    """Answers so many images, then breaks in a way of its own."""

    def __init__(self, network: nn.Module, answers: int, breakage: Any) -> None:
        super().__init__()
        self.network, self.left, self.breakage = network, answers, breakage
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.left -= len(images)
        logits: Tensor = self.network(images)
        return logits if self.left >= 0 else self.breakage(logits)


@pytest.mark.parametrize(
    ("breakage", "text"),
    [(raising, "digits-cnn: raises RuntimeError: shapes do not match"), (lambda logits: logits / 0 * 0, "not finite")],
)
def test_a_model_that_fails_in_the_middle_keeps_what_was_measured(breakage: Any, text: str, tmp_path: Path) -> None:
    digits = faint_digits(4)
    arguments: dict[str, Any] = {"data": (digits.pixels, digits.labels), "profile": "smoke", "epsilons": [8]}
    arguments |= {"out": tmp_path, "threads": 1}
    broken = Target.from_torch(FailsLater(undefended(), 60, breakage), 10, name="digits-cnn")
    with pytest.raises(ModelFailed, match=text) as failure:
        audit(broken, **arguments)
    assert "\n" not in str(failure.value)
    kept = set((tmp_path / "attacks").glob("*.npz"))
    assert kept
    mended = Target.from_torch(FailsLater(undefended(), 10**9, breakage), 10, name="digits-cnn")
    assert mended.digest == broken.digest
    report = audit(mended, **arguments)
    assert kept < set((tmp_path / "attacks").glob("*.npz"))
    assert report.clean.value >= 0.75


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (np.zeros((2, 8, 8, 3)), [0, 1], r"float64 \[2, 8, 8, 3\]; expected uint8"),
        (np.zeros((2, 8, 8), np.uint8), [0, 1], "expected uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], "expected 2 whole numbers"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 1.5], "expected 2 whole numbers"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 10], "labels from 0 to 10; expected 0 to 9"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], "at least one"),
    ],
)
def test_arrays_of_other_kinds_are_refused(images: Any, labels: Any, text: str) -> None:
    with pytest.raises(DataRejected, match=text):
        from_arrays(images, labels, tuple("0123456789"), CIFAR10_INPUT)
