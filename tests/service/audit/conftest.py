"""What several tests of audits share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def native_convolutions() -> Iterator[None]:
    """torch's own convolutions: on a handful of pictures and channels they take less than half of oneDNN's time."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    yield
    torch.backends.mkldnn.enabled = before
