"""KServe's gRPC client against a server: python kserve_grpc_check.py HOST:PORT IMAGE. Prints JSON.

Runs in an environment of its own, which KSERVE_PYTHON names, since KServe pins what it depends on.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest  # type: ignore[import-not-found]

Shown = dict[str, Any]


def request(name: str, values: Any, datatype: str, *, binary: bool, model: str = "tombola") -> InferRequest:
    tensor = InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return InferRequest(model, [tensor], request_id="42")


async def shown(client: InferenceGRPCClient, sent: InferRequest) -> Shown:
    try:
        response = await client.infer(sent)
    except grpc.RpcError as error:
        return {"code": error.code().name, "text": error.details()}
    outputs = {output.name: output.as_numpy().astype(str).tolist() for output in response.outputs}
    return {"id": response.id, **outputs}


async def check(place: str, image: bytes) -> Shown:
    files, red = np.array([image, image], dtype=object), np.full((3, 3, 32, 32), 60, np.uint8)
    shares = (red / np.float32(255)).astype(np.float32)
    options = [("grpc.enable_http_proxy", 0)]
    async with InferenceGRPCClient(place, channel_args=options) as client:
        results: Shown = {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model": await client.is_model_ready("tombola"),
            "image": await shown(client, request("image", files, "BYTES", binary=True)),
            "no image": await shown(client, request("image", np.array([b"none"], object), "BYTES", binary=True)),
        }
        for binary in (False, True):
            results[f"uint8 {binary}"] = await shown(client, request("pixels", red, "UINT8", binary=binary))
            results[f"fp32 {binary}"] = await shown(client, request("pixels", shares, "FP32", binary=binary))
            wrong = request("pixels", red[:, :, 1:], "UINT8", binary=binary)
            results[f"shape {binary}"] = await shown(client, wrong)
        results["other"] = await shown(client, request("image", files, "BYTES", binary=True, model="other"))
    return results


if __name__ == "__main__":
    print(json.dumps(asyncio.run(check(sys.argv[1], Path(sys.argv[2]).read_bytes()))))
