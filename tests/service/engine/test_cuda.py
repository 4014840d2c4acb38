"""What CUDA changes for the engine. No GPU is needed: FakeTensorMode raises where two devices meet, as CUDA would."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from model_store.library import Library
from service.engine import factory, gpu, torch_engine
from service.engine.base import Engine, FoldedTicket, Images, Logits, fold_ticket, reference_logits
from service.engine.errors import EngineRejected
from service.library_manager import LibraryManager, niceness
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.serving import engine, some_rows, tiny_library

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("tiny") / "library", structures=("resnet18", "wideresnet32"))


@pytest.fixture(scope="module")
def folded(tiny: Library) -> list[FoldedTicket]:
    """Made before any test has fake tensors, so that their weights are real."""
    return [fold_ticket(ticket) for ticket in tiny.tickets]


@pytest.fixture
def fake_cuda(folded: list[FoldedTicket]) -> Iterator[FakeTensorMode]:
    del folded
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def fake_networks(tickets: Sequence[FoldedTicket], dtype: torch.dtype) -> torch_engine.Networks:
    """The engine's networks with fake CUDA tensors. `Module.to` cannot swap in tensors of another type by itself."""
    with unset_fake_temporarily():  # storages of real tensors cannot be copied under the mode
        tickets = deepcopy(list(tickets))
    previous = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with patch.object(torch_engine, "deepcopy", lambda network: network):
            return torch_engine.on_device(tickets, CUDA, dtype)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.__future__.set_swap_module_params_on_conversion(previous)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 5, torch_engine.MAX_BATCH + 1])
def test_every_tensor_of_a_forward_pass_is_on_the_gpu_and_logits_come_back(
    folded: list[FoldedTicket], fake_cuda: FakeTensorMode, dtype: torch.dtype, count: int
) -> None:
    del fake_cuda
    networks = fake_networks(folded, dtype)
    for member in range(len(folded)):
        pixels = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        assert networks.run(member, pixels.to(CUDA)).device.type == "cuda"
        logits = networks.forward_tensor(member, pixels)
        assert (logits.device.type, logits.dtype, logits.shape) == ("cpu", torch.float32, (count, 10))


def test_a_tensor_that_stays_on_the_cpu_is_noticed(folded: list[FoldedTicket], fake_cuda: FakeTensorMode) -> None:
    """The test above can fail."""
    del fake_cuda
    networks = fake_networks(folded, torch.float32)
    with pytest.raises(Exception, match="device"):
        networks.run(0, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.fixture
def tf32() -> Iterator[None]:
    """The backends at TF32; afterwards as they were. (monkeypatch cannot restore these attributes.)"""
    backends: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32"
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.usefixtures("tf32")
def test_float32_is_ieee_once_cuda_is_used(monkeypatch: pytest.MonkeyPatch, tiny: Library) -> None:
    """TF32 has float16's mantissa: with it float32 could never pass where float16 did not."""
    on_cpu = torch_engine.on_device
    monkeypatch.setattr(
        torch_engine, "on_device", lambda tickets, _, dtype: on_cpu(tickets, torch.device("cpu"), dtype)
    )
    torch_engine.build([fold_ticket(ticket) for ticket in tiny.tickets], device=CUDA)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_images_that_overflow_float16_are_run_again_in_float32(tiny: Library) -> None:
    tickets = [fold_ticket(ticket) for ticket in tiny.tickets]
    images = some_rows(3)

    def half(_: int, images: Images) -> Logits:
        logits = np.zeros((len(images), 10), np.float32)
        logits[1] = np.inf
        return logits

    logits = torch_engine.rerun_overflow(half, tickets)(0, images)
    exact = reference_logits(tickets[0], images[[1]])
    np.testing.assert_array_equal(logits[1], exact[0])
    np.testing.assert_array_equal(logits[[0, 2]], 0)


# Choosing the device


def stand_in(device: str, seconds: float) -> Engine:
    def forward(_: int, images: Images) -> Logits:
        time.sleep(seconds)
        return np.zeros((len(images), 10), np.float32)

    made = engine(forward, threads=1)
    return Engine(**{name: getattr(made, name) for name in made.__dataclass_fields__} | {"device": device})


def opener(**engines: Engine | None) -> Callable[[Settings], Engine]:
    def open_candidate(settings: Settings) -> Engine:
        made = engines[settings.device]
        if made is None:
            raise EngineRejected("missing")
        return made

    return open_candidate


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    monkeypatch.setattr(factory, "MEASURE_S", 0.05)
    return [Settings().model_copy(update=dict(choice)) for choice in factory.CHOICES]


@pytest.mark.parametrize(("cuda_s", "cpu_s", "expected"), [(0.0005, 0.02, "cuda"), (0.05, 0.0005, "cpu")])
def test_auto_takes_the_device_that_answers_more_and_names_both_figures(
    tiny: Library, candidates: list[Settings], cuda_s: float, cpu_s: float, expected: str
) -> None:
    steps: list[str] = []
    engines = opener(cuda=stand_in("cuda", cuda_s), cpu=stand_in("cpu", cpu_s))
    fastest = factory.open_fastest(tiny, candidates, engines, steps.append)
    assert fastest.device == expected
    assert "cuda" in fastest.note
    assert "cpu" in fastest.note
    assert steps[-1].endswith(f"using {expected}")


def test_auto_takes_the_other_device_where_one_is_rejected(tiny: Library, candidates: list[Settings]) -> None:
    engines = opener(cuda=None, cpu=stand_in("cpu", 0.0))
    assert factory.open_fastest(tiny, candidates, engines, lambda _: None).device == "cpu"
    with pytest.raises(EngineRejected, match="neither"):
        factory.open_fastest(tiny, candidates, opener(cuda=None, cpu=None), lambda _: None)


def test_a_device_or_an_engine_that_was_named_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not factory.chooses_by_speed(Settings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert factory.chooses_by_speed(Settings())
    named: list[dict[str, Any]] = [{"device": "cpu"}, {"engine": "torch"}, {"int8_images": Path("images")}]
    for values in named:
        assert not factory.chooses_by_speed(Settings(**values))


def test_threads_that_launch_what_a_gpu_runs_keep_their_priority() -> None:
    assert niceness(stand_in("cuda", 0.0)) == 0
    assert niceness(stand_in("cpu", 0.0)) > 0


class FakeNvml:
    """nvidia-ml-py, as far as it is used."""

    class NVMLError(Exception): ...

    def __init__(self, *, works: bool = True) -> None:
        self.works = works

    def nvmlInit(self) -> None:  # noqa: N802 -- the library's name
        if not self.works:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        assert handle == "GPU-1234"
        return SimpleNamespace(gpu=37)


@pytest.mark.parametrize(("nvml", "expected"), [(FakeNvml(), 0.37), (FakeNvml(works=False), None), (None, None)])
def test_a_gpu_s_memory_and_utilisation_are_measured(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, expected: float | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 100 + index)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    assert gpu.gpu_usage(torch.device("cuda:2")) == gpu.GpuUsage(102, expected)


def test_a_gpu_s_usage_is_among_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.library_manager.gpu_usage", lambda _: gpu.GpuUsage(1000, 0.5))
    metrics = Metrics()
    LibraryManager(Settings(), metrics).update_gpu_metrics("cuda")
    assert metrics.value("gpu_memory_bytes") == 1000
    assert metrics.value("gpu_utilization_ratio") == 0.5


def test_a_missing_gpu_does_not_fail_the_constructor() -> None:
    """The start then ends with one line and exit code 2, as for any library that cannot be opened."""
    assert LibraryManager(Settings(device="cuda:99"), Metrics()).current is None
