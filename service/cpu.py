"""The cores this process may use (its affinity and its container's quota), priorities, and what processes use."""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
# Niceness, lowest first: event loop, inference, library loading, audits. The event loop must come first: requests that
# it has not read yet cannot be refused.
NICE_INFERENCE: Final = 5
NICE_LOADING: Final = 10
NICE_AUDIT: Final = 19
SET_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG


def lower_priority(steps: int) -> None:
    """Lowers the priority of the calling thread by so many steps of `nice`. Threads that it starts inherit it.

    Only Linux has priorities of threads.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # forbidden in some sandboxes: slower under overload, no reason to fail
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + steps)


def set_idle_priority() -> None:
    """SCHED_IDLE: the calling process runs only on otherwise idle cores. Only Linux has it.

    `nice 19` is not enough: such a process still finishes its time slice.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants, where the system lists them."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(member for child in children for member in process_tree(child))]


def cpu_s(pid: int) -> float:
    """Processor time of a process; 0 for one that is gone, or where the system does not say."""
    fields = " ".join(lines(Path(f"/proc/{pid}/stat"))).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, shared pages included; 0 as above."""
    fields = words(Path(f"/proc/{pid}/statm"))
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def free_memory_bytes(root: Path = ROOT) -> float:
    """What may still be allocated: by the system, and within the limit of our container. Infinite if neither says."""
    free = [
        float(fields[1]) * 1024 for fields in map(str.split, lines(root / "proc/meminfo")) if "MemAvailable:" in fields
    ]
    for folder in groups(root / "sys/fs/cgroup", own_group(root, "0::")):
        limit, used = words(folder / "memory.max"), words(folder / "memory.current")
        if limit and used and limit[0] != "max":
            statistics = dict(line.split() for line in lines(folder / "memory.stat"))
            reclaimable = float(statistics.get("inactive_file", 0))  # cached files give way
            free.append(max(0.0, float(limit[0]) - float(used[0]) + reclaimable))
    return min(free, default=math.inf)


def die_with_parent(number: int) -> None:
    """Sends this process the signal when the thread that started it ends (PR_SET_PDEATHSIG). Only Linux has it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, number)


def usable_cores(root: Path = ROOT) -> int:
    """At least 1. A quota of 1.5 cores counts as 2: two threads that are throttled a little beat one."""
    quotas = [*cgroup_v2_quotas(root), *cgroup_v1_quotas(root)]
    return max(1, min([affinity(), *(math.ceil(quota) for quota in quotas)]))


def affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_v2_quotas(root: Path) -> Iterator[float]:
    """cgroup v2: cpu.max ("<quota> <period>" in microseconds, or "max <period>") of our group and all above it."""
    for folder in groups(root / "sys/fs/cgroup", own_group(root, "0::")):
        fields = words(folder / "cpu.max")
        if len(fields) == 2 and fields[0] != "max":
            yield float(fields[0]) / float(fields[1])


def cgroup_v1_quotas(root: Path) -> Iterator[float]:
    """cgroup v1: cpu.cfs_quota_us (-1: none) over cpu.cfs_period_us."""
    for folder in groups(root / "sys/fs/cgroup/cpu", own_group(root, ":cpu,cpuacct:", ":cpu:", ":cpuacct,cpu:")):
        quota, period = words(folder / "cpu.cfs_quota_us"), words(folder / "cpu.cfs_period_us")
        if quota and period and float(quota[0]) > 0:
            yield float(quota[0]) / float(period[0])


def own_group(root: Path, *marks: str) -> str:
    """Our group's path, from the lines of /proc/self/cgroup such as `0::/user.slice` or `4:cpu,cpuacct:/docker/ab`."""
    for line in lines(root / "proc/self/cgroup"):
        for mark in marks:
            if mark in line:
                return line.split(mark, 1)[1].strip("/")
    return ""


def groups(top: Path, own: str) -> Iterator[Path]:
    """`top`, then each folder on the way down to our group. Inside a container only `top` may be there."""
    yield top
    folder = top
    for part in Path(own).parts:
        folder /= part
        yield folder


def words(path: Path) -> list[str]:
    return " ".join(lines(path)).split()


def lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def trim_heap() -> None:
    """Gives free memory back to the system, where the C library can: glibc keeps what many threads have freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
