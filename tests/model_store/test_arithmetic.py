"""The arithmetic of figures on GPUs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model_store.arithmetic import use_reproducible_arithmetic

cudnn: Any = torch.backends.cudnn
matmul: Any = torch.backends.cuda.matmul


@pytest.fixture
def fast_gpus() -> Iterator[None]:
    """The flags at their fast values; afterwards as they were. (monkeypatch cannot restore fp32_precision.)"""
    flags = (
        (cudnn.conv, "fp32_precision", "tf32"),
        (matmul, "fp32_precision", "tf32"),
        (cudnn, "deterministic", False),
        (cudnn, "benchmark", True),
    )
    before = [getattr(owner, name) for owner, name, _ in flags]
    for owner, name, value in flags:
        setattr(owner, name, value)
    yield
    for (owner, name, _), value in zip(flags, before, strict=True):
        setattr(owner, name, value)


@pytest.mark.usefixtures("fast_gpus")
def test_gpus_calculate_in_ieee_float32_and_in_the_same_bits() -> None:
    use_reproducible_arithmetic()
    assert (cudnn.conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
