"""What /v2/models/stats counts: requests of the Open Inference Protocol, over HTTP and gRPC and in all processes."""

import time
from dataclasses import dataclass, field


@dataclass
class InferenceStatistics:
    """Requests by their end, "success" or "fail". seconds: of all such requests together.

    Answers show whole seconds: exact times would tell a client how many tickets answered it.

    images: of the requests that succeeded.  last_ms: when the last one ended, in Unix time, whole seconds.
    """

    counts: dict[str, int] = field(default_factory=lambda: {"success": 0, "fail": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"success": 0.0, "fail": 0.0})
    images: int = 0
    last_ms: int = 0

    def note(self, kind: str, seconds: float) -> None:
        self.counts[kind] += 1
        self.seconds[kind] += seconds
        self.last_ms = int(time.time()) * 1000

    def add(self, other: "InferenceStatistics") -> None:
        """What another process has counted."""
        for kind, count in other.counts.items():
            self.counts[kind] += count
            self.seconds[kind] += other.seconds[kind]
        self.images += other.images
        self.last_ms = max(self.last_ms, other.last_ms)

    def clear(self) -> None:
        for kind in self.counts:
            self.counts[kind], self.seconds[kind] = 0, 0.0
        self.images = 0
