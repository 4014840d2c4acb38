"""The way from rows to answers. Where chance is the subject, a false alarm has odds of one in a million."""

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_store.ensemble import calibrated, ensemble_logits, probabilities
from model_store.library import Library
from model_store.policy import Policy, inclusion_probabilities
from service.cpu import NICE_INFERENCE
from service.engine.base import Engine, Images
from service.engine.factory import batch_limit, open_engine
from service.errors import DeadlineExceeded, Draining, EngineFailed, NotReady, Overloaded, RateLimited
from service.observability.metrics import PUBLISH_EVERY, Metrics
from service.scheduling.admission import FairQueue, RateLimiter, ThroughputEstimate
from service.scheduling.batch import (
    Batch,
    PendingRequest,
    ServedModel,
    combine_members,
    form_batch,
    partition,
    run_shard,
)
from service.scheduling.scheduler import DrawStatistics
from service.scheduling.worker_pool import WorkerPool
from service.settings import Settings
from tests.support.serving import Stand, engine, marks_its_members, some_rows, stand_in_library, with_scheduler
from tests.support.waiting import until_async

# The law: a batched answer is the solo answer


@pytest.fixture(scope="module")
def model(small_library: Library, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    exact = Settings(state_dir=tmp_path_factory.mktemp("state"), threads=2, precision="float32")
    made = open_engine(small_library, exact)
    return ServedModel(made, small_library.policy, len(small_library.classes))


def requests_of(*sizes: int, loop: asyncio.AbstractEventLoop) -> list[PendingRequest]:
    return [
        PendingRequest(some_rows(size, seed), "someone", loop.create_future(), 0.0)
        for seed, size in enumerate(sizes)
        if size
    ]


def run_all_shards(batch: Batch, threads: int = 2) -> None:
    for shard in partition(batch, threads):
        run_shard(shard, Metrics())


@settings(deadline=None, max_examples=8)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_batched_answer_equals_the_solo_answer_for_the_same_theta(
    sizes: list[int], model: ServedModel, small_library: Library
) -> None:
    loop = asyncio.new_event_loop()
    requests = requests_of(*sizes, loop=loop)
    batch = form_batch(model, [(request, index) for request in requests for index in range(request.size)])
    run_all_shards(batch)
    answers = combine_members(batch)
    for position, (request, index) in enumerate(batch.slots):
        members = [calibrated(small_library.tickets[member]) for member in batch.thetas[position].members]
        draw = torch.ones(1, len(members))
        with torch.inference_mode():
            image = torch.from_numpy(request.images[[index]]).float() / 255
            alone = probabilities(ensemble_logits(members, image, draw), draw.sum(dim=1))[0, 0].numpy()
        np.testing.assert_allclose(answers[position], alone, atol=1e-5)
    loop.close()


def test_a_batch_runs_each_drawn_ticket_once_and_the_costliest_first() -> None:
    calls: list[tuple[int, int]] = []

    def forward(member: int, images: Images) -> Any:
        calls.append((member, len(images)))
        return marks_its_members(member, images)

    made = Engine("stand-in", "cpu", 1, forward, (1, 50, 2, 3), (3, 32, 32), 0.0, "", 0.0)
    loop = asyncio.new_event_loop()
    (request,) = requests_of(20, loop=loop)
    batch = form_batch(ServedModel(made, Policy.all(4), 10), [(request, index) for index in range(20)])
    run_all_shards(batch)
    assert calls == [(1, 20), (3, 20), (2, 20), (0, 20)]
    loop.close()


def test_repeats_of_a_ticket_count_twice_but_run_once() -> None:
    policy = Policy(((0, 1),), 2, sizes=(0.0, 0.0, 1.0), replacement=True)
    loop = asyncio.new_event_loop()
    (request,) = requests_of(40, loop=loop)
    batch = form_batch(ServedModel(engine(tickets=2), policy, 10), [(request, index) for index in range(40)])
    run_all_shards(batch)
    answers = combine_members(batch)
    for row, theta in zip(answers, batch.thetas, strict=True):
        mean = np.zeros(10)
        for member in theta.members:
            mean[member] += 1 / 3
        np.testing.assert_allclose(row, np.exp(mean) / np.exp(mean).sum(), atol=1e-6)
    assert sum(len(task.indices) for task in batch.tasks) < 120
    loop.close()


def test_every_row_has_a_theta_of_its_own_and_every_ticket_its_share() -> None:
    """4,000 rows of equal images. Each share is within 4.9 standard deviations: false alarms under one in a million."""
    policy = Policy.over(["a"] * 3 + ["b"] * 3)
    images = np.zeros((400, 3, 32, 32), np.uint8)

    async def ask(stand: Stand) -> Counter[int]:
        counts: Counter[int] = Counter()
        for _ in range(10):
            for row in await stand.submit(images):
                counts.update(np.flatnonzero(row > row.min() * 1.01).tolist())
        return counts

    counts = with_scheduler(ask, policy=policy)
    for member, share in enumerate(inclusion_probabilities(policy)):
        assert abs(counts[member] - 4000 * share) < 4.9 * np.sqrt(4000 * share * (1 - share))


@pytest.mark.parametrize(
    ("queued", "running", "expected"), [(1, 0, 1), (3, 0, 2), (32, 0, 16), (16, 16, 16), (1, 16, 9), (512, 0, 32)]
)
def test_a_batch_takes_half_of_the_images_queued_or_running(queued: int, running: int, expected: int) -> None:
    """So that the engine runs one half while the answers to the other are read and asked again."""
    workers = WorkerPool(Settings(max_batch_size=32), Metrics(), lambda: None)
    workers.running = running
    source: Any = SimpleNamespace(queue=SimpleNamespace(length=queued), model=SimpleNamespace(engine=engine()))
    assert workers.batch_size(source) == expected


def test_no_row_counts_as_running_once_it_is_answered() -> None:
    async def ask(stand: Stand) -> None:
        await stand.submit(some_rows(40))
        assert stand.workers.running == 0

    with_scheduler(ask)


def test_answers_keep_the_order_of_the_rows_whatever_batches_they_ran_in() -> None:
    def class_of_the_first_pixel(_: int, images: Images) -> Any:
        return np.eye(10, dtype=np.float32)[images[:, 0, 0, 0] % 10]

    images = some_rows(50)

    async def ask(stand: Stand) -> Any:
        return await stand.submit(images)

    answers = with_scheduler(ask, forward=class_of_the_first_pixel, max_batch_size=8)
    assert answers.argmax(axis=1).tolist() == (images[:, 0, 0, 0] % 10).tolist()


# Fairness


class Waiter:
    def __init__(self, client: str, size: int) -> None:
        self.client, self.size, self.next_index = client, size, 0


def test_rows_of_many_requests_take_turns_by_client_then_by_request() -> None:
    queue: FairQueue[Waiter] = FairQueue()
    large, other, single = Waiter("a", 4), Waiter("a", 2), Waiter("b", 1)
    for waiter in (large, other, single):
        queue.push(waiter)
    names = {large: "large", other: "other", single: "single"}
    order = [f"{names[waiter]}{index}" for waiter, index in queue.take(99)]
    assert order == ["large0", "single0", "other0", "large1", "other1", "large2", "large3"]
    assert queue.length == 0


def test_a_single_image_passes_a_request_of_512() -> None:
    queue: FairQueue[Waiter] = FairQueue()
    queue.push(Waiter("a", 512))
    queue.take(32)
    single = Waiter("a", 1)
    queue.push(single)
    assert single in [waiter for waiter, _ in queue.take(2)]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=12),
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30),
)
def test_every_row_is_handed_out_once_or_dropped(pushed: list[tuple[str, int]], steps: list[tuple[int, bool]]) -> None:
    queue: FairQueue[Waiter] = FairQueue()
    waiters = [Waiter(client, size) for client, size in pushed]
    for waiter in waiters:
        queue.push(waiter)
    taken: list[tuple[Waiter, int]] = []
    dropped: set[Waiter] = set()
    for number, drop in steps:
        if drop and waiters:
            queue.drop(waiters[number % len(waiters)])
            dropped.add(waiters[number % len(waiters)])
        else:
            before = queue.length
            some = queue.take(number)
            assert len(some) == min(number, before)
            assert not {waiter for waiter, _ in some} & dropped
            taken += some
    taken += queue.take(queue.length)
    assert queue.length == 0
    assert not queue.clients
    assert not queue.length_by_client
    assert len(set(taken)) == len(taken)
    for waiter in waiters:
        if waiter not in dropped:
            assert [index for other, index in taken if other is waiter] == list(range(waiter.size))


