"""Tickets in processes of their own: the real host and its forks, stopped, killed and forgotten."""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.library import Library
from service.cpu import NICE_INFERENCE, cpu_s, process_tree, resident_bytes
from service.engine.base import Engine
from service.engine.errors import EngineDied, EngineRejected
from service.engine.factory import open_engine, open_for_serving, uses_processes
from service.engine.ipc import (
    ERROR,
    RESULT,
    WORD,
    decode_request,
    decode_result,
    encode_error,
    encode_request,
    encode_result,
)
from service.observability.metrics import Metrics
from service.scheduling.batch import (
    PendingRequest,
    ServedModel,
    Shard,
    combine_members,
    form_batch,
    partition,
    run_shard,
)
from service.settings import Settings
from tests.support.serving import over_and_over, serving, some_rows, tiny_library
from tests.support.waiting import until
from tombola.sample_image import draw_sample

pytest.importorskip("service.engine.openvino_engine")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tickets get processes of their own on Linux alone")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny_library(tmp_path_factory.mktemp("tiny") / "library")


def settings(state: Path, **overrides: Any) -> Settings:
    return Settings(state_dir=state, threads=2, **overrides)


@pytest.fixture(scope="module")
def shared(tiny: Library, state: Path) -> Engine:
    """For tests that leave its processes alive."""
    return open_for_serving(tiny, settings(state))


@pytest.fixture
def engine(tiny: Library, state: Path, warm_start_once: None) -> Iterator[Engine]:
    """For tests that do not."""
    made = open_for_serving(tiny, settings(state, engine_timeout_s=1.0))
    yield made
    host = made.pids()[0]
    if alive(host):
        os.kill(host, signal.SIGKILL)


def workers(engine: Engine) -> list[int]:
    return process_tree(engine.pids()[0])[1:]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# What is said


@given(
    images=st.integers(1, 5),
    jobs=st.lists(st.tuples(st.integers(0, 39), st.lists(st.integers(0, 4), min_size=1, max_size=6)), min_size=1),
)
def test_a_question_is_understood_and_an_answer_read(images: int, jobs: list[tuple[int, list[int]]]) -> None:
    sent = some_rows(images)
    received, tasks = decode_request(encode_request(sent, jobs), (3, 32, 32))
    assert np.array_equal(received, sent)
    assert [(member, list(indices)) for member, indices in tasks] == jobs
    results = [
        (np.full((len(indices), 10), member, np.float32), 0.25 * place) for place, (member, indices) in enumerate(jobs)
    ]
    message = encode_result(results)
    assert message[: WORD.size] == WORD.pack(RESULT)
    for (logits, seconds), (expected, expected_s) in zip(
        decode_result(message[WORD.size :], jobs, 10), results, strict=True
    ):
        assert np.array_equal(logits, expected)
        assert seconds == expected_s


def test_one_picture_of_64_is_not_four_of_32() -> None:
    large = np.zeros((1, 3, 64, 64), np.uint8)
    received, _ = decode_request(encode_request(large, [(0, [0])]), (3, 64, 64))
    assert received.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"images of shape \[3, 64, 64\]; this engine takes \[3, 32, 32\]"):
        decode_request(encode_request(large, [(0, [0])]), (3, 32, 32))


def test_of_an_exception_only_its_type_is_said() -> None:
    assert encode_error(ValueError("secret")) == WORD.pack(ERROR) + b"ValueError"


# The engine


def test_openvino_runs_apart_and_everything_else_here(state: Path) -> None:
    assert uses_processes(settings(state))
    assert uses_processes(settings(state, engine="openvino"))
    assert not uses_processes(settings(state, engine="torch"))
    assert not uses_processes(settings(state, engine_processes=False))


def test_logits_are_those_of_this_process(shared: Engine, tiny: Library, state: Path) -> None:
    local = open_engine(tiny, settings(state))
    images = some_rows(5)
    jobs = [(member, [member, 4]) for member in range(4)]
    assert (shared.name, shared.macs, shared.threads) == (local.name, local.macs, local.threads)
    for (logits, seconds), (member, indices) in zip(shared.run(images, jobs, lambda: None), jobs, strict=True):
        np.testing.assert_allclose(logits, local.forward(member, images[indices]), atol=1e-6)
        np.testing.assert_allclose(logits, shared.forward(member, images[indices]), atol=1e-6)
        assert seconds > 0
    assert local.pids() == []
    assert len(workers(shared)) == 2


