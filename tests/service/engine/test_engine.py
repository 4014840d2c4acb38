import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_store.ensemble import calibrated
from model_store.library import Library
from model_store.processor import has_bfloat16
from model_store.structures import multiply_adds
from service.cpu import affinity, usable_cores
from service.engine import base, levels, torch_engine
from service.engine import factory as engines
from service.engine.base import Images
from service.engine.errors import EngineRejected
from service.engine.factory import open_engine
from service.settings import Settings
from tests.support.serving import some_rows, tiny_library
from tests.support.tickets import CLASSES

openvino = pytest.importorskip("service.engine.openvino_engine")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module", params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest, small_library: Library, state: Path) -> base.Engine:
    """Both backends over all four structures."""
    settings = Settings(engine=request.param, precision="float32", state_dir=state, threads=2)
    return open_engine(small_library, settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("tiny"))


def expected(library: Library, member: int, images: Images) -> Any:
    with torch.inference_mode():
        return calibrated(library.tickets[member])(torch.from_numpy(images).float() / 255).numpy()


def test_logits_are_the_tickets_own_divided_by_their_temperature(engine: base.Engine, small_library: Library) -> None:
    images = some_rows(3)
    for member in range(len(small_library.tickets)):
        logits = engine.forward(member, images)
        assert logits.dtype == np.float32
        assert logits.shape == (3, 10)
        np.testing.assert_allclose(logits, expected(small_library, member, images), atol=2e-5)


def test_a_row_s_logits_do_not_depend_on_the_rows_beside_it(engine: base.Engine) -> None:
    images = some_rows(5, seed=1)
    together = engine.forward(0, images)
    alone = np.concatenate([engine.forward(0, images[[index]]) for index in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(("images", "expected"), [(1, [(0, 1)]), (2, [(0, 2)]), (5, [(0, 2), (2, 2), (4, 1)]), (0, [])])
def test_rows_are_run_in_pairs_and_what_is_left_alone(images: int, expected: list[tuple[int, int]]) -> None:
    assert list(openvino.split(images)) == expected


def test_the_warm_up_compares_every_batch_that_is_compiled() -> None:
    assert {size for _, size in openvino.split(engines.PROBES)} == set(openvino.BATCHES)


def test_one_ticket_may_be_run_by_several_threads_at_once(engine: base.Engine) -> None:
    batches = [some_rows(2, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda images: engine.forward(1, images), batches))
    for images, logits in zip(batches, results, strict=True):
        np.testing.assert_allclose(logits, engine.forward(1, images), atol=1e-6)


def test_the_answer_is_the_caller_s_to_keep(engine: base.Engine) -> None:
    first = engine.forward(0, some_rows(1, 1))
    before = first.copy()
    engine.forward(0, some_rows(1, 2))
    assert np.array_equal(first, before)


def test_the_engine_says_what_it_is_and_how_near_to_torch(engine: base.Engine, small_library: Library) -> None:
    assert engine.name in ("torch", "openvino")
    assert engine.device == "cpu"
    assert engine.threads == 2
    assert engine.difference <= base.TOLERANCE
    assert engine.macs == tuple(multiply_adds(ticket.structure, (32, 32)) for ticket in small_library.tickets)


def test_compiled_models_are_kept_on_disk(engine: base.Engine, state: Path) -> None:
    if engine.name == "openvino":
        assert len(list((state / "engine").rglob("*.blob"))) == 8 * len(openvino.BATCHES)


def test_compiled_models_are_found_again_by_the_same_library(tiny: Library, tmp_path: Path) -> None:
    settings = Settings(engine="openvino", precision="float32", state_dir=tmp_path, threads=2)
    open_engine(tiny, settings)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "engine").rglob("*.blob")}
    again = open_engine(tiny, settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "engine").rglob("*.blob")} == kept
    assert len(kept) == len(tiny.tickets) * len(openvino.BATCHES)
    assert again.difference <= base.TOLERANCE


def test_compiled_models_of_the_last_libraries_stay_and_the_rest_goes(tiny: Library, tmp_path: Path) -> None:
    settings = Settings(engine="openvino", state_dir=tmp_path)
    for place in range(engines.MAX_CACHED + 1):
        folder = tmp_path / "engine" / f"older-{place}"
        folder.mkdir(parents=True)
        os.utime(folder, (place, place))
    (tmp_path / "engine" / "without-a-folder.blob").touch()
    os.utime(tmp_path / "engine" / "without-a-folder.blob", (0, 0))
    open_engine(tiny, settings)
    left = {path.name for path in (tmp_path / "engine").iterdir()}
    assert left == {tiny.digest} | {f"older-{place}" for place in range(2, engines.MAX_CACHED + 1)}