def test_what_is_ahead_of_a_newcomer_follows_the_turns() -> None:
    queue: FairQueue[Waiter] = FairQueue()
    queue.push(Waiter("busy", 100))
    assert queue.images_until_last("busy", 1) == 101
    assert queue.images_until_last("newcomer", 1) == 2  # one turn of the other's, then its own
    assert queue.images_until_last("newcomer", 60) == 120
    assert queue.images_until_last("newcomer", 500) == 600  # no more than there is


# Admission


def blocked_by(release: threading.Event, entered: threading.Event | None = None) -> Any:
    """A forward that waits for the gate."""

    def forward(member: int, images: Images) -> Any:
        if entered is not None:
            entered.set()
        assert release.wait(30)
        return marks_its_members(member, images)

    return forward


def test_beyond_the_bound_rows_are_refused_with_a_time_to_come_back() -> None:
    release = threading.Event()

    async def overload(stand: Stand) -> None:
        first = stand.task(some_rows(6))
        await until_async(lambda: stand.admission.in_flight == 6)
        with pytest.raises(Overloaded) as refused:
            await stand.submit(some_rows(3))
        assert refused.value.status == 503
        assert refused.value.retry_after is not None
        assert refused.value.retry_after >= 1
        second = stand.task(some_rows(2))  # two still fit
        release.set()
        assert (await first).shape == (6, 10)
        assert (await second).shape == (2, 10)
        assert stand.admission.in_flight == 0
        assert stand.metrics.value("shed_total", reason="queue") == 1

    with_scheduler(overload, forward=blocked_by(release), max_queue_size=8, max_images=8)