def test_a_ticket_that_raises_is_said_and_the_process_lives_on(shared: Engine) -> None:
    before = workers(shared)
    with pytest.raises(RuntimeError, match="IndexError"):
        shared.run(some_rows(1), [(99, [0])], lambda: None)
    assert shared.forward(0, some_rows(1)).shape == (1, 10)
    assert workers(shared) == before


def test_a_process_stands_back_for_the_event_loop(shared: Engine) -> None:
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in workers(shared)} == {min(19, os.nice(0) + NICE_INFERENCE)}


def test_no_secret_is_handed_on(tiny: Library, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_ADMIN_TOKEN", "a-secret-that-stays-here")
    made = open_for_serving(tiny, settings(state))
    for pid in made.pids():
        assert b"a-secret-that-stays-here" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert b"a-secret-that-stays-here" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_processes_share_one_copy_of_the_tickets(shared: Engine) -> None:
    def own_kb(pid: int) -> int:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    for pid in workers(shared):
        assert 1024 * own_kb(pid) < resident_bytes(pid) / 3


def test_a_process_that_is_killed_while_it_waits_costs_nobody_anything(engine: Engine) -> None:
    for pid in workers(engine):
        os.kill(pid, signal.SIGKILL)
        until(lambda gone=pid: not alive(gone))  # type: ignore[misc]
    assert engine.forward(0, some_rows(2)).shape == (2, 10)
    assert len(workers(engine)) == 1


def test_a_process_that_hangs_is_ended_and_another_takes_its_place(engine: Engine) -> None:
    stopped = workers(engine)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    for _ in stopped:
        with pytest.raises(EngineDied):
            engine.forward(0, some_rows(1))
    assert engine.forward(0, some_rows(1)).shape == (1, 10)
    until(lambda: not any(alive(pid) for pid in stopped))


def test_without_its_host_there_is_no_engine(engine: Engine) -> None:
    pids = engine.pids()
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(EngineDied):
        engine.forward(0, some_rows(1))


@pytest.mark.usefixtures("warm_start_once")
def test_a_forgotten_engine_ends_its_processes(tiny: Library, state: Path) -> None:
    made = open_for_serving(tiny, settings(state))
    pids = made.pids()
    assert len(pids) == 3
    del made
    gc.collect()
    until(lambda: not any(alive(pid) for pid in pids))


def test_what_the_processes_use_is_told(shared: Engine) -> None:
    before = sum(cpu_s(pid) for pid in shared.pids())

    def more() -> bool:
        shared.forward(0, some_rows(64))
        return sum(cpu_s(pid) for pid in shared.pids()) > before + 0.05

    until(more)
    assert resident_bytes(shared.pids()[0]) > 50e6
    assert (cpu_s(2**22 + 1), resident_bytes(2**22 + 1)) == (0, 0)


@pytest.mark.usefixtures("warm_start_once")
def test_a_library_that_changed_meanwhile_is_refused(state: Path, tmp_path: Path) -> None:
    first = tiny_library(tmp_path / "library")
    tiny_library(tmp_path / "library", seed=50)
    with pytest.raises(EngineRejected, match="changed while it was being opened"):
        open_for_serving(first, settings(state, engine="openvino"))


@pytest.mark.usefixtures("warm_start_once")
def test_what_a_host_refuses_is_said_in_its_words(tiny: Library, state: Path, tmp_path: Path) -> None:
    gone = tiny_library(tmp_path / "library")
    (tmp_path / "library" / "manifest.json").unlink()
    with pytest.raises(EngineRejected, match=r"manifest\.json"):
        open_for_serving(gone, settings(state, engine="openvino"))
    with pytest.raises(EngineRejected, match=r"nothing\.npz: no such file"):
        open_for_serving(tiny, settings(state, int8_images=Path("nothing.npz")))


def test_a_host_that_cannot_start_is_an_engine_refused_and_auto_takes_another(
    tiny: Library, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineRejected, match="ended with code 1 while it opened"):
        open_for_serving(tiny, settings(state, engine="openvino"))
    assert open_for_serving(tiny, settings(state)).name == "torch"


# The law, and the service


def test_a_batch_in_shards_gives_the_sums_of_one_shard(shared: Engine, tiny: Library, state: Path) -> None:
    loop = asyncio.new_event_loop()
    request = PendingRequest(some_rows(9), "someone", loop.create_future(), 0.0)
    indices = [(request, index) for index in range(9)]
    batch = form_batch(ServedModel(shared, tiny.policy, 10), indices)
    for shard in partition(batch, 3):
        run_shard(shard, Metrics())
    first = combine_members(batch)
    run_shard(Shard(batch, batch.tasks), Metrics())
    np.testing.assert_allclose(combine_members(batch), first, atol=1e-6)
    loop.close()


@pytest.mark.usefixtures("warm_start_once")
def test_the_service_swaps_its_processes_survives_the_death_of_each_under_load_and_leaves_none_behind(
    tiny: Library, tmp_path: Path
) -> None:
    flags = ("--engine", "openvino", "--threads", "2", "--engine-restarts", "100")
    with serving(tiny.path, tmp_path / "state", *flags) as process:
        pids = process_tree(process.process.pid)[1:]
        process.process.send_signal(signal.SIGHUP)
        until(lambda: process.metric('library_swaps_total{outcome="ok"}') == 1)
        until(lambda: not any(alive(pid) for pid in pids))  # the old library's have no more to do
        host, *first = process_tree(process.process.pid)[1:]
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in first} == {min(19, os.nice(0) + NICE_INFERENCE)}
        answers: list[int] = []
        with over_and_over(lambda: answers.append(process.classify(draw_sample())[0])):
            until(lambda: len(answers) > 10)
            for pid in first:
                os.kill(pid, signal.SIGKILL)
            seen = len(answers)
            until(lambda: len(answers) > seen + 50)
        assert set(answers[-20:]) == {200}
        assert answers.count(500) <= 2  # what each of the two was at
        assert process.ready()
        assert process.metric("engine_cpu_seconds_total") > 0
        assert process.metric("engine_resident_memory_bytes") > 0
        now = process_tree(host)
        assert not set(first) & set(now)
        assert process.end() == 0
    until(lambda: not any(alive(pid) for pid in now))


