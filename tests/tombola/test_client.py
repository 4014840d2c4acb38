"""The Python client against real servers: answers, refusals in the server's words, retries, deadlines, audits."""

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.admin import audit_process
from service.audit.events import CheckEvent, StepEvent
from service.errors import ErrorMessage, Overloaded
from tests.service.admin.test_audit_jobs import SMOKE, Plane
from tests.support.audit_models import tiny
from tests.support.http_server import running
from tests.support.planes import TOKEN, StandIn, behind_a_port, picture, png, public_app
from tests.support.serving import serving, tiny_library
from tests.support.tickets import CLASSES
from tombola import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineExpired,
    ImageUnreadable,
    Prediction,
    RequestRefused,
    ServiceUnreachable,
    StablePrediction,
)
from tombola.client import bounded_map, encode, retry_after_s

pytestmark = pytest.mark.usefixtures("warm_start")

GOOD = (
    b'{"request_id": "r", "library": "d", "predictions": [{"label": "cat", "index": 3, "probability": 0.5, '
    b'"top": [{"label": "cat", "index": 3, "probability": 0.5}]}]}'
)


@dataclass
class Scripted:
    """A server that answers each request by the next of a list: (status, headers, body). The last one stays."""

    url: str
    answers: list[tuple[int, dict[str, str], bytes]]
    times: list[float] = field(default_factory=list)
    timeouts_ms: list[int] = field(default_factory=list)


@contextmanager
def scripted(*answers: tuple[int, dict[str, str], bytes], delay_s: float = 0.0) -> Iterator[Scripted]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            script.times.append(time.monotonic())
            script.timeouts_ms.append(int(self.headers["tombola-timeout-ms"]))
            self.rfile.read(int(self.headers["content-length"]))
            status, headers, body = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            closing.wait(delay_s)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = Scripted(f"http://127.0.0.1:{server.server_port}", list(answers))
    with running(server):
        try:
            yield script
        finally:
            closing.set()


def both(url: str, call: Callable[[Client], Any], acall: Callable[[AsyncClient], Any], **options: Any) -> Any:
    """The same call by either client; the two outcomes, exceptions included."""

    async def asynchronous() -> Any:
        async with AsyncClient(url, **options) as client:
            return await acall(client)

    def outcome(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ClientError as error:
            return error

    def synchronous() -> Any:
        with Client(url, **options) as client:
            return call(client)

    return outcome(synchronous), outcome(lambda: asyncio.run(asynchronous()))


def classify_both(url: str, **options: Any) -> Any:
    return both(url, lambda c: c.classify(png()), lambda c: c.classify(png()), **options)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with behind_a_port(public_app()) as place:
        yield f"http://{place}"


def test_paths_bytes_arrays_and_pictures_give_the_same_answer(service: str, tmp_path: Path) -> None:
    image = picture(100)
    (tmp_path / "x.png").write_bytes(png(100))
    sources: list[Any] = [
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        png(100),
        np.asarray(image),
        image,
        image.convert("RGBA"),
    ]
    with Client(service) as client:
        answers = [client.classify(source) for source in sources]

    async def asynchronous() -> list[Prediction]:
        async with AsyncClient(service) as client:
            return [await client.classify(source) for source in sources]

    for answer in answers + asyncio.run(asynchronous()):
        assert (answer.label, answer.index, answer.probability) == (CLASSES[4], 4, 0.62)
        assert answer.top[0].label == CLASSES[4]
        assert len(answer.top) == 5
        assert len(answer.library) == 64


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "L", "LA", "P", "1"])
def test_a_picture_of_any_mode_of_colours_is_sent_as_it_looks(mode: str) -> None:
    shown = picture(100).convert(mode)
    with Image.open(io.BytesIO(encode(shown))) as sent:
        assert (np.asarray(sent.convert("RGB")) == np.asarray(shown.convert("RGB"))).all()