def test_a_deadline_is_answered_while_the_engine_is_busy_and_the_rest_is_not_computed() -> None:
    release, entered = threading.Event(), threading.Event()
    images_run: list[int] = []

    def forward(member: int, images: Images) -> Any:
        entered.set()
        assert release.wait(30)
        images_run.append(len(images))
        return marks_its_members(member, images)

    async def late(stand: Stand) -> None:
        blocker = stand.task(some_rows(1))
        await until_async(entered.is_set)
        with pytest.raises(DeadlineExceeded) as passed:
            await stand.task(some_rows(5), within_s=0.05)
        assert passed.value.status == 504
        assert stand.admission.in_flight == 1
        assert stand.scheduler.queue.length == 0
        release.set()
        await blocker
        assert sum(images_run) <= 4  # the blocker's members

    with_scheduler(late, forward=forward, threads=1)


def test_a_deadline_that_has_passed_already_costs_nothing() -> None:
    async def late(stand: Stand) -> None:
        with pytest.raises(DeadlineExceeded):
            await stand.task(some_rows(1), within_s=-1.0)
        assert stand.admission.in_flight == 0

    with_scheduler(late)


def test_what_cannot_be_ready_in_time_is_refused_at_once() -> None:
    release = threading.Event()

    async def hopeless(stand: Stand) -> None:
        blocker = stand.task(some_rows(10))
        await until_async(lambda: stand.admission.in_flight == 10)
        stand.admission.throughput.seconds_per_image = 1.0
        for within_s in (5.0, 20.0):  # 11 s by the estimate: two fifths of the time have to do
            with pytest.raises(Overloaded) as refused:
                await stand.task(some_rows(1), within_s=within_s)
            assert refused.value.retry_after == 10
        sure = stand.task(some_rows(1), within_s=60.0)
        await until_async(lambda: stand.admission.in_flight == 11)
        release.set()
        await asyncio.gather(blocker, sure)

    with_scheduler(hopeless, forward=blocked_by(release))


def test_rows_of_a_cancelled_request_are_dropped_before_they_run() -> None:
    release, entered = threading.Event(), threading.Event()

    async def cancel(stand: Stand) -> None:
        blocker = stand.task(some_rows(1))
        await until_async(entered.is_set)
        gone = stand.task(some_rows(20))
        await until_async(lambda: stand.scheduler.queue.length == 20)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert stand.scheduler.queue.length == 0
        assert stand.admission.in_flight == 1
        release.set()
        await blocker
        assert stand.metrics.value("inference_images_total") == 1

    with_scheduler(cancel, forward=blocked_by(release, entered), threads=1)


