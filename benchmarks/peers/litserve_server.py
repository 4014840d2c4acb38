"""LitServe, batched: one worker a core, its faster queue. Arguments: PORT CORES. Variable: BENCH_BATCH.

LitServe takes JSON or forms, so the image travels as base64.
"""

import base64
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.defence import Defence, decode

ls: Any = importlib.import_module("litserve")


class Classify(ls.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        del device
        self.defence = Defence()

    def decode_request(self, request: dict[str, str]) -> Any:
        return decode(base64.b64decode(request["image"]))

    def batch(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs

    def predict(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        return self.defence.answer(images)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Classify(
        max_batch_size=int(os.environ["BENCH_BATCH"]), batch_timeout=float(os.environ["BENCH_WAIT_MS"]) / 1000
    )
    cores = int(sys.argv[2])
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=cores, timeout=30, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
        generate_client_file=False,
        num_api_servers=1,
    )