def test_where_the_server_shows_labels_alone_there_is_no_probability() -> None:
    with behind_a_port(public_app(output_detail="label")) as place, Client(f"http://{place}") as client:
        answer = client.classify(png(100))
    assert (answer.label, answer.probability, answer.top) == (CLASSES[4], None, ())


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (Path("/nowhere/x.png"), "/nowhere/x.png: No such file or directory"),
        ("a\0b", "embedded null byte"),
        (np.zeros((32, 32, 3), np.float32), r"an array of float32 \[32, 32, 3\]; expected uint8"),
        (np.zeros((3, 32, 32), np.uint8), r"an array of uint8 \[3, 32, 32\]; expected uint8 \[H, W, 3\]"),
        (17, "int: expected a path"),
        (Image.new("F", (2, 2)), "a picture of mode F that has no PNG form"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_sent(image: Any, text: str) -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(ImageUnreadable, match=text):
        client.classify(image)


def test_an_error_has_the_server_s_own_text_and_status(service: str) -> None:
    outcomes = both(service, lambda c: c.classify(b"no image"), lambda c: c.classify(b"no image"))
    for outcome in outcomes:
        assert isinstance(outcome, RequestRefused)
        assert (outcome.status, outcome.text) == (415, ErrorMessage.BODY_NEITHER)
    assert isinstance(classify_both(service + "/elsewhere")[0], RequestRefused)


def test_many_images_are_answered_in_order_and_a_bad_one_spoils_nothing(service: str) -> None:
    images = [png(25 * index + 12) for index in range(10)]
    images.insert(5, b"no image")

    async def asynchronous() -> list[Any]:
        async with AsyncClient(service) as client:
            return [each async for each in client.classify_many(images, concurrency=3)]

    with Client(service) as client:
        synchronous = list(client.classify_many(images, concurrency=3))
    for answers in (synchronous, asyncio.run(asynchronous())):
        refused = answers.pop(5)
        assert isinstance(refused, RequestRefused)
        assert refused.status == 415
        assert [answer.index for answer in answers if isinstance(answer, Prediction)] == list(range(10))


def test_no_more_is_read_or_run_at_once_than_allowed() -> None:
    running, most, read = 0, 0, 0
    lock, go = threading.Lock(), threading.Event()

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(100):
            read += 1
            yield item

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go.wait(0.01)
        with lock:
            running -= 1
        return item

    results = bounded_map(work, items(), 3)
    assert next(results) == 0
    assert read <= 6
    assert list(results) == list(range(1, 100))
    assert most == 3


@pytest.mark.parametrize("status", [503, 429])
def test_a_refusal_is_tried_again_when_its_retry_after_says_and_not_before(status: int) -> None:
    refusal = (status, {"retry-after": "1"}, b'{"error": "The server is full; try again."}')
    with scripted(refusal, (200, {}, GOOD), refusal, (200, {}, GOOD)) as script:
        outcomes = classify_both(script.url)
    assert [outcome.label for outcome in outcomes] == ["cat", "cat"]
    assert script.times[1] - script.times[0] >= 1
    assert script.times[3] - script.times[2] >= 1


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, {}),  # nothing says when
        (503, {"retry-after": "soon"}),
        (503, {"retry-after": "60"}),  # later than the caller waits
        (500, {"retry-after": "0"}),
        (504, {"retry-after": "0"}),
        (400, {"retry-after": "0"}),
    ],
)
def test_nothing_else_is_tried_again(status: int, headers: dict[str, str]) -> None:
    with scripted((status, headers, b'{"error": "A text."}'), (200, {}, GOOD)) as script, Client(script.url) as client:
        with pytest.raises(RequestRefused, match=f"^{status}: A text.$"):
            client.classify(png(), timeout_s=5)
        assert len(script.times) == 1


def test_a_server_that_always_refuses_is_left_alone_after_five_tries() -> None:
    with scripted((503, {"retry-after": "0"}, b'{"error": "Full."}')) as script:
        outcomes = classify_both(script.url)
    assert [outcome.text for outcome in outcomes] == ["Full.", "Full."]
    assert len(script.times) == 10


def test_the_time_is_told_to_the_server_and_kept_by_the_client() -> None:
    with scripted((200, {}, GOOD), delay_s=30) as script:
        started = time.monotonic()
        outcomes = classify_both(script.url, timeout_s=0.2)
        assert time.monotonic() - started < 20  # not the server's 30 s
    assert [type(outcome) for outcome in outcomes] == [DeadlineExpired, DeadlineExpired]
    assert all(100 < each <= 200 for each in script.timeouts_ms)


def test_a_deadline_of_the_server_arrives_in_its_words() -> None:
    manager = StandIn()
    manager.scheduler.error = None
    manager.scheduler.full = Overloaded(retry_after=30)
    with behind_a_port(public_app(manager)) as place:
        for outcome in classify_both(f"http://{place}", timeout_s=5):
            assert (outcome.status, outcome.text) == (503, ErrorMessage.FULL)
            assert outcome.retry_after_s == 30


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[]", b"{}", b'{"library": "d", "request_id": "r"}'])
def test_what_is_no_tombola_service_is_said_to_be_none(body: bytes) -> None:
    with scripted((200, {}, body)) as script:
        outcomes = classify_both(script.url)
    assert [type(outcome) for outcome in outcomes] == [ServiceUnreachable] * 2
    with scripted((502, {}, b"<html>bad gateway</html>")) as script:
        assert "bad gateway" in str(classify_both(script.url)[1])


