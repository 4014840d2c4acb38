"""Ranges of the memory that the service shares with an HTTP process."""

import mmap
import os
import random

import numpy as np
import pytest

from service.http_processes.shared_memory import GIVE_BACK_BYTES, RangeAllocator, SharedMemory, create_shared_memory


def test_what_one_view_writes_the_other_reads() -> None:
    descriptor = create_shared_memory(1 << 16)
    first, second = SharedMemory(os.dup(descriptor)), SharedMemory(descriptor)
    first.array(128, (2, 3), np.float32)[:] = [[1, 2, 3], [4, 5, 6]]
    assert second.array(128, (2, 3), np.float32).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(("start", "shape"), [(-64, (8,)), (1 << 16, (1,)), ((1 << 16) - 4, (2,))])
def test_a_view_outside_of_it_is_refused(start: int, shape: tuple[int, ...]) -> None:
    memory = SharedMemory(create_shared_memory(1 << 16))
    with pytest.raises(ValueError, match=r"offset|buffer"):
        memory.array(start, shape, np.float32)


def test_nobody_can_shrink_it_under_a_reader() -> None:
    descriptor = create_shared_memory(1 << 16)
    with os.fdopen(descriptor, "r+b") as file, pytest.raises(PermissionError):
        os.ftruncate(file.fileno(), 0)


def test_pages_that_are_given_back_take_no_memory_and_read_as_zeros() -> None:
    descriptor = create_shared_memory(2 * GIVE_BACK_BYTES)
    kept = os.dup(descriptor)
    memory = SharedMemory(descriptor)
    memory.array(0, (2 * GIVE_BACK_BYTES,), np.uint8)[:] = 1
    assert os.fstat(kept).st_blocks * 512 == 2 * GIVE_BACK_BYTES
    memory.give_back(100, GIVE_BACK_BYTES)
    whole = memory.array(0, (2 * GIVE_BACK_BYTES,), np.uint8)
    assert os.fstat(kept).st_blocks * 512 == GIVE_BACK_BYTES + mmap.PAGESIZE
    assert set(whole[: mmap.PAGESIZE]) == {1}
    assert set(whole[mmap.PAGESIZE : GIVE_BACK_BYTES]) == {0}
    assert set(whole[GIVE_BACK_BYTES:]) == {1}
    os.close(kept)


def test_ranges_are_the_first_that_fit() -> None:
    ranges = RangeAllocator(64 * 10)
    assert [ranges.take(64), ranges.take(65), ranges.take(1)] == [0, 64, 192]
    assert ranges.free(64) == 192
    assert ranges.take(129) == 256  # the gap of 128 is too small
    assert ranges.take(128) == 64
    assert ranges.take(64 * 10) is None


def test_ranges_never_overlap_and_the_memory_is_whole_again_at_the_end() -> None:
    rng, ranges = random.Random(7), RangeAllocator(1 << 14)
    taken: dict[int, int] = {}
    refused = 0
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            start = rng.choice(list(taken))
            assert ranges.free(start) >= start + taken.pop(start)
            continue
        size = rng.randrange(1, 2000)
        start_or_none = ranges.take(size)
        if start_or_none is None:
            refused += 1
            continue
        assert start_or_none + size <= 1 << 14
        assert all(start_or_none + size <= start or start + length <= start_or_none for start, length in taken.items())
        taken[start_or_none] = size
    assert refused > 0
    for start in taken:
        ranges.free(start)
    assert ranges.take(1 << 14) == 0
