"""What processes use, and what they give back."""

import ctypes
import os
import sys

import pytest

from service.cpu import resident_bytes, trim_heap

BLOCK = 1 << 15  # below glibc's threshold for pages of their own
BLOCKS = 2048


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_below_a_block_that_is_still_used_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    *freed, kept = blocks
    for block in freed:
        libc.free(block)
    before = resident_bytes(os.getpid())
    trim_heap()
    after = resident_bytes(os.getpid())
    libc.free(kept)
    assert before - after > BLOCK * BLOCKS // 2