def test_images_of_a_batch_are_skipped_once_nobody_waits_for_them() -> None:
    loop = asyncio.new_event_loop()
    gone, waiting = requests_of(2, 3, loop=loop)
    seen: list[int] = []

    def forward(member: int, images: Images) -> Any:
        seen.append(len(images))
        return marks_its_members(member, images)

    slots = [(gone, 0), (waiting, 0), (gone, 1), (waiting, 1), (waiting, 2)]
    batch = form_batch(ServedModel(engine(forward), Policy.all(4), 10), slots)
    gone.active = False
    run_all_shards(batch)
    assert seen == [3] * 4
    assert np.allclose(combine_members(batch)[[1, 3, 4]].sum(axis=1), 1)
    loop.close()


def test_a_client_s_rate_is_limited_and_the_others_are_not() -> None:
    async def flood(stand: Stand) -> None:
        await stand.submit(some_rows(4), client="greedy")
        with pytest.raises(RateLimited) as limited:
            await stand.submit(some_rows(4), client="greedy")
        assert limited.value.status == 429
        assert limited.value.retry_after == 400
        await stand.submit(some_rows(4), client="modest")
        assert stand.metrics.value("shed_total", reason="rate") == 1

    with_scheduler(flood, rate_images_per_s=0.01, rate_burst_images=4)


def test_a_token_bucket_fills_at_its_rate_up_to_its_burst() -> None:
    limiter = RateLimiter(rate=2.0, burst=10)
    assert limiter.wait_s("a", 10, now=0.0) == 0
    limiter.take("a", 10, now=0.0)
    assert limiter.wait_s("a", 4, now=0.0) == 2.0
    assert limiter.wait_s("a", 4, now=2.0) == 0
    limiter.take("a", 4, now=2.0)
    assert limiter.wait_s("a", 10, now=1000.0) == 0
    limiter.take("a", 10, now=1000.0)
    assert limiter.wait_s("a", 1, now=1000.0) == 0.5


def test_a_request_larger_than_the_burst_needs_a_full_bucket_and_leaves_a_debt() -> None:
    limiter = RateLimiter(rate=1.0, burst=4)
    assert limiter.wait_s("a", 10, now=0.0) == 0
    limiter.take("a", 10, now=0.0)
    assert limiter.wait_s("a", 1, now=0.0) == 7


def test_buckets_are_bounded_whoever_comes() -> None:
    limiter = RateLimiter(rate=1.0, burst=4)
    for number in range(10_050):
        limiter.take(str(number), 1, now=0.0)
    assert len(limiter.levels) == 10_000


def test_the_estimate_counts_time_that_batches_share_once() -> None:
    estimate = ThroughputEstimate()
    estimate.record(10, started_at=0.0, ended_at=1.0)
    assert estimate.seconds_per_image == pytest.approx(0.1)
    estimate.record(10, started_at=0.5, ended_at=2.0)  # began while the first was running
    assert estimate.seconds_per_image == pytest.approx(0.1)
    assert estimate.wait_s(50) == pytest.approx(5.0)
    assert estimate.retry_after_s(50) == 5
    assert estimate.retry_after_s(0) == 1


def test_the_event_loop_is_free_while_the_engine_works() -> None:
    release, entered = threading.Event(), threading.Event()

    async def other_work(stand: Stand) -> None:
        answer = stand.task(some_rows(1))
        await until_async(entered.is_set)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not answer.done()
        release.set()
        await answer

    with_scheduler(other_work, forward=blocked_by(release, entered))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_engine_threads_stand_back_for_the_event_loop() -> None:
    answers: list[int] = []

    def looks(member: int, images: Images) -> NDArray[np.float32]:
        answers.append(os.getpriority(os.PRIO_PROCESS, 0))
        return marks_its_members(member, images)

    async def looked(stand: Stand) -> None:
        await stand.submit(some_rows(1))
        assert set(answers) == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE_INFERENCE)}

    with_scheduler(looked, forward=looks)


