"""What a GPU is used for: memory and utilisation, for the metrics."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GpuUsage:
    """memory_bytes: reserved by this process.  utilization: share of recent time in which the GPU ran anything."""

    memory_bytes: int
    utilization: float | None  # None without nvidia-ml-py


def gpu_usage(device: torch.device) -> GpuUsage:
    named: int | None = device.index
    index = torch.cuda.current_device() if named is None else named
    return GpuUsage(torch.cuda.memory_reserved(index), utilization(index))


def utilization(index: int) -> float | None:
    """0 to 1, as NVML reports it; None where nvidia-ml-py is not installed or the driver does not say."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:
        return None
