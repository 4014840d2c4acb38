"""The clients that people use, against a real server: none of them may need a special case."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import tritonclient.http as blocking
import tritonclient.http.aio as nonblocking
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError
from open_inference.openapi.types import InferenceRequest
from tritonclient.utils import InferenceServerException

from service.errors import ErrorMessage
from service.outbound import http_client
from tests.support.planes import behind_a_port, picture, png, public_app
from tests.support.tickets import CLASSES

PACKINGS: Final = (None, "gzip", "deflate")
REDS: Final = (10, 60, 110, 235)
ANSWERS: Final = [0, 2, 4, 9]
SCRIPTS: Final = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with behind_a_port(public_app()) as address:
        yield address


def image_input(api: Any, reds: tuple[int, ...] = REDS) -> Any:
    tensor = api.InferInput("image", [len(reds)], "BYTES")
    return tensor.set_data_from_numpy(np.array([png(red) for red in reds], dtype=object))


def pixel_input(api: Any, datatype: str, *, binary: bool) -> Any:
    pixels = np.stack([np.asarray(picture(red)).transpose(2, 0, 1) for red in REDS])
    values = pixels if datatype == "UINT8" else (pixels / np.float32(255)).astype(np.float32)
    return api.InferInput("pixels", list(values.shape), datatype).set_data_from_numpy(values, binary_data=binary)


class TestTritonBlocking:
    @pytest.fixture
    def client(self, server: str) -> Iterator[Any]:
        client = blocking.InferenceServerClient(server)
        yield client
        client.close()

    def test_health_and_metadata(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert all(client.is_model_ready("tombola", version) for version in ("", "1"))
        assert not client.is_model_ready("tombola", "2")
        assert not client.is_model_ready("other")
        assert set(client.get_server_metadata()) == {"name", "version", "extensions"}
        assert [output["name"] for output in client.get_model_metadata("tombola", "1")["outputs"]] == [
            "probabilities",
            "index",
            "label",
        ]
        assert client.get_model_config("tombola")["max_batch_size"] == 512
        assert client.get_model_repository_index()[0]["state"] == "READY"
        assert client.get_inference_statistics("tombola")["model_stats"][0]["name"] == "tombola"

    @pytest.mark.parametrize("packing", PACKINGS)
    @pytest.mark.parametrize("unpacking", PACKINGS)
    def test_infer_in_binary(self, client: Any, packing: str | None, unpacking: str | None) -> None:
        result = client.infer(
            "tombola",
            [image_input(blocking)],
            request_id="42",
            request_compression_algorithm=packing,
            response_compression_algorithm=unpacking,
        )
        assert result.get_response()["id"] == "42"
        assert result.as_numpy("index").tolist() == ANSWERS
        assert result.as_numpy("label").tolist() == [CLASSES[index].encode() for index in ANSWERS]
        assert result.as_numpy("probabilities").shape == (4, 10)
        assert result.as_numpy("probabilities").max(axis=1).tolist() == [np.float32(0.62)] * 4

    @pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
    @pytest.mark.parametrize("binary", [True, False])
    def test_infer_from_pixels(self, client: Any, datatype: str, binary: bool) -> None:
        outputs = [blocking.InferRequestedOutput("index", binary_data=binary)]
        result = client.infer("tombola", [pixel_input(blocking, datatype, binary=binary)], outputs=outputs)
        assert result.as_numpy("index").tolist() == ANSWERS
        assert [output["name"] for output in result.get_response()["outputs"]] == ["index"]

    def test_a_large_answer_is_packed_when_asked_for(self, client: Any) -> None:
        outputs = [blocking.InferRequestedOutput("probabilities", binary_data=True)]
        tensor = image_input(blocking, REDS * 16)
        for unpacking in PACKINGS:
            result = client.infer(
                "tombola", [tensor], outputs=outputs, response_compression_algorithm=unpacking, model_version="1"
            )
            assert result.as_numpy("probabilities").shape == (64, 10)

    def test_classification_output(self, client: Any) -> None:
        outputs = [blocking.InferRequestedOutput("probabilities", class_count=3)]
        result = client.infer("tombola", [image_input(blocking)], outputs=outputs).as_numpy("probabilities")
        assert result.shape == (4, 3)
        assert result[:, 0].tolist() == [f"0.62:{index}:{CLASSES[index]}".encode() for index in ANSWERS]

    def test_priority_sequences_and_own_parameters_are_taken_and_do_nothing(self, client: Any) -> None:
        result = client.infer(
            "tombola",
            [image_input(blocking)],
            priority=1,
            sequence_id=5,
            sequence_start=True,
            timeout=5_000_000,
            parameters={"members": 3, "seed": 7},
        )
        assert set(result.get_response()) == {"model_name", "model_version", "outputs"}

    def test_errors_say_what_is_wrong(self, client: Any) -> None:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("other", [image_input(blocking)])
        assert (caught.value.status(), caught.value.message()) == ("404", ErrorMessage.MODEL_UNKNOWN)
        tensor = blocking.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array([b"no image"], dtype=object))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("tombola", [tensor])
        assert (caught.value.status(), caught.value.message()) == ("415", ErrorMessage.IMAGE_FORMAT)
        with pytest.raises(InferenceServerException) as caught:
            client.load_model("tombola", config="{}", files={"file:1/model.py": b"x = 1"})
        assert (caught.value.status(), caught.value.message()) == ("501", ErrorMessage.NOT_OFFERED)

    def test_sixty_calls_on_one_connection_good_and_bad_in_turn(self, client: Any) -> None:
        bad = blocking.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array([b"no image"], dtype=object))
        broken = 0
        for turn in range(60):
            try:
                client.infer("tombola", [bad if turn % 2 else image_input(blocking)])
            except InferenceServerException as error:
                broken += error.message() != ErrorMessage.IMAGE_FORMAT
        assert broken == 0


class TestTritonNonblocking:
    def test_everything_it_asks_though_it_always_accepts_gzip(self, server: str) -> None:
        async def calls() -> None:
            async with nonblocking.InferenceServerClient(server) as client:
                assert await client.is_server_ready()
                assert (await client.get_server_metadata())["name"] == "tombola"
                assert (await client.get_model_metadata("tombola"))["versions"] == ["1"]
                assert (await client.get_model_config("tombola", "1"))["name"] == "tombola"
                for packing in PACKINGS:
                    result = await client.infer(
                        "tombola", [image_input(nonblocking, REDS * 16)], request_compression_algorithm=packing
                    )
                    assert result.as_numpy("index").tolist() == ANSWERS * 16
                json_alone = await client.infer(
                    "tombola",
                    [pixel_input(nonblocking, "UINT8", binary=False)],
                    outputs=[nonblocking.InferRequestedOutput("label", binary_data=False)],
                )
                assert json_alone.as_numpy("label").tolist() == [CLASSES[index] for index in ANSWERS]

        asyncio.run(calls())

    def test_sixty_calls_good_and_bad_in_turn(self, server: str) -> None:
        async def calls() -> int:
            broken = 0
            async with nonblocking.InferenceServerClient(server) as client:
                for turn in range(60):
                    try:
                        await client.infer("tombola" if turn % 2 else "other", [image_input(nonblocking)])
                    except InferenceServerException as error:
                        broken += error.message() != ErrorMessage.MODEL_UNKNOWN
            return broken

        assert asyncio.run(calls()) == 0


class TestOpenInference:
    """Its models of the answers are strict: whatever parses conforms to the specification."""

    @pytest.fixture
    def client(self, server: str) -> Iterator[OpenInferenceClient]:
        with http_client(timeout_s=5) as transport:
            yield OpenInferenceClient(base_url=f"http://{server}", httpx_client=transport)

    def test_health_metadata_and_inference(self, client: OpenInferenceClient) -> None:
        client.check_server_liveness()
        client.check_server_readiness()
        client.check_model_readiness("tombola")
        client.check_model_version_readiness("tombola", "1")
        assert client.read_server_metadata().name == "tombola"
        assert client.read_model_metadata("tombola").platform == "tombola"
        assert client.read_model_version_metadata("tombola", "1").versions == ["1"]
        values = np.asarray(picture(110)).transpose(2, 0, 1).ravel().tolist()
        request = InferenceRequest.parse_obj(
            {
                "id": "7",
                "inputs": [{"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": values}],
                "outputs": [{"name": "index"}],
            }
        )
        response = client.model_infer("tombola", request=request)
        assert response.id == "7"
        assert response.outputs[0].name == "index"

    def test_an_unknown_model_is_an_api_error(self, client: OpenInferenceClient) -> None:
        with pytest.raises(ApiError) as caught:
            client.read_model_metadata("other")
        assert caught.value.status_code == 404


class TestOthersInTheirOwnEnvironments:
    """KServe and MLServer pin what they depend on; where an environment of theirs is named, they are asked too."""

    @pytest.mark.skipif("KSERVE_PYTHON" not in os.environ, reason="KSERVE_PYTHON names no environment with kserve")
    def test_kserve(self, server: str, tmp_path: Path) -> None:
        (tmp_path / "image.png").write_bytes(png(110))
        command = [os.environ["KSERVE_PYTHON"], str(SCRIPTS / "kserve_check.py"), f"http://{server}"]
        command.append(str(tmp_path / "image.png"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif("MLSERVER_COMMAND" not in os.environ, reason="MLSERVER_COMMAND names no mlserver")
    def test_mlserver_infer(self, server: str, tmp_path: Path) -> None:
        values = np.asarray(picture(110)).transpose(2, 0, 1).ravel().tolist()
        tensor = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": values}
        lines = [json.dumps({"id": str(number), "inputs": [tensor]}) for number in range(5)]
        (tmp_path / "in").write_text("\n".join(lines))
        for binary in ([], ["--binary-data"]):
            command = [os.environ["MLSERVER_COMMAND"], "infer", "-u", server, "-m", "tombola", "-s", "2", *binary]
            command += ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
            assert len(answers) == 5, done.stdout + done.stderr
            shapes = {
                tuple(output["data"]) for answer in answers for output in answer["outputs"] if output["name"] == "index"
            }
            assert shapes == {(4,)}
