"""Triton's gRPC clients against a server: python triton_check.py HOST:PORT IMAGE. Prints JSON.

A process of its own, since Triton's definition of the protocol and ours have one package name.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as blocking
import tritonclient.grpc.aio as nonblocking
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException


def inputs(api: Any, image: bytes) -> dict[str, Any]:
    files = api.InferInput("image", [2], "BYTES").set_data_from_numpy(np.array([image, image], dtype=object))
    integers = np.full((3, 3, 32, 32), 60, np.uint8)
    pixels = api.InferInput("pixels", [3, 3, 32, 32], "UINT8").set_data_from_numpy(integers)
    floats = (integers / np.float32(255)).astype(np.float32)
    shares = api.InferInput("pixels", [3, 3, 32, 32], "FP32").set_data_from_numpy(floats)
    return {"image": files, "uint8": pixels, "fp32": shares}


def shown(result: Any) -> dict[str, Any]:
    names = [output.name for output in result.get_response().outputs]
    values = {name: result.as_numpy(name) for name in names}
    decode = np.vectorize(bytes.decode, otypes=[object])
    return {name: (decode(array) if array.dtype == object else array).tolist() for name, array in values.items()}


def refusal(error: InferenceServerException) -> list[str]:
    return [str(error.status()), str(error.message())]


def synchronous(url: str, image: bytes) -> dict[str, Any]:
    with blocking.InferenceServerClient(url) as client:
        results: dict[str, Any] = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model": client.is_model_ready("tombola", "1"),
            "metadata": client.get_server_metadata(as_json=True)["name"],
            "inputs": [each["name"] for each in client.get_model_metadata("tombola", as_json=True)["inputs"]],
        }
        for name, tensor in inputs(blocking, image).items():
            results[name] = shown(client.infer("tombola", [tensor], request_id="42", client_timeout=30))
        outputs = [blocking.InferRequestedOutput("probabilities", class_count=2)]
        results["classes"] = shown(client.infer("tombola", [inputs(blocking, image)["image"]], outputs=outputs))
        try:
            client.infer("other", [inputs(blocking, image)["image"]])
        except InferenceServerException as error:
            results["refusal"] = refusal(error)
    return results


async def asynchronous(url: str, image: bytes) -> dict[str, Any]:
    async with nonblocking.InferenceServerClient(url) as client:
        results: dict[str, Any] = {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model": await client.is_model_ready("tombola"),
            "metadata": (await client.get_server_metadata(as_json=True))["name"],
            "inputs": [each["name"] for each in (await client.get_model_metadata("tombola", as_json=True))["inputs"]],
        }
        for name, tensor in inputs(nonblocking, image).items():
            results[name] = shown(await client.infer("tombola", [tensor], request_id="42"))
        outputs = [nonblocking.InferRequestedOutput("probabilities", class_count=2)]
        answer = await client.infer("tombola", [inputs(nonblocking, image)["image"]], outputs=outputs)
        results["classes"] = shown(answer)
        try:
            await client.infer("other", [inputs(nonblocking, image)["image"]])
        except InferenceServerException as error:
            results["refusal"] = refusal(error)
    return results


def fields(message: Any) -> dict[str, list[Any]]:
    own = {f"{message.full_name}.{each.name}": [each.number, each.type] for each in message.fields}
    for nested in message.nested_types:
        own |= fields(nested)
    return own


def definition() -> dict[str, list[Any]]:
    result: dict[str, list[Any]] = {}
    for message in service_pb2.DESCRIPTOR.message_types_by_name.values():
        result |= fields(message)
    return result


if __name__ == "__main__":
    address, path = sys.argv[1:]
    data = Path(path).read_bytes()
    both = {"sync": synchronous(address, data), "async": asyncio.run(asynchronous(address, data))}
    print(json.dumps({**both, "definition": definition()}))
