"""Multipart bodies: what curl and httpx send, several parts, and every way of being wrong."""

import subprocess
import tracemalloc
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ErrorMessage, ServiceError
from service.web.form_data import read_parts
from tests.support.planes import ask, behind_a_port, png, public_app, refused

PATH: Final = "/v1/classify"
KIND: Final = "multipart/form-data; boundary=b"


def part(content: bytes, head: bytes = b'Content-Disposition: form-data; name="image"; filename="x.png"') -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


END: Final = b"--b--\r\n"


def send(body: bytes, kind: str = KIND, **settings: Any) -> httpx.Response:
    return ask(public_app(**settings), "POST", PATH, content=body, headers={"content-type": kind})


def test_each_part_is_an_image_whatever_its_name_and_type() -> None:
    files = [("image", ("x.png", png(10), "image/png")), ("other", ("y", png(110), "text/plain")), ("z", png(235))]
    predictions = ask(public_app(), "POST", PATH, files=files).json()["predictions"]
    assert [prediction["index"] for prediction in predictions] == [0, 4, 9]


def test_curl_sends_forms_and_uploads(tmp_path: Path) -> None:
    for red in (10, 110):
        (tmp_path / f"{red}.png").write_bytes(png(red))
    with behind_a_port(public_app()) as place:
        url = f"http://{place}{PATH}"
        for words in (["-F", "image=@10.png", "-F", "image=@110.png"], ["-T", "110.png"]):
            command = ["curl", "--silent", "--noproxy", "*", *words, url]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
            assert done.stdout.count('"label":"deer","index":4,"probability":0.62,"top"') == 1
            assert done.stdout.count('"top"') == (2 if words[0] == "-F" else 1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no parts",
        END,
        part(png()),  # the end is missing
        part(png())[:-1] + END,
        b"--c\r\n\r\n\r\n--c--\r\n",
        part(png(), b"No colon") + END,
        part(png(), b"\r\n".join([b"A: b"] * 20)) + END,
        part(png(), b"A: " + bytes(8192)) + END,
        part(png(), b'Content-Disposition: form-data; name="\xff"') + END,
    ],
)
def test_a_damaged_form_is_refused(body: bytes) -> None:
    refused(send(body), 400, ErrorMessage.MULTIPART)


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 71]
)
def test_a_boundary_is_needed(kind: str) -> None:
    refused(send(part(png()) + END, kind), 400, ErrorMessage.MULTIPART)


def test_the_limits_of_other_bodies_hold() -> None:
    three = part(png()) * 3 + END
    refused(send(three, max_images=2), 413, ErrorMessage.IMAGES_TOO_MANY)
    assert send(three, max_images=3).status_code == 200
    refused(send(part(bytes(2048)) + END, max_body_bytes=2048), 413, ErrorMessage.BODY_TOO_LARGE)
    refused(send(part(b"") + END), 400, ErrorMessage.IMAGE_EMPTY)
    refused(send(part(b"none") + END), 415, ErrorMessage.IMAGE_FORMAT)
    refused(send(part(png()) + END, "multipart/mixed; boundary=b"), 415, ErrorMessage.BODY_TYPE)


def test_a_form_of_many_parts_takes_no_more_memory_than_its_size() -> None:
    body = part(bytes(1000)) * 500 + END
    tracemalloc.start()
    parts = read_parts(body, KIND.encode(), 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(parts) == 500
    assert peak < 8 * len(body)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_parts_or_a_refusal(noise: bytes, at: int) -> None:
    body = part(b"x" * 20) * 2 + END
    for damaged in (noise, body[:at] + noise + body[at:]):
        try:
            parts = read_parts(damaged, KIND.encode(), 4)
        except ServiceError:
            continue
        assert 0 < len(parts) <= 4