def test_nobody_there_is_one_error_that_names_the_address() -> None:
    for outcome in classify_both("http://127.0.0.1:1"):
        assert isinstance(outcome, ServiceUnreachable)
        assert str(outcome).startswith("http://127.0.0.1:1/v1/classify: ConnectError")
    assert isinstance(classify_both("nonsense")[0], ServiceUnreachable)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"key": ""}, {"key": "a\nb"}, {"proxy": "ftp://x"}])
def test_arguments_that_cannot_be_used_are_refused(options: Any) -> None:
    with pytest.raises(ClientError):
        Client(**options)
    with pytest.raises(ClientError):
        AsyncClient(**options)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("7") == 7
    assert retry_after_s("") is None
    assert retry_after_s("-1") is None
    assert retry_after_s(formatdate(time.time() - 60, usegmt=True)) == 0
    later = retry_after_s(formatdate(time.time() + 60, usegmt=True))
    assert later is not None
    assert 50 < later <= 60


def prediction(label: str) -> Prediction:
    return Prediction(label, 0, None, (), "d", "r")


def test_a_stable_answer_has_a_label_only_if_all_draws_agree() -> None:
    agreed = StablePrediction.of([prediction("cat")] * 9)
    assert (agreed.label, agreed.agreement) == ("cat", 1)
    split = StablePrediction.of([prediction("dog"), *[prediction("cat")] * 3])
    assert (split.label, split.agreement, split.commonest.label) == (None, 0.75, "cat")


def test_stable_asks_for_as_many_draws_in_one_request_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = StandIn()
    with behind_a_port(public_app(manager)) as place:
        for outcome in both(f"http://{place}", lambda c: c.stable(png(), draws=9), lambda c: c.stable(png(), draws=9)):
            assert len(outcome.predictions) == 9
        assert [len(rows) for rows in manager.scheduler.rows] == [9, 9]
        monkeypatch.setattr("tombola.client.REQUEST_BYTES", 4 * len(png()))
        both(f"http://{place}", lambda c: c.stable(png(), draws=9), lambda c: c.stable(png(), draws=9))
    assert [len(rows) for rows in manager.scheduler.rows][2:] == [4, 4, 1] * 2


def test_a_real_service_answers(tmp_path: Path) -> None:
    tiny_library(tmp_path / "library")
    with serving(tmp_path / "library", tmp_path / "state") as process, Client(process.public) as client:
        assert client.classify(png()).label in CLASSES
        assert len(client.stable(png(), draws=5).predictions) == 5


def test_an_audit_is_started_watched_fetched_and_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_process, "NICENESS", 1)
    plane = Plane(tiny(tmp_path / "library", ("resnet18",)), tmp_path / "state")
    plane.jobs.start()
    try:
        with behind_a_port(plane.app) as place:
            with Client(admin_url=f"http://{place}", admin_token=TOKEN, timeout_s=300) as client:
                audit = client.start_audit(**SMOKE)
                events = list(client.watch_audit(audit.id))
                assert sum(isinstance(event, CheckEvent) for event in events) == 36
                assert any(isinstance(event, StepEvent) for event in events)
                assert client.audit(audit.id)["state"] == "done"
                assert client.audit_report(audit.id).audit.profile == "smoke"
                with pytest.raises(RequestRefused, match=r"^404: "):
                    client.audit("20200101-000000-00000000")
            asyncio.run(watch_asynchronously(f"http://{place}", audit.id, len(events)))
            with Client(admin_url=f"http://{place}") as client, pytest.raises(RequestRefused, match=r"^401: "):
                client.start_audit()
    finally:
        plane.jobs.stop()


async def watch_asynchronously(admin: str, audit: str, events: int) -> None:
    async with AsyncClient(admin_url=admin, admin_token=TOKEN, timeout_s=300) as client:
        assert len([event async for event in client.watch_audit(audit)]) == events
        assert (await client.audit_report(audit)).audit.profile == "smoke"
        queued = await client.start_audit(**SMOKE)
        await client.cancel_audit(queued.id)
        assert (await client.audit(queued.id))["state"] in ("cancelled", "running")
