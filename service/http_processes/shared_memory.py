"""Memory that the service and one HTTP process share: the pixels of a request, and then its answer in their place."""

import fcntl
import math
import mmap
import os
from bisect import bisect_left
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ALIGNMENT: Final = 64  # bytes; a cache line
GIVE_BACK_BYTES: Final = 1 << 20  # a free range of so many bytes gives its pages back to the system
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # no reader can meet a missing page


def create_shared_memory(size: int) -> int:
    """The descriptor of so many bytes of zeros without a name. Pages that nobody has written take no memory."""
    descriptor = os.memfd_create("tombola-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


class SharedMemory:
    """One process's view of it. A range is written by the HTTP process, then by the service, never by both at once."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor."""
        self.map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        os.close(descriptor)

    def array(self, start: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A view. Raises ValueError for what is not all inside."""
        return np.frombuffer(self.map, dtype, math.prod(shape), start).reshape(shape)

    def give_back(self, start: int, end: int) -> None:
        """Whole pages between these bytes are zeros again and take no memory."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        self.map.madvise(mmap.MADV_REMOVE, first, last - first)


class RangeAllocator:
    """Ranges of the memory that are taken: the first one that fits, so that the pages in use stay few."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken: list[tuple[int, int]] = []  # (start, end), sorted

    def take(self, size: int) -> int | None:
        """The start of a range of so many bytes; None where no gap is large enough."""
        wanted, position = -(-size // ALIGNMENT) * ALIGNMENT, 0
        for index, (start, end) in enumerate(self.taken):
            if start - position >= wanted:
                self.taken.insert(index, (position, position + wanted))
                return position
            position = end
        if self.size - position < wanted:
            return None
        self.taken.append((position, position + wanted))
        return position

    def free(self, start: int) -> int:
        """Frees a range that was taken; its end."""
        return self.taken.pop(bisect_left(self.taken, (start, start)))[1]
