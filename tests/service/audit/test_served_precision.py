"""What an audit says of a service that rounds: it attacks float32, and measures what rounding changes."""

import re
from pathlib import Path

import numpy as np
import pytest

from service.audit.attack_runner import AuditRun, RunOptions
from service.audit.checks import model
from service.audit.checks.base import CheckContext
from service.audit.config import Audit
from tests.support.audit_models import faint_digits, tiny

pytest.importorskip("openvino")


def test_a_service_in_8_bits_is_a_warning_that_says_what_they_change(tmp_path: Path) -> None:
    """By the engine's own answers, on clean and on attacked images."""
    images = faint_digits(40)
    calibration = tmp_path / "calibration.npz"
    np.savez(calibration, images=images.pixels.permute(0, 2, 3, 1).numpy(), labels=images.labels.numpy())
    library = tiny(tmp_path / "library", ("resnet18",))
    audit = Audit("standard", images=5, attacks=("eot-mean-loss",), epsilons=(8.0,))
    run = AuditRun(tmp_path / "audit", audit, library, faint_digits(5), RunOptions(int8_images=calibration))
    run.attack()
    result = model.same_model(CheckContext(run))
    assert (result.ok, result.warn) == (False, True)
    assert re.search(
        r"served in 8 bits, audited in float32: logits within [1-9]\.\de-0[1-3], "
        r"accuracy [+-]\d+\.\d\d points on 5 clean images, [+-]\d+\.\d\d points on 5 attacked images",
        result.value,
    )
