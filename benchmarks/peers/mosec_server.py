"""mosec, batched: one worker a core. Started with mosec's own flags; variables: BENCH_CORES, BENCH_BATCH."""

import importlib
import os
from typing import Any

from benchmarks.peers.defence import Defence, decode

mosec: Any = importlib.import_module("mosec")


class Classify(mosec.Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        self.defence = Defence()

    def deserialize(self, data: bytes) -> Any:
        return decode(data)

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        return self.defence.answer(data)


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(
        Classify,
        num=int(os.environ["BENCH_CORES"]),
        max_batch_size=int(os.environ["BENCH_BATCH"]),
        max_wait_time=int(os.environ["BENCH_WAIT_MS"]),
    )
    server.run()
