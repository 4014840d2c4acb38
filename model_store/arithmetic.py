"""The arithmetic of figures: IEEE float32 and deterministic kernels on GPUs, for the whole process."""

import torch


def use_ieee_float32() -> None:
    """Turns TF32 off. torch uses it for convolutions by default, and its mantissa has float16's 10 bits."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def use_reproducible_arithmetic() -> None:
    """IEEE float32, and cuDNN's deterministic algorithms: equal calls give equal bits.

    Figures are measured in float32, and Muon's iteration goes astray in TF32.
    """
    use_ieee_float32()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