def test_a_service_that_is_told_to_end_does_not_wait_for_a_library_that_is_being_opened(
    tiny: Library, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tombola", "serve", "--port", "0", "--admin-port", "0", "--drain-delay-s", "0"]
    command += ["--library", str(tiny.path), "--state-dir", str(tmp_path), "--engine", "openvino"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        until(
            lambda: b"service.engine.fork_server" in Path(f"/proc/{process_tree(process.pid)[-1]}/cmdline").read_bytes()
        )
        host = process_tree(process.pid)[-1]
        os.kill(host, signal.SIGSTOP)  # it will be opening for ever
        try:
            assert process.stdout.readline() == "start    verifying the library\n"  # it listens, and heeds signals
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            os.kill(host, signal.SIGKILL)


@pytest.mark.usefixtures("warm_start_once")
def test_a_killed_service_leaves_no_process_behind(tiny: Library, tmp_path: Path) -> None:
    with serving(tiny.path, tmp_path / "state", "--engine", "openvino") as process:
        pids = process_tree(process.process.pid)
        assert len(pids) >= 3
        os.kill(pids[0], signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in pids[1:]))


@pytest.mark.usefixtures("warm_start_once")
def test_a_host_without_its_service_ends(tiny: Library, state: Path) -> None:
    ours, theirs = socket.socketpair()
    settings = {"state_dir": str(state), "threads": 1}
    words = json.dumps({"library": str(tiny.path), "settings": settings, "background": True})
    command = [sys.executable, "-m", "service.engine.fork_server", str(theirs.fileno()), words]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as host:
        theirs.close()
        ours.close()
        assert host.wait(timeout=60) == 0