def test_after_the_end_nothing_is_admitted() -> None:
    async def ended(stand: Stand) -> None:
        stand.workers.stop()
        with pytest.raises(Draining):
            await stand.submit(some_rows(1))

    with_scheduler(ended)


# Failures


def poisoned(member: int, images: Images) -> Any:
    """Fails on any batch with a row whose first pixel is 255; gives no number for one whose first pixel is 254."""
    if (images[:, 0, 0, 0] == 255).any():
        raise RuntimeError("a bad row")
    logits = marks_its_members(member, images)
    logits[images[:, 0, 0, 0] == 254] = np.nan
    return logits


@pytest.mark.parametrize("pixel", [254, 255])
def test_a_bad_row_fails_itself_and_not_its_neighbours(pixel: int) -> None:
    good, bad = np.zeros((6, 3, 32, 32), np.uint8), np.full((1, 3, 32, 32), pixel, np.uint8)

    async def mixed(stand: Stand) -> None:
        tasks = [stand.task(good), stand.task(bad), stand.task(good)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[1], EngineFailed)
        assert answers[1].status == 500
        for answer in (answers[0], answers[2]):
            assert not isinstance(answer, BaseException)
            assert np.isfinite(answer).all()
            assert np.allclose(answer.sum(axis=1), 1)
        assert stand.metrics.value("engine_retries_total") > 0
        assert stand.workers.healthy

    with_scheduler(mixed, forward=poisoned)


class Mortal:
    """A forward whose first `deaths` calls end their thread."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths

    def __call__(self, member: int, images: Images) -> Any:
        if self.deaths > 0:
            self.deaths -= 1
            raise SystemExit
        return marks_its_members(member, images)


def test_a_dead_engine_thread_fails_what_it_was_at_and_is_replaced() -> None:
    async def die(stand: Stand) -> None:
        with pytest.raises(EngineFailed):
            await stand.submit(some_rows(1))
        assert (await stand.submit(some_rows(3))).shape == (3, 10)
        assert stand.metrics.value("engine_restarts_total") == 1
        assert stand.workers.healthy
        assert len(stand.workers.workers) == 2

    with_scheduler(die, forward=Mortal(1))


def test_an_engine_that_keeps_dying_is_given_up_and_fails_everything_at_once() -> None:
    async def die(stand: Stand) -> None:
        answers = await asyncio.gather(*(stand.task(some_rows(4)) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(error, EngineFailed) for error in answers)
        await until_async(lambda: stand.broken == [True])
        assert not stand.workers.healthy
        assert stand.admission.in_flight == 0
        with pytest.raises(NotReady):
            await stand.submit(some_rows(1))

    with_scheduler(die, forward=Mortal(1000), engine_restarts=2, max_batch_size=4)


def test_a_new_thread_has_to_pass_the_probe_first() -> None:
    probes: list[int] = []

    async def die(stand: Stand) -> None:
        stand.workers.probe = lambda: probes.append(1)
        with pytest.raises(EngineFailed):
            await stand.submit(some_rows(1))
        await until_async(lambda: probes == [1])

    with_scheduler(die, forward=Mortal(1), threads=1)


def test_a_hanging_forward_is_given_up_and_its_late_result_thrown_away() -> None:
    release = threading.Event()
    calls = 0

    def hangs_once(member: int, images: Images) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert release.wait(30)
        return marks_its_members(member, images)

    async def hang(stand: Stand) -> None:
        with pytest.raises(EngineFailed):
            await stand.submit(some_rows(1))
        assert (await stand.submit(some_rows(2))).shape == (2, 10)
        release.set()
        assert (await stand.submit(some_rows(2))).shape == (2, 10)
        assert stand.metrics.value("engine_restarts_total") == 1

    with_scheduler(hang, forward=hangs_once, threads=1, engine_timeout_s=0.3)


# Several libraries, and what is told of the draws


def test_two_libraries_share_the_workers_and_a_forgotten_one_is_freed() -> None:
    async def swap(stand: Stand) -> None:
        other = stand.sibling(marks_its_members, Policy.fixed((7,), 9))
        mine, theirs = await asyncio.gather(
            stand.submit(some_rows(20)), other.submit(some_rows(20, 1), client="someone")
        )
        assert mine.argmax(axis=1).max() < 4
        assert set(theirs.argmax(axis=1).tolist()) == {7}
        forgotten = weakref.ref(other)
        del other
        await stand.submit(some_rows(4))  # the threads have moved on
        await until_async(lambda: gc.collect() >= 0 and forgotten() is None)

    with_scheduler(swap)


def test_draws_are_published_many_at_a_time() -> None:
    metrics, loop = Metrics(), asyncio.new_event_loop()
    draw_statistics = DrawStatistics(stand_in_library(Policy.all(4)), metrics)
    (request,) = requests_of(PUBLISH_EVERY - 1, loop=loop)
    slots = [(request, index) for index in range(PUBLISH_EVERY - 1)]
    draw_statistics.add(batch_of(slots))
    assert metrics.value("ensemble_size_count") == 0
    assert metrics.value("draws_total", structure="resnet18", density="0.5") == 0
    draw_statistics.add(batch_of(slots[:1]))
    assert metrics.value("ensemble_size_count") == PUBLISH_EVERY
    assert metrics.value("draws_total", structure="resnet18", density="0.5") == 4 * PUBLISH_EVERY
    loop.close()


def counts_around_a_lone_image(members: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every count of the metrics, told by a scrape after one image that so many tickets answered."""
    counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    async def ask(stand: Stand) -> None:
        await stand.submit(some_rows(1))
        for family in stand.metrics.registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_count", "_total")) and sample.name.startswith("tombola_"):
                    counts[sample.name, tuple(sorted(sample.labels.items()))] = sample.value

    with_scheduler(ask, policy=Policy.fixed(tuple(range(members)), 4))
    return counts


