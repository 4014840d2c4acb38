"""What several tests of audits share."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from service.audit import plan
from service.audit.profiles import REACH


@pytest.fixture(scope="module")
def quick_audits() -> Iterator[None]:
    """torch's own convolutions, faster than oneDNN's on few pictures and channels; and fewer steps at large epsilons,
    whose sixty are most of a smoke audit's time."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "REACH", replace(REACH, steps=12))
        yield
    torch.backends.mkldnn.enabled = before
