"""KServe's own client against a server: python kserve_check.py http://host:port image.

Runs in an environment of its own (`pip install kserve`), since KServe pins what it depends on;
tests/service/web/test_clients.py runs it when KSERVE_PYTHON is set.
"""

import asyncio
import base64
import os
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig  # type: ignore[import-not-found]
from kserve.protocol.infer_type import RequestedOutput  # type: ignore[import-not-found]


def image_request(data: bytes, *, binary: bool) -> InferRequest:
    tensor = InferInput("image", [2], "BYTES")
    if binary:
        tensor.set_data_from_numpy(np.array([data, data], dtype=object), binary_data=True)
    else:
        tensor.data = [base64.b64encode(data).decode()] * 2
    outputs = [RequestedOutput("index", {"binary_data": binary}), RequestedOutput("label", {"binary_data": binary})]
    return InferRequest("tombola", [tensor], request_id="42", request_outputs=outputs)


def pixel_request(*, binary: bool) -> InferRequest:
    tensor = InferInput("pixels", [1, 3, 32, 32], "FP32")
    tensor.set_data_from_numpy(np.full((1, 3, 32, 32), 0.5, np.float32), binary_data=binary)
    return InferRequest("tombola", [tensor])


async def refusal(client: InferenceRESTClient, base: str, request: InferRequest) -> str:
    try:
        await client.infer(base, request, "tombola")
    except httpx.HTTPStatusError as error:
        return str(error)
    raise AssertionError("a damaged image was accepted")


async def check(base: str, data: bytes) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as client:
        assert await client.is_server_live(base)
        assert await client.is_server_ready(base)
        assert await client.is_model_ready(base, "tombola")
        assert not await client.is_model_ready(base, "other")
        for binary in (False, True):
            response = await client.infer(base, image_request(data, binary=binary), "tombola")
            assert response.id == "42", response.id
            assert [output.name for output in response.outputs] == ["index", "label"]
            assert list(response.outputs[0].as_numpy().shape) == [2]
            response = await client.infer(base, pixel_request(binary=binary), "tombola")
            assert {output.name for output in response.outputs} == {"probabilities", "index", "label"}
        assert "unsupported format" in await refusal(client, base, image_request(b"no image", binary=True))
    print("kserve: live, ready, model ready, infer in JSON and binary, errors: as expected")


if __name__ == "__main__":
    os.environ["NO_PROXY"] = "*"  # KServe's client takes its proxies from the environment
    asyncio.run(check(sys.argv[1], Path(sys.argv[2]).read_bytes()))