def test_without_room_for_compiled_models_there_is_an_engine_all_the_same(tiny: Library, tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("where a folder should be")
    assert open_engine(tiny, Settings(engine="openvino", state_dir=tmp_path)).name == "openvino"


# Choosing


def test_auto_takes_openvino_on_a_cpu_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.resolve_backend("auto", torch.device("cpu")) == "openvino"
    assert engines.resolve_backend("auto", torch.device("cuda")) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert engines.resolve_backend("auto", torch.device("cpu")) == "torch"
    with pytest.raises(EngineRejected, match="not installed"):
        engines.resolve_backend("openvino", torch.device("cpu"))


def test_openvino_on_a_gpu_is_refused() -> None:
    with pytest.raises(EngineRejected, match="runs on the CPU, not on cuda"):
        engines.resolve_backend("openvino", torch.device("cuda"))


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(EngineRejected, match=f"device {device}: torch cannot use"):
        engines.resolve_device(device)


def wrong_once(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path | None]:
    """OpenVINO's first `times` backends give logits that are off."""
    build = openvino.build
    caches: list[Path | None] = []

    def spoiled(tickets: Any, *, cache: Path | None, **other: Any) -> base.Backend:
        caches.append(cache)
        backend: base.Backend = build(tickets, cache=cache, **other)
        if len(caches) > times:
            return backend
        return backend._replace(forward=lambda member, images: backend.forward(member, images) + np.float32(0.5))

    monkeypatch.setattr(openvino, "build", spoiled)
    return caches


def test_a_damaged_cache_is_passed_by(monkeypatch: pytest.MonkeyPatch, tiny: Library, tmp_path: Path) -> None:
    caches = wrong_once(monkeypatch, times=1)
    engine = open_engine(tiny, Settings(engine="openvino", state_dir=tmp_path))
    assert engine.name == "openvino"
    assert caches == [tmp_path / "engine" / tiny.digest, None]


def test_a_library_that_bfloat16_would_change_too_much_runs_in_float32(
    monkeypatch: pytest.MonkeyPatch, tiny: Library, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
    wrong_once(monkeypatch, times=2)  # with compiled models from disk, and without
    assert open_engine(tiny, Settings(engine="openvino", state_dir=tmp_path)).note.startswith("float32")


@pytest.mark.parametrize(
    ("requested", "backend", "processor_has_it", "expected"),
    [
        ("auto", "openvino", True, "bfloat16"),
        ("auto", "openvino", False, "float32"),
        ("auto", "torch", True, "float32"),
        ("float32", "openvino", True, "float32"),
        ("bfloat16", "openvino", True, "bfloat16"),
    ],
)
def test_the_precision_follows_processor_and_backend(
    requested: str, backend: str, processor_has_it: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda: processor_has_it)
    assert engines.resolve_precision(requested, backend, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("backend", "processor_has_it", "message"),
    [("torch", True, "the engine is torch on cpu"), ("openvino", False, "this processor does not multiply in it")],
)
def test_bfloat16_that_cannot_be_had_is_refused(
    backend: str, processor_has_it: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda: processor_has_it)
    with pytest.raises(EngineRejected, match=f"TOMBOLA_PRECISION bfloat16: .*{message}"):
        engines.resolve_precision("bfloat16", backend, torch.device("cpu"))


@pytest.mark.skipif(not has_bfloat16(), reason="needs a processor that multiplies in bfloat16")
def test_bfloat16_is_near_float32_and_really_another_arithmetic(small_library: Library, state: Path) -> None:
    exact, rounded = (
        open_engine(small_library, Settings(engine="openvino", precision=precision, state_dir=state, threads=2))
        for precision in ("float32", "bfloat16")
    )
    assert (exact.note[:7], rounded.note[:8]) == ("float32", "bfloat16")
    assert exact.difference < base.TOLERANCE < rounded.difference < base.BFLOAT16_TOLERANCE


def test_auto_falls_back_to_torch_when_logits_differ(
    monkeypatch: pytest.MonkeyPatch, tiny: Library, tmp_path: Path
) -> None:
    wrong_once(monkeypatch, times=9)
    assert open_engine(tiny, Settings(state_dir=tmp_path)).name == "torch"
    with pytest.raises(EngineRejected, match=r"engine openvino: logits of resnet\d\d-\d\d differ from torch's by"):
        open_engine(tiny, Settings(engine="openvino", state_dir=tmp_path))


def test_logits_that_are_not_numbers_are_refused(tiny: Library) -> None:
    tickets = tuple(base.fold_ticket(ticket) for ticket in tiny.tickets)
    backend = base.Backend(lambda _, images: np.full((len(images), 10), np.nan, np.float32), 1e-4, "")
    with pytest.raises(EngineRejected, match="nan"):
        engines.verify("broken", backend, tickets, 1)


def test_half_precision_is_near_enough_and_its_difference_is_measured(small_library: Library) -> None:
    """On the CPU, in the place of a GPU: the same code, the same rounding."""
    tickets = [base.fold_ticket(ticket) for ticket in small_library.tickets]
    half = torch_engine.on_device(tickets, torch.device("cpu"), torch.float16)
    worst = max(torch_engine.half_difference(half, index, ticket) for index, ticket in enumerate(tickets))
    assert 0 < worst < base.HALF_TOLERANCE


# 8 bits


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images as a file, to calibrate on."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    labels = np.arange(40) % len(CLASSES)
    np.savez(path, images=some_rows(40).transpose(0, 2, 3, 1), labels=labels)
    return path


def test_eight_bits_are_near_float_and_really_eight(small_library: Library, state: Path, labelled_file: Path) -> None:
    exact = open_engine(small_library, Settings(engine="openvino", precision="float32", state_dir=state, threads=2))
    rounded = open_engine(small_library, Settings(int8_images=labelled_file, state_dir=state, threads=2))
    assert rounded.note.startswith("int8")
    assert rounded.name == "openvino"
    assert exact.difference < base.TOLERANCE < rounded.difference < base.INT8_TOLERANCE
    images = some_rows(5)
    for member in range(len(small_library.tickets)):
        logits, expected = rounded.forward(member, images), exact.forward(member, images)
        assert 0 < base.max_relative_error(logits, expected) < base.INT8_TOLERANCE


def test_every_convolution_s_input_and_weights_are_rounded(small_library: Library) -> None:
    core = openvino.openvino.Core()
    for ticket in small_library.tickets:
        graph = openvino.graph(base.fold_ticket(ticket))
        model = openvino.quantize(core, graph, some_rows(40), openvino.ONE_CORE)
        for node in (node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"):
            sources = [node.input(place).get_source_output().get_node().get_type_name() for place in (0, 1)]
            assert sources == ["FakeQuantize", "FakeQuantize"]


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_a_range_holds_zero_as_one_of_its_levels(first: float, second: float) -> None:
    low, high = levels.with_zero(min(first, second), max(first, second))
    assert low <= 0 <= high
    assert low <= min(first, second) + 0.05 * (high - low)
    assert high >= max(first, second) - 0.05 * (high - low)
    level = -low / (high - low) * 255
    assert level == pytest.approx(round(level), abs=1e-6)


def test_eight_bits_want_openvino_and_images(tiny: Library, state: Path, labelled_file: Path) -> None:
    with pytest.raises(EngineRejected, match="8 bits are for OpenVINO on a CPU; the engine is torch"):
        open_engine(tiny, Settings(engine="torch", int8_images=labelled_file, state_dir=state))
    with pytest.raises(EngineRejected, match=r"TOMBOLA_INT8_IMAGES: nothing\.npz: no such file"):
        open_engine(tiny, Settings(int8_images=Path("nothing.npz"), state_dir=state))


# Cores


def test_openvino_runs_in_the_threads_it_is_called_from_and_no_more(engine: base.Engine) -> None:
    """A library of eight must not have eight tickets times all cores busy behind the scheduler's back."""
    before = threading.active_count()
    engine.forward(0, some_rows(4))
    assert threading.active_count() == before
    assert torch.get_num_threads() == 1


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (
            {  # the tightest quota on the way down to our own group counts
                "proc/self/cgroup": "0::/kubepods/pod1\n",
                "sys/fs/cgroup/kubepods/cpu.max": "600000 100000\n",
                "sys/fs/cgroup/kubepods/pod1/cpu.max": "400000 100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n",
                "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_threads_follow_the_container_s_quota(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cpu.affinity", lambda: 8)
    assert usable_cores(write(tmp_path, files)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_threads_follow_the_affinity() -> None:
    """Set in a thread of its own: on Linux affinity is a thread's."""

    def bound() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return affinity()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bound).result() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such a priority")
def test_a_process_can_set_idle_priority_for_everybody() -> None:
    words = "import os; from service.cpu import set_idle_priority; set_idle_priority(); print(os.sched_getscheduler(0))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert int(done.stdout) == os.SCHED_IDLE
