"""The Open Inference Protocol: its forms in JSON and binary, byte by byte, and every refusal."""

import asyncio
import base64
import gzip
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from model_store.input_spec import InputSpec
from model_store.json_object import Json
from service.errors import ErrorMessage
from service.observability.metrics import Metrics
from service.settings import MAX_PICTURE_BYTES
from service.web.infer_request import flatten, quantise
from tests.support.planes import StandIn, ask, encoded, picture, png, public_app, refused, stand_in_of
from tests.support.tickets import CLASSES

MODEL: Final = "/v2/models/tombola"
INFER: Final = f"{MODEL}/infer"
LENGTH: Final = "inference-header-content-length"
PIXELS: Final = np.asarray(picture(110)).transpose(2, 0, 1)


LARGER: Final = InputSpec(48, 64, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def image_tensor(*reds: int, **more: Any) -> Json:
    data = [base64.b64encode(png(red)).decode() for red in reds]
    return {"name": "image", "shape": [len(reds)], "datatype": "BYTES", "data": data} | more


def pixel_tensor(**more: Any) -> Json:
    return {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [PIXELS.tolist()]} | more


def data_url(file: bytes) -> bytes:
    return b"data:image/png;base64," + base64.b64encode(file)


def binary_tensor(data: bytes, **more: Any) -> Json:
    described = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8"}
    return described | {"parameters": {"binary_data_size": len(data)}} | more


def elements(*files: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def infer(content: Json | bytes, tail: bytes | None = None, **request: Any) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = dict(request.pop("headers", {}))
    if tail is not None:
        headers[LENGTH] = str(len(body))
    return ask(request.pop("app", None) or public_app(), "POST", INFER, content=body + (tail or b""), headers=headers)


def outputs_of(response: httpx.Response) -> dict[str, Any]:
    """The outputs of an answer by name, read by this test's own reader of the binary form."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get(LENGTH, len(response.content)))
    head, tail = json.loads(response.content[:length]), response.content[length:]
    outputs = {}
    for output in head["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            outputs[output["name"]] = output["data"]
            continue
        raw, tail = tail[:size], tail[size:]
        if output["datatype"] == "BYTES":
            outputs[output["name"]] = strings(raw)
        else:
            outputs[output["name"]] = np.frombuffer(raw, {"FP32": "<f4", "INT64": "<i8"}[output["datatype"]]).tolist()
    assert tail == b""
    return outputs


def strings(raw: bytes) -> list[str]:
    texts = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return texts


class TestWhatIsServed:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("/v2/health/live", {"live": True}),
            ("/v2/health/ready", {"live": True, "ready": True}),
            ("/v2/models", {"models": ["tombola"]}),
            (f"{MODEL}/ready", {"name": "tombola", "ready": True}),
            (f"{MODEL}/versions/1/ready", {"name": "tombola", "ready": True}),
        ],
    )
    def test_short_answers(self, path: str, expected: Json) -> None:
        assert ask(public_app(), "GET", path).json() == expected

    @pytest.mark.parametrize("path", ["/v2", "/v2/"])
    def test_server_metadata_with_and_without_the_slash(self, path: str) -> None:
        response = ask(public_app(), "GET", path)
        assert sorted(response.json()) == ["extensions", "name", "version"]
        assert "binary_tensor_data" in response.json()["extensions"]

    @pytest.mark.parametrize("path", [MODEL, f"{MODEL}/versions/1"])
    def test_model_metadata(self, path: str) -> None:
        metadata = ask(public_app(), "GET", path).json()
        assert metadata["inputs"][0] == {"name": "image", "datatype": "BYTES", "shape": [-1]}
        assert metadata["inputs"][1] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 32, 32]}
        assert [(output["name"], output["datatype"], output["shape"]) for output in metadata["outputs"]] == [
            ("probabilities", "FP32", [-1, 10]),
            ("index", "INT64", [-1]),
            ("label", "BYTES", [-1]),
        ]

    def test_metadata_and_config_say_the_library_s_own_size(self) -> None:
        app = public_app(stand_in_of(LARGER))
        described = ask(app, "GET", MODEL).json()["inputs"][1]
        assert described == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 48, 64]}
        assert ask(app, "GET", f"{MODEL}/config").json()["input"][1]["dims"] == [3, 48, 64]

    def test_config_batches_as_many_as_a_request_may_hold(self) -> None:
        config = ask(public_app(max_images=77), "GET", f"{MODEL}/config").json()
        assert config["max_batch_size"] == 77
        assert [output["dims"] for output in config["output"]] == [[10], [1], [1]]

    def test_the_index_of_the_repository(self) -> None:
        for ready, state in ((True, "READY"), (False, "UNAVAILABLE")):
            (entry,) = ask(public_app(StandIn(ready=ready)), "POST", "/v2/repository/index", content=b"{}").json()
            assert (entry["name"], entry["version"], entry["state"]) == ("tombola", "1", state)

    def test_not_ready_is_503(self) -> None:
        app = public_app(StandIn(ready=False))
        for path in ("/v2/health/ready", f"{MODEL}/ready"):
            refused(ask(app, "GET", path), 503, ErrorMessage.NOT_READY)
        assert ask(app, "GET", "/v2/health/live").status_code == 200

    @pytest.mark.parametrize("name", ["other", "Tombola", "..%2f..%2fetc", "tombola/versions/2", "tombola/versions/01"])
    def test_other_models_and_versions_are_unknown(self, name: str) -> None:
        for rest in ("", "/ready", "/config", "/stats"):
            refused(ask(public_app(), "GET", f"/v2/models/{name}{rest}"), 404)
        refused(ask(public_app(), "POST", f"/v2/models/{name}/infer", content=b"{}"), 404)

    @pytest.mark.parametrize(
        "path",
        [
            "/v2/repository/models/tombola/load",
            "/v2/repository/models/tombola/unload",
            "/v2/logging",
            "/v2/trace/setting",
            f"{MODEL}/trace/setting",
            "/v2/systemsharedmemory/region/x/register",
            "/v2/cudasharedmemory/status",
        ],
    )
    def test_what_is_not_offered(self, path: str) -> None:
        body = {"parameters": {"config": "{}", "file:1/model.py": "aW1wb3J0IG9z"}}
        refused(ask(public_app(), "POST", path, json=body), 501, ErrorMessage.NOT_OFFERED)

    def test_wrong_methods(self) -> None:
        for method, path in (("GET", INFER), ("POST", MODEL), ("DELETE", MODEL), ("PUT", "/v2")):
            refused(ask(public_app(), method, path), 405, ErrorMessage.METHOD)


class TestStatistics:
    def test_requests_and_images_are_counted_but_no_time_that_tells_an_ensemble(self) -> None:
        app = public_app()
        infer({"inputs": [image_tensor(10, 20)]}, app=app)
        infer(b"{}", app=app)
        for path in ("/v2/models/stats", f"{MODEL}/stats", f"{MODEL}/versions/1/stats"):
            (statistics,) = ask(app, "GET", path).json()["model_stats"]
            assert (statistics["inference_count"], statistics["execution_count"]) == (2, 1)
            stats = statistics["inference_stats"]
            assert (stats["success"]["count"], stats["fail"]["count"]) == (1, 1)
            assert all(entry["ns"] % 10**9 == 0 for entry in stats.values())
            assert statistics["last_inference"] % 1000 == 0


class TestJson:
    def test_images_and_the_whole_form_of_the_answer(self) -> None:
        response = infer({"id": "a1", "inputs": [image_tensor(110, 10)]})
        content = response.json()
        assert response.headers["content-type"] == "application/json"
        assert LENGTH not in response.headers
        assert (content["model_name"], content["model_version"], content["id"]) == ("tombola", "1", "a1")
        probabilities, index, label = content["outputs"]
        assert {name: probabilities[name] for name in ("name", "datatype", "shape")} == {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": [2, 10],
        }
        assert probabilities["data"][4] == 0.62
        assert probabilities["data"] == [round(value, 2) for value in probabilities["data"]]
        assert index == {"name": "index", "datatype": "INT64", "shape": [2], "data": [4, 0]}
        assert label == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["deer", "airplane"]}

    @pytest.mark.parametrize(
        "headers", [{}, {"content-type": "application/json"}, {"content-type": "application/octet-stream"}]
    )
    def test_any_content_type_or_none(self, headers: dict[str, str]) -> None:
        assert outputs_of(infer({"inputs": [pixel_tensor()]}, headers=headers))["index"] == [4]

    @pytest.mark.parametrize(
        "data", [PIXELS.tolist(), PIXELS.ravel().tolist(), [PIXELS.tolist()], PIXELS.astype(float).ravel().tolist()]
    )
    def test_pixels_nested_as_the_shape_says_or_flat(self, data: list[Any]) -> None:
        nested = data if len(data) in (1, 3072) else [data]
        assert outputs_of(infer({"inputs": [pixel_tensor(data=nested)]}))["index"] == [4]

    def test_floats_are_rounded_to_the_nearest_level(self) -> None:
        manager = StandIn()
        values = (PIXELS / 255).ravel().tolist()
        response = infer({"inputs": [pixel_tensor(datatype="FP32", data=values)]}, app=public_app(manager))
        assert response.status_code == 200
        assert (manager.scheduler.rows[0][0] == PIXELS).all()

    def test_an_added_dimension_of_images_is_taken(self) -> None:
        tensor = image_tensor(110, shape=[1, 1])
        assert outputs_of(infer({"inputs": [tensor]}))["index"] == [4]
        assert outputs_of(infer({"inputs": [tensor | {"data": [tensor["data"]]}]}))["index"] == [4]

    def test_only_the_outputs_asked_for_in_their_order(self) -> None:
        response = infer({"inputs": [image_tensor(110)], "outputs": [{"name": "label"}, {"name": "index"}]})
        assert [output["name"] for output in response.json()["outputs"]] == ["label", "index"]

    @pytest.mark.parametrize(("count", "shown"), [(1, 1), (3, 3), (99, 10)])
    def test_classification(self, count: int, shown: int) -> None:
        requested = [{"name": "probabilities", "parameters": {"classification": count}}]
        (output,) = infer({"inputs": [image_tensor(110)], "outputs": requested}).json()["outputs"]
        assert (output["datatype"], output["shape"]) == ("BYTES", [1, shown])
        assert output["data"][0] == "0.62:4:deer"

    def test_without_an_id_none_comes_back(self) -> None:
        assert "id" not in infer({"inputs": [image_tensor(1)]}).json()

    def test_parameters_that_are_not_ours_change_nothing(self) -> None:
        names = {"seed": 1, "members": 3, "alpha": "1111", "triton_x": True, "headers": "x", "sequence_id": 4}
        response = infer({"inputs": [image_tensor(110)], "parameters": names})
        assert set(response.json()) == {"model_name", "model_version", "outputs"}

    def test_timeout_in_microseconds_shortens_the_deadline(self) -> None:
        manager = StandIn()
        app = public_app(manager, deadline_s=10)
        for timeout in (250_000, 0, 10**9):
            infer({"inputs": [image_tensor(1)], "parameters": {"timeout": timeout}}, app=app)
        short, none, long = manager.scheduler.deadlines
        assert 0 < short <= 0.25
        assert 1 < none <= 10
        assert 1 < long <= 10


class TestBinary:
    def test_pixels_in_and_everything_out(self) -> None:
        data = PIXELS.tobytes()
        response = infer({"inputs": [binary_tensor(data)], "parameters": {"binary_data_output": True}}, data)
        assert response.headers["content-type"] == "application/octet-stream"
        outputs = outputs_of(response)
        assert outputs["index"] == [4]
        assert outputs["label"] == ["deer"]
        assert outputs["probabilities"][4] == np.float32(0.62)

    def test_floats_in(self) -> None:
        manager = StandIn()
        data = (PIXELS / np.float32(255)).astype("<f4").tobytes()
        infer({"inputs": [binary_tensor(data, datatype="FP32")]}, data, app=public_app(manager))
        assert (manager.scheduler.rows[0][0] == PIXELS).all()

    def test_several_images_of_any_kind(self) -> None:
        data = elements(png(10), encoded(picture(110), "JPEG"), encoded(picture(235), "WEBP"))
        response = infer({"inputs": [binary_tensor(data, name="image", datatype="BYTES", shape=[3])]}, data)
        assert outputs_of(response)["index"] == [0, 4, 9]

    @pytest.mark.parametrize("form", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes, data_url])
    def test_base64_in_a_json_element_in_its_usual_forms(self, form: Callable[[bytes], bytes]) -> None:
        data = [form(encoded(picture(110), kind)).decode() for kind in ("PNG", "JPEG", "WEBP")]
        tensor = {"name": "image", "shape": [3], "datatype": "BYTES", "data": data}
        assert outputs_of(infer({"inputs": [tensor]}))["index"] == [4, 4, 4]

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_a_byte_order_mark_counts_in_the_header_s_length(self, mark: bytes) -> None:
        data = elements(png(110))
        tensor = binary_tensor(data, name="image", datatype="BYTES", shape=[1])
        assert outputs_of(infer(mark + json.dumps({"inputs": [tensor]}).encode(), data))["index"] == [4]

    @pytest.mark.parametrize("form", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes, data_url])
    def test_base64_in_a_binary_element_as_some_clients_send_it(self, form: Callable[[bytes], bytes]) -> None:
        data = elements(*(form(encoded(picture(110), kind)) for kind in ("PNG", "JPEG", "WEBP")))
        response = infer({"inputs": [binary_tensor(data, name="image", datatype="BYTES", shape=[3])]}, data)
        assert outputs_of(response)["index"] == [4, 4, 4]

    def test_the_outputs_wish_comes_before_the_requests(self) -> None:
        requested = [{"name": "index", "parameters": {"binary_data": False}}, {"name": "label"}]
        request = {"inputs": [image_tensor(110)], "outputs": requested, "parameters": {"binary_data_output": True}}
        response = infer(request)
        index, label = json.loads(response.content[: int(response.headers[LENGTH])])["outputs"]
        assert index["data"] == [4]
        assert label["parameters"] == {"binary_data_size": 8}
        assert outputs_of(response)["label"] == ["deer"]

    def test_classification_out(self) -> None:
        requested = [{"name": "probabilities", "parameters": {"classification": 2, "binary_data": True}}]
        outputs = outputs_of(infer({"inputs": [image_tensor(110)], "outputs": requested}))
        assert outputs["probabilities"][0] == "0.62:4:deer"

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_a_raw_image_as_the_whole_body(self, kind: str) -> None:
        response = infer(encoded(picture(110), kind), headers={LENGTH: "0"})
        assert list(outputs_of(response)) == ["probabilities", "index", "label"]
        assert outputs_of(response)["index"] == [4]

    def test_a_header_that_covers_the_whole_body(self) -> None:
        assert outputs_of(infer({"inputs": [image_tensor(110)]}, b""))["index"] == [4]


class TestPacking:
    @pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
    def test_requests_whose_header_length_is_that_of_the_unpacked(self, coding: str, pack: Any) -> None:
        data = PIXELS.tobytes()
        head = json.dumps({"inputs": [binary_tensor(data)]}).encode()
        headers = {"content-encoding": coding, LENGTH: str(len(head))}
        response = ask(public_app(), "POST", INFER, content=pack(head + data), headers=headers)
        assert outputs_of(response)["index"] == [4]

    @pytest.mark.parametrize(
        ("accepted", "coding"),
        [
            ("gzip", "gzip"),
            ("deflate", "deflate"),
            ("br, deflate;q=0.5, gzip", "deflate"),
            ("gzip;q=0, deflate", "deflate"),
            ("gzip;q=0", None),
            ("br", None),
            ("", None),
        ],
    )
    def test_large_answers_if_asked_for(self, accepted: str, coding: str | None) -> None:
        response = infer({"inputs": [image_tensor(*[110] * 40)]}, headers={"accept-encoding": accepted})
        assert response.headers.get("content-encoding") == coding
        assert outputs_of(response)["index"] == [4] * 40

    def test_small_answers_and_metadata_never(self) -> None:
        headers = {"accept-encoding": "gzip"}
        assert "content-encoding" not in infer({"inputs": [image_tensor(1)]}, headers=headers).headers
        for path in ("/v2", MODEL, f"{MODEL}/config", "/v2/models/stats"):
            assert "content-encoding" not in ask(public_app(), "GET", path, headers=headers).headers


class TestDetail:
    def test_label_has_no_probabilities_at_all(self) -> None:
        app = public_app(output_detail="label")
        assert [output["name"] for output in ask(app, "GET", MODEL).json()["outputs"]] == ["index", "label"]
        assert list(outputs_of(infer({"inputs": [image_tensor(110)]}, app=app))) == ["index", "label"]
        body = {"inputs": [image_tensor(110)], "outputs": [{"name": "probabilities"}]}
        refused(infer(body, app=app), 400, ErrorMessage.V2_OUTPUTS)

    def test_full_has_all_digits(self) -> None:
        outputs = outputs_of(infer({"inputs": [image_tensor(110)]}, app=public_app(output_detail="full")))
        assert abs(outputs["probabilities"][4] - 0.6172) < 1e-6


TOO_LONG: Final = {"inputs": [image_tensor(1)], "id": "x" * 257}
VALUES: Final[tuple[Any, ...]] = (-1, 10**400, "1", True, None, {})
OUTPUTS: Final[tuple[Any, ...]] = (
    {},
    "index",
    [None],
    ["index"],
    [{}],
    [{"name": "x"}],
    [{"name": []}],
    [{"name": "index"}] * 2,
    [{"name": "index"}] * 10_000,
)
BAD_JSON: Final[list[tuple[Any, int, ErrorMessage]]] = [
    (b"", 400, ErrorMessage.EMPTY_BODY),
    (b"[]", 400, ErrorMessage.JSON_OBJECT),
    (b'{"inputs": [}', 400, ErrorMessage.JSON_MALFORMED),
    ({}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": None}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": {}}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": []}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": [None]}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": [image_tensor(1), pixel_tensor()]}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": [image_tensor(1)] * 10_000}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": [image_tensor(1, name="x")]}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": [image_tensor(1, name=["image"])]}, 400, ErrorMessage.V2_INPUTS),
    ({"inputs": [image_tensor(1, url="http://169.254.169.254/")]}, 400, ErrorMessage.V2_INPUT_KEYS),
    ({"inputs": [image_tensor(1, datatype="FP32")]}, 400, ErrorMessage.V2_DATATYPE),
    ({"inputs": [image_tensor(1, datatype=None)]}, 400, ErrorMessage.V2_DATATYPE),
    ({"inputs": [pixel_tensor(datatype="INT64")]}, 400, ErrorMessage.V2_DATATYPE),
    ({"inputs": [pixel_tensor(datatype={})]}, 400, ErrorMessage.V2_DATATYPE),
    ({"inputs": [pixel_tensor(datatype="FP16")]}, 400, ErrorMessage.V2_HALF_JSON),
    ({"inputs": [pixel_tensor(datatype="BF16")]}, 400, ErrorMessage.V2_HALF_JSON),
    *(
        ({"inputs": [image_tensor(1, shape=shape)]}, 400, ErrorMessage.V2_SHAPE_IMAGE)
        for shape in (None, 1, "1", [], [0], [-1], [1.0], [True], ["1"], [1, 2], [None], [[1]], [1] * 50)
    ),
    *(
        ({"inputs": [pixel_tensor(shape=shape)]}, 400, ErrorMessage.V2_SHAPE_PIXELS)
        for shape in ([1], [1, 3, 32], [1, 3, 32, 33], [0, 3, 32, 32], [-1, 3, 32, 32], [1, 3072], [2**62, 2])
    ),
    ({"inputs": [pixel_tensor(shape=[2**62, 3, 32, 32])]}, 413, ErrorMessage.IMAGES_TOO_MANY),
    ({"inputs": [image_tensor(1, shape=[10**300])]}, 413, ErrorMessage.IMAGES_TOO_MANY),
    ({"inputs": [image_tensor(1, shape=[513])]}, 413, ErrorMessage.IMAGES_TOO_MANY),
    ({"inputs": [image_tensor(1, shape=[2])]}, 400, ErrorMessage.V2_DATA),
    ({"inputs": [image_tensor(1, data="aaaa")]}, 400, ErrorMessage.V2_DATA),
    ({"inputs": [image_tensor(1, data=[])]}, 400, ErrorMessage.V2_DATA),
    ({"inputs": [image_tensor(1, data=None)]}, 400, ErrorMessage.V2_DATA),
    ({"inputs": [image_tensor(1, data=[7])]}, 400, ErrorMessage.V2_DATA_BYTES),
    ({"inputs": [image_tensor(1, data=[{"b64": "aaaa"}])]}, 400, ErrorMessage.V2_DATA_BYTES),
    ({"inputs": [image_tensor(1, data=["http://169.254.169.254/x.png"])]}, 400, ErrorMessage.BASE64),
    ({"inputs": [image_tensor(1, data=["aGVsbG8="])]}, 415, ErrorMessage.IMAGE_FORMAT),
    ({"inputs": [pixel_tensor(data=[0] * 3071)]}, 400, ErrorMessage.V2_DATA),
    ({"inputs": [pixel_tensor(data=[[0] * 3072])]}, 400, ErrorMessage.V2_DATA),
    ({"inputs": [pixel_tensor(data=[*PIXELS[:2].tolist(), [[0] * 32] * 31])]}, 400, ErrorMessage.V2_DATA),
    *(
        ({"inputs": [pixel_tensor(data=[value] * 3072)]}, 400, ErrorMessage.V2_DATA_UINT8)
        for value in (*VALUES, 256, 0.5)
    ),
    *(
        ({"inputs": [pixel_tensor(datatype="FP32", data=[value] * 3072)]}, 400, ErrorMessage.V2_DATA_FP32)
        for value in (*VALUES, -0.001, 1.001)
    ),
    (
        b'{"inputs": [{"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [1e999]}]}',
        400,
        ErrorMessage.V2_DATA,
    ),
    ({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}, 400, ErrorMessage.V2_DATA_TWICE),
    ({"inputs": [image_tensor(1, parameters={"binary_data_size": 3})]}, 400, ErrorMessage.V2_DATA_TWICE),
    ({"inputs": [binary_tensor(b"x")]}, 400, ErrorMessage.V2_BINARY_SIZE),
    ({"inputs": [image_tensor(1, parameters={"shared_memory_region": "x"})]}, 400, ErrorMessage.V2_SHARED_MEMORY),
    (
        {"inputs": [image_tensor(1)], "outputs": [{"name": "index", "parameters": {"shared_memory_region": "x"}}]},
        400,
        ErrorMessage.V2_SHARED_MEMORY,
    ),
    ({"inputs": [image_tensor(1, parameters=[])]}, 400, ErrorMessage.V2_PARAMETERS),
    ({"inputs": [image_tensor(1)], "parameters": {"a": {}}}, 400, ErrorMessage.V2_PARAMETERS),
    ({"inputs": [image_tensor(1)], "parameters": {"a": None}}, 400, ErrorMessage.V2_PARAMETERS),
    (
        {"inputs": [image_tensor(1)], "parameters": {str(number): 1 for number in range(65)}},
        400,
        ErrorMessage.V2_PARAMETERS,
    ),
    ({"inputs": [image_tensor(1)], "parameters": {"timeout": -1}}, 400, ErrorMessage.V2_TIMEOUT),
    ({"inputs": [image_tensor(1)], "parameters": {"timeout": "1"}}, 400, ErrorMessage.V2_TIMEOUT),
    ({"inputs": [image_tensor(1)], "parameters": {"timeout": 1.5}}, 400, ErrorMessage.V2_TIMEOUT),
    ({"inputs": [image_tensor(1)], "parameters": {"timeout": True}}, 400, ErrorMessage.V2_TIMEOUT),
    ({"inputs": [image_tensor(1)], "parameters": {"binary_data_output": 1}}, 400, ErrorMessage.V2_BINARY_FLAG),
    (
        {"inputs": [image_tensor(1)], "outputs": [{"name": "index", "parameters": {"binary_data": "yes"}}]},
        400,
        ErrorMessage.V2_BINARY_FLAG,
    ),
    *(({"inputs": [image_tensor(1)], "outputs": outputs}, 400, ErrorMessage.V2_OUTPUTS) for outputs in OUTPUTS),
    *(
        (
            {"inputs": [image_tensor(1)], "outputs": [{"name": name, "parameters": {"classification": count}}]},
            400,
            ErrorMessage.V2_CLASSIFICATION,
        )
        for name, count in (
            ("probabilities", -1),
            ("probabilities", "1"),
            ("probabilities", True),
            ("probabilities", 1.0),
            ("index", 1),
            ("label", 1),
        )
    ),
    (TOO_LONG, 400, ErrorMessage.V2_ID),
    ({"inputs": [image_tensor(1)], "id": 7}, 400, ErrorMessage.V2_ID),
    (b'{"id": "\\ud800", "inputs": []}', 400, ErrorMessage.V2_INPUTS),
]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return public_app()


class TestRefusals:
    @pytest.mark.parametrize(("content", "status", "text"), BAD_JSON)
    def test_bad_requests(self, app: FastAPI, content: Any, status: int, text: ErrorMessage) -> None:
        refused(infer(content, app=app), status, text)

    def test_half_a_surrogate_pair_cannot_be_an_id(self, app: FastAPI) -> None:
        body = json.dumps({"inputs": [image_tensor(1)]}).replace("{", '{"id": "\\ud800", ', 1).encode()
        refused(infer(body, app=app), 400, ErrorMessage.V2_ID)

    @pytest.mark.parametrize("value", ["-1", "1e3", "x", "", "999999", "9" * 40, " 10", "+5", "\u0661"])
    def test_header_lengths(self, app: FastAPI, value: str) -> None:
        body = json.dumps({"inputs": [image_tensor(1)]}).encode()
        response = ask(app, "POST", INFER, content=body, headers={LENGTH: value.encode()})
        refused(response, 400, ErrorMessage.V2_HEADER_LENGTH)

    def test_two_header_lengths(self, app: FastAPI) -> None:
        response = ask(app, "POST", INFER, content=b"{}", headers=[(LENGTH, "1"), (LENGTH, "2")])
        refused(response, 400, ErrorMessage.HEADER_TWICE)

    @pytest.mark.parametrize("size", [-1, 0, 3071, 3073, 2**63, 10**300, "3072", 3072.0, True, None])
    def test_sizes_of_binary_tensors(self, app: FastAPI, size: Any) -> None:
        data = PIXELS.tobytes()
        tensor = binary_tensor(data, parameters={"binary_data_size": size})
        assert infer({"inputs": [tensor]}, data, app=app).status_code == 400

    def test_a_binary_tensor_of_another_size_than_its_shape(self, app: FastAPI) -> None:
        for data in (PIXELS.tobytes() * 2, b"", PIXELS.tobytes()[:-1]):
            refused(infer({"inputs": [binary_tensor(data)]}, data, app=app), 400, ErrorMessage.V2_BINARY_SIZE)

    def test_bytes_after_json_data(self, app: FastAPI) -> None:
        refused(infer({"inputs": [image_tensor(1)]}, b"more", app=app), 400, ErrorMessage.V2_BINARY_SIZE)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\1",
            struct.pack("<I", 5) + b"1234",
            struct.pack("<I", 2**32 - 1),
            elements(png(1), png(2)),
            elements(png(1)) + b"x",
        ],
    )
    def test_elements_that_do_not_add_up(self, app: FastAPI, data: bytes) -> None:
        tensor = binary_tensor(data, name="image", datatype="BYTES", shape=[1])
        refused(infer({"inputs": [tensor]}, data, app=app), 400, ErrorMessage.V2_BINARY_BYTES)

    def test_floats_that_are_no_pixels(self, app: FastAPI) -> None:
        for value in (float("nan"), float("inf"), -float("inf"), -1e-6, 1.0001):
            data = np.full(3072, value, "<f4").tobytes()
            response = infer({"inputs": [binary_tensor(data, datatype="FP32")]}, data, app=app)
            refused(response, 400, ErrorMessage.V2_DATA_FP32)

    def test_a_raw_body_that_is_no_image(self, app: FastAPI) -> None:
        refused(infer(b"hello", headers={LENGTH: "0"}, app=app), 415, ErrorMessage.IMAGE_FORMAT)

    @pytest.mark.parametrize(
        "kind", ["application/x-pickle", "application/vnd.bentoml+pickle", "multipart/form-data", "text/xml"]
    )
    def test_content_types_of_another_world(self, app: FastAPI, kind: str) -> None:
        """JSON among them is told which header it lacks."""
        headers = {"content-type": kind}
        refused(infer({"inputs": [image_tensor(1)]}, headers=headers, app=app), 415, ErrorMessage.JSON_TYPE)
        refused(infer(png(), headers=headers, app=app), 415, ErrorMessage.V2_TYPE)


class TestPieces:
    def test_quantise_takes_every_level_back_to_itself(self) -> None:
        levels = np.arange(256, dtype=np.uint8)
        assert (quantise(levels / np.float32(255)) == levels).all()
        assert (quantise(np.array([0.0, 0.4999 / 255, 0.5001 / 255, 1.0], np.float32)) == [0, 0, 1, 255]).all()

    def test_flatten_is_row_major(self) -> None:
        assert flatten([[[1, 2], [3, 4]]], [1, 2, 2]) == [1, 2, 3, 4]


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_tensors_of_the_library_s_size_are_taken_and_all_others_refused_by_its_shape(datatype: str) -> None:
    manager = stand_in_of(LARGER)
    app = public_app(manager)
    level = 110 if datatype == "UINT8" else 110 / 255
    right = pixel_tensor(shape=[2, 3, 48, 64], datatype=datatype, data=[level] * (2 * LARGER.numel))
    assert outputs_of(infer({"inputs": [right]}, app=app))["label"] == [CLASSES[4]] * 2
    assert [rows.shape for rows in manager.scheduler.rows] == [(2, 3, 48, 64)]
    for shape in ([1, 3, 32, 32], [1, 3, 64, 48], [1, 48, 64, 3], [4, 3, 24, 32], [3, 48, 64]):
        wrong = pixel_tensor(shape=shape, datatype=datatype, data=[level] * int(np.prod(shape)))
        text = refused(infer({"inputs": [wrong]}, app=app), 400, ErrorMessage.V2_SHAPE_PIXELS)
        assert "[N, 3, 48, 64]" in text
    short = binary_tensor(bytes(LARGER.numel - 1), shape=[1, 3, 48, 64])
    refused(infer({"inputs": [short]}, bytes(LARGER.numel - 1), app=app), 400, ErrorMessage.V2_BINARY_SIZE)


def test_a_request_holds_no_more_images_than_the_memory_for_pixels_whatever_their_size() -> None:
    """3 MiB are 341 pictures of 48x64, and more than the 512 of a request of 32x32."""
    for manager, most in ((stand_in_of(LARGER), 341), (StandIn(), 512)):
        app = public_app(manager, pixel_memory_bytes=MAX_PICTURE_BYTES)
        assert ask(app, "GET", "/v2/models/tombola/config").json()["max_batch_size"] == most
        text = refused(infer({"inputs": [image_tensor(*[110] * (most + 1))]}, app=app), 413)
        assert text == ErrorMessage.IMAGES_TOO_MANY.format(limit=most)
        assert infer({"inputs": [image_tensor(*[110] * most)]}, app=app).is_success


def test_images_that_are_decoded_or_wait_share_the_memory_for_pixels() -> None:
    """Two requests of two thirds of it: the second is refused until the first is answered, or hung up on."""

    async def run() -> None:
        manager, metrics = stand_in_of(LARGER), Metrics()
        manager.scheduler.hold = asyncio.Event()
        app = public_app(manager, metrics, pixel_memory_bytes=MAX_PICTURE_BYTES)
        content = {"inputs": [image_tensor(*[110] * 227)]}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tombola") as client:
            first = asyncio.ensure_future(client.post(INFER, json=content))
            await manager.scheduler.submitted.wait()
            refused(await client.post(INFER, json=content), 503, ErrorMessage.FULL)
            assert metrics.value("shed_total", reason="queue") == 1
            manager.scheduler.hold.set()
            assert (await first).status_code == 200
            assert (await client.post(INFER, json=content)).status_code == 200
        assert app.state.protocol.data_plane.pixel_bytes == 0

    asyncio.run(run())


def test_a_picture_of_any_size_becomes_one_of_the_library_s() -> None:
    manager = stand_in_of(LARGER)
    outputs = outputs_of(infer({"inputs": [image_tensor(110)]}, app=public_app(manager)))
    assert outputs["label"] == [CLASSES[4]]
    assert [rows.shape for rows in manager.scheduler.rows] == [(1, 3, 48, 64)]


def test_labels_of_any_alphabet_travel_in_binary_and_json() -> None:
    manager = StandIn()
    manager.library.classes = ("котка", "犬", *CLASSES[2:])
    app = public_app(manager)
    requested = [{"name": "label", "parameters": {"binary_data": True}}]
    assert outputs_of(infer({"inputs": [image_tensor(10, 30)], "outputs": requested}, app=app))["label"] == [
        "котка",
        "犬",
    ]
    assert outputs_of(infer({"inputs": [image_tensor(10, 30)]}, app=app))["label"] == ["котка", "犬"]


def test_outcomes_are_counted() -> None:
    metrics = Metrics()
    app = public_app(metrics=metrics)
    infer({"inputs": [image_tensor(1)]}, app=app)
    infer(b"{}", app=app)
    assert metrics.value("inference_requests_total", outcome="ok") == 1
    assert metrics.value("inference_requests_total", outcome="invalid") == 1
    assert metrics.value("compute_seconds_count", stage="decode") == 1
    assert metrics.value("compute_seconds_count", stage="encode") == 1
    assert metrics.value("http_request_body_bytes_count") == 2