def test_a_scrape_after_one_image_does_not_tell_how_many_tickets_answered_it() -> None:
    alone, together = counts_around_a_lone_image(1), counts_around_a_lone_image(4)
    assert alone["tombola_inference_images_total", ()] == 1
    assert alone == together


def batch_of(slots: list[tuple[PendingRequest, int]]) -> Batch:
    return form_batch(ServedModel(engine(), Policy.all(4), 10), slots)


@pytest.mark.parametrize(("quantum_ms", "pauses"), [(0.0, False), (20.0, True)])
def test_answers_leave_on_the_quantum_when_there_is_one(
    quantum_ms: float, pauses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def ask(stand: Stand) -> None:
        async def note(seconds: float) -> None:
            waits.append(seconds)

        monkeypatch.setattr("service.scheduling.scheduler.asyncio.sleep", note)
        for passed_s in (0.001, 0.019, 0.020, 0.0213):
            await stand.scheduler.pad_latency(passed_s)

    with_scheduler(ask, latency_quantum_ms=quantum_ms)
    assert waits == (pytest.approx([0.019, 0.001, 0.0, 0.0187]) if pauses else [])


def test_an_engine_on_which_every_image_fails_dies_and_is_given_up() -> None:
    """As after an illegal access on CUDA: every later call raises, and only a new process helps."""

    def broken_for_good(_: int, __: Images) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def fail(stand: Stand) -> None:
        for _ in range(3):
            with pytest.raises(EngineFailed):
                await stand.submit(some_rows(2))
        await until_async(lambda: stand.broken == [True])
        assert stand.metrics.value("engine_restarts_total") == 3
        assert not stand.workers.healthy

    with_scheduler(fail, forward=broken_for_good, engine_restarts=2, threads=1)


def test_an_image_on_which_every_ticket_fails_does_not_end_the_engine() -> None:
    async def ask(stand: Stand) -> None:
        for _ in range(5):
            with pytest.raises(EngineFailed):
                await stand.submit(np.full((1, 3, 32, 32), 255, np.uint8))
        assert stand.metrics.value("engine_restarts_total") == 0
        assert stand.workers.healthy

    with_scheduler(ask, forward=poisoned)


def test_a_batch_on_cuda_is_larger_unless_the_setting_says_otherwise() -> None:
    assert batch_limit("cpu", Settings()) == 32
    assert batch_limit("cuda:1", Settings()) == 256
    assert batch_limit("cuda", Settings(max_batch_size=48)) == 48
