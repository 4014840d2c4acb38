"""An audit and the operating system: its process starts and ends, and the share of the CPU that it can expect."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from service.cpu import NICE_AUDIT

NICENESS: Final = NICE_AUDIT  # serving keeps its latency: an audit gets what is left
GRACE_S: Final = 5.0  # from SIGTERM to SIGKILL
LEAST_SHARE: Final = 0.05  # below it an estimate of the time means nothing
SMOOTHING: Final = 0.2  # weight of the newest reading
PROC_STAT: Final = Path("/proc/stat")


def spawn(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """Starts the process of one audit at low priority, with its output in worker.log."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "agg"}
    environment = {name: value for name, value in environment.items() if not name.startswith("TOMBOLA_ADMIN_TOKEN")}
    command = [sys.executable, "-m", "service.admin.audit_worker", str(folder), str(NICENESS)]
    with (folder / "worker.log").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)  # noqa: S603


def terminate(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL if it does not end."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


class CpuShare:
    """How much of the cores that audits may use other processes leave them: readings of /proc/stat, smoothed."""

    def __init__(self, threads: int, stat: Path = PROC_STAT) -> None:
        self.threads, self.stat = threads, stat
        self.last = (time.monotonic(), self.free_seconds())
        self.share = 1.0

    def free_seconds(self) -> float | None:
        """Idle core seconds since the start of the machine, with those of processes of low priority, as audits are."""
        try:
            fields = self.stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        except OSError:
            return None  # another system than Linux: the share stays 1
        return sum(int(fields[column]) for column in (2, 4, 5)) / os.sysconf("SC_CLK_TCK")  # nice, idle, iowait

    def update(self) -> float:
        """Takes a reading. Returns the share, from LEAST_SHARE to 1."""
        now, free = time.monotonic(), self.free_seconds()
        before, free_before = self.last
        if free is not None and free_before is not None and now - before >= 0.5:
            reading = (free - free_before) / ((now - before) * self.threads)
            self.share += SMOOTHING * (min(1.0, reading) - self.share)
            self.last = now, free
        return max(LEAST_SHARE, self.share)
