"""The Python client of a running service: `Client`, and `AsyncClient` for asyncio.

What is sent and what is made of the answers is written once, as generators: they yield what to send or how long to
wait, and get the answer. Each of the two clients drives them with its own kind of connection.
"""

import asyncio
import base64
import email.utils
import io
import json
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from model_store.errors import TombolaError, os_error_text

if TYPE_CHECKING:
    import httpx
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from service.audit.events import Event
    from service.audit.report.model import Report

    ImageSource = str | os.PathLike[str] | bytes | Image | NDArray[np.uint8]

PUBLIC_URL: Final = "http://127.0.0.1:8000"
ADMIN_URL: Final = "http://127.0.0.1:8001"
RETRY_STATUSES: Final = (429, 503)  # refused before anything was computed
TRIES: Final = 5
REQUEST_BYTES: Final = 6 << 20  # encoded images of one request: well below the server's default limit of 16 MiB
ANSWER_BYTES: Final = 64 << 20  # the longest answer that is read
PENDING: Final = ("queued", "running")  # states of an audit that has not ended
COLOUR_MODES: Final = ("CMYK", "YCbCr", "LAB", "HSV", "RGBX")  # Pillow's that PNG lacks; a server converts files alike
POLL_S: Final = 1.0
GRACE_S: Final = 0.5  # beyond the time that the server is given: its own refusal says more
Result = TypeVar("Result")
Item = TypeVar("Item")


# Errors
#
# TombolaError
# └─ ClientError
#    ├─ ImageUnreadable    nothing was sent
#    ├─ RequestRefused     the server's status and its own text
#    ├─ DeadlineExpired    the client's own time is over
#    └─ ServiceUnreachable no connection, or no answer of such a service


class ClientError(TombolaError):
    """A call that got no answer."""


class ImageUnreadable(ClientError):
    """A path, an array or a picture that cannot be sent."""


class ServiceUnreachable(ClientError):
    """No connection, a connection that broke, or an answer that is not Tombola's."""


class DeadlineExpired(ClientError):
    """The time that the caller gave is over."""


class RequestRefused(ClientError):
    """The server's refusal, in its own words.

    status: of HTTP.  text: the server's.  retry_after_s: when to come back, if it said so.
    """

    def __init__(self, status: int, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text
        self.retry_after_s = retry_after_s


# Answers


@dataclass(frozen=True)
class ClassScore:
    """One of the likeliest classes. probability: as many digits as the server shows."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """One answer, made by one random ensemble. Another request is another draw.

    label, index: the likeliest class.
    probability: None where the server shows labels alone.
    top: the likeliest classes; empty where the server shows labels alone.
    library: digest of the library that answered.
    request_id: the server's, for its logs.
    """

    label: str
    index: int
    probability: float | None
    top: tuple[ClassScore, ...]
    library: str
    request_id: str


@dataclass(frozen=True)
class StablePrediction:
    """Several draws of one image.

    label: the class of all of them; None where they differ.
    agreement: share of the draws that gave the commonest class.
    predictions: one for each draw.
    """

    label: str | None
    agreement: float
    predictions: tuple[Prediction, ...]

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> Self:
        draws = tuple(predictions)
        (label, count), *others = Counter(draw.label for draw in draws).most_common()
        return cls(None if others else label, count / len(draws), draws)

    @property
    def commonest(self) -> Prediction:
        """A prediction of the class that most draws gave; of equals the first."""
        label = Counter(draw.label for draw in self.predictions).most_common(1)[0][0]
        return next(draw for draw in self.predictions if draw.label == label)


@dataclass(frozen=True)
class StartedAudit:
    """An audit in the server's queue. seconds: its estimated length."""

    id: str
    state: str
    seconds: float


# What is sent, and what is made of the answers


@dataclass(frozen=True)
class Call:
    """One request to send, and the time it may take."""

    method: str
    path: str
    timeout_s: float
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


Flow = Generator[Call | float, Answer | None, Result]
"""Yields a request, and gets its answer; or seconds to wait, and gets None."""


def exchange(method: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> Flow[Any]:
    """One request until it is answered, sent again only where the server says when. -> the answer's JSON.

    A connection that breaks is not tried again: the server may have answered, and another request is another draw.
    """
    ends_at = time.monotonic() + timeout_s
    for left in reversed(range(TRIES)):
        remaining_s = ends_at - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExpired(f"no answer within {timeout_s:g} s")
        limit = {"tombola-timeout-ms": str(max(1, int(remaining_s * 1000)))}
        answer = yield Call(method, path, remaining_s + GRACE_S, body, {**headers, **limit})
        if answer is None:
            raise TypeError("a call was not answered")
        if answer.status < 400:
            return parse(answer)
        refusal = refusal_of(answer)
        pause_s = refusal.retry_after_s if answer.status in RETRY_STATUSES else None
        if pause_s is None or left == 0 or time.monotonic() + pause_s >= ends_at:
            raise refusal
        yield pause_s
    raise AssertionError("unreachable: the last try returns or raises")


def parse(answer: Answer) -> Any:
    try:
        return json.loads(answer.body)
    except ValueError:
        raise ServiceUnreachable(f"status {answer.status} without JSON: this is no Tombola service") from None


def refusal_of(answer: Answer) -> RequestRefused:
    """With the server's text; a proxy's answer has none of that form."""
    try:
        text = str(json.loads(answer.body)["error"])
    except (ValueError, KeyError, TypeError):
        text = f"an answer that is not Tombola's: {answer.body[:200].decode('utf-8', 'replace').strip()!r}"
    return RequestRefused(answer.status, text, retry_after_s(answer.headers.get("retry-after", "")))


def retry_after_s(value: str) -> float | None:
    """Seconds from a Retry-After header, which holds a number or a date; None if it holds neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def draws_flow(data: bytes, draws: int, headers: Mapping[str, str], timeout_s: float) -> Flow[tuple[Prediction, ...]]:
    """So many draws of one encoded image, in as few requests as hold them: each image of a request has its own."""
    ends_at, predictions = time.monotonic() + timeout_s, list[Prediction]()
    most = max(1, REQUEST_BYTES // max(1, len(data)))
    while len(predictions) < draws:
        count = min(most, draws - len(predictions))
        body, kind = (data, {}) if count == 1 else (as_json(data, count), {"content-type": "application/json"})
        left_s = timeout_s if not predictions else ends_at - time.monotonic()
        fields = yield from exchange("POST", "/v1/classify", body, {**headers, **kind}, left_s)
        predictions += read_predictions(fields, count)
    return tuple(predictions)


def as_json(data: bytes, count: int) -> bytes:
    return json.dumps({"images": [base64.b64encode(data).decode()] * count}).encode()


def read_predictions(fields: Any, count: int) -> list[Prediction]:
    try:
        library, request_id = fields["library"], fields["request_id"]
        predictions = [
            Prediction(
                label=row["label"],
                index=row["index"],
                probability=row.get("probability"),
                top=tuple(ClassScore(**each) for each in row.get("top", ())),
                library=library,
                request_id=request_id,
            )
            for row in fields["predictions"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise ServiceUnreachable("an answer without predictions: this is no Tombola service") from None
    if len(predictions) != count:
        raise ServiceUnreachable(f"{len(predictions)} predictions for {count} images")
    return predictions


def encode(image: "ImageSource") -> bytes:
    """The bytes to send: a file's as they are, an array or a picture as PNG. Raises ImageUnreadable."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:
            text = os_error_text(error) if isinstance(error, OSError) else f"{image!r}: {error}"
            raise ImageUnreadable(text) from None
    return as_png(image)


def as_png(image: "Image | NDArray[np.uint8]") -> bytes:
    import numpy as np
    import PIL.Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ImageUnreadable(
                f"an array of {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3], [H, W, 4] or [H, W]"
            )
        image = PIL.Image.fromarray(image)
    if not isinstance(image, PIL.Image.Image):
        raise ImageUnreadable(f"{type(image).__name__}: expected a path, bytes, a uint8 array or a PIL image")
    buffer = io.BytesIO()
    if image.mode in COLOUR_MODES:
        image = image.convert("RGB")
    try:
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise ImageUnreadable(f"a picture of mode {image.mode} that has no PNG form: {error}") from None
    return buffer.getvalue()


def event_of(line: str) -> "Event | None":
    """An event of an audit from a line of the stream; None for other lines, and for the last, which is the state."""
    from service.audit.events import EVENT

    if not line.startswith("data: "):
        return None
    fields = json.loads(line.removeprefix("data: "))
    return EVENT.validate_python(fields) if "event" in fields else None


def started(fields: Any) -> StartedAudit:
    cost = fields["cost"]
    return StartedAudit(fields["id"], fields["state"], cost.get("seconds_now") or cost["seconds"])


class Connections:
    """What both clients are made of: where the planes are, and with which keys."""

    def __init__(
        self,
        url: str = PUBLIC_URL,
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        admin_url: str = ADMIN_URL,
        admin_token: str | None = None,
        proxy: str | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ClientError(f"timeout_s {timeout_s}: expected seconds above 0")
        self.url, self.admin_url = url.rstrip("/"), admin_url.rstrip("/")
        self.timeout_s, self.proxy = timeout_s, proxy
        self.headers = credentials("key", key)
        self.admin_headers = credentials("admin_token", admin_token)
        self.http: Any = self.connect()

    def connect(self) -> Any:
        """Of httpx, with that proxy and those time limits."""
        raise NotImplementedError

    def draws(self, data: bytes, draws: int, timeout_s: float | None) -> Flow[tuple[Prediction, ...]]:
        if draws < 1:
            raise ClientError(f"draws {draws}: expected at least 1")
        return draws_flow(data, draws, self.headers, self.timeout_s if timeout_s is None else timeout_s)

    def admin(self, method: str, path: str, fields: Any = None) -> Flow[Any]:
        body = b"" if fields is None else json.dumps(fields).encode()
        headers = {**self.admin_headers, "content-type": "application/json"}
        return exchange(method, path, body, headers, self.timeout_s)

    def target(self, path: str) -> str:
        return (self.admin_url if path.startswith("/admin/") else self.url) + path


def credentials(name: str, secret: str | None) -> dict[str, str]:
    if secret is None:
        return {}
    if not secret.strip() or not secret.isascii() or not secret.isprintable():
        raise ClientError(f"{name}: expected printable ASCII characters")
    return {"authorization": f"Bearer {secret}"}


class Client(Connections):
    """A client of a running service. Threads may share it; close it, or use it with `with`.

    Retries: only a refusal with 503 or 429, and only when its Retry-After says, within the call's time.
    Proxies of the environment are not used.

    Args:
      url: of the public plane.
      key: API key, where the service wants one.
      timeout_s: of each call, retries included; the server is told and gives up at the same time.
      admin_url: of the admin plane, for audits.
      admin_token: of the admin plane.
      proxy: URL of a proxy to ask through.

    Raises:
      ClientError: an argument that cannot be used. What calls raise is one of its kinds.
    """

    http: "httpx.Client"

    def connect(self) -> "httpx.Client":
        from service.outbound import http_client

        return connected(http_client, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self.http.close()

    def classify(self, image: "ImageSource", *, timeout_s: float | None = None) -> Prediction:
        """Classifies one image by one fresh random ensemble.

        Args:
          image: path, encoded bytes (PNG, JPEG, WebP), uint8 array [H, W, 3], or PIL image.
          timeout_s: of this call; None for the client's.

        Raises:
          ImageUnreadable, RequestRefused, DeadlineExpired, ServiceUnreachable.
        """
        return self.run(self.draws(encode(image), 1, timeout_s))[0]

    def stable(self, image: "ImageSource", *, draws: int = 9, timeout_s: float | None = None) -> StablePrediction:
        """Classifies one image several times; `label` is None unless all draws agree.

        What that is worth: let p be the probability, over θ, that an image is misread. One answer is wrong with p;
        k agreeing ones are all wrong with at most pᵏ. So luck with the draw is ruled out, as the threat model advises:
        ask more than once and take no answer if they differ. An image that fools the mean of all tickets has a p near
        1, and every draw agrees on the wrong class: this is no defence against it. Only an audit measures p.

        Args:
          image: as for classify.
          draws: ensembles that have to agree.
          timeout_s: of all draws together; None for the client's.

        Raises:
          ImageUnreadable, RequestRefused, DeadlineExpired, ServiceUnreachable.
        """
        return StablePrediction.of(self.run(self.draws(encode(image), draws, timeout_s)))

    def classify_many(
        self, images: "Iterable[ImageSource]", *, concurrency: int = 8, timeout_s: float | None = None
    ) -> Iterator[Prediction | ClientError]:
        """Classifies images as they come, so many at a time; yields in their order an answer or its error.

        Args:
          images: as for classify. They are read as far ahead as `concurrency` and no further.
          concurrency: requests at the same time.
          timeout_s: of each image; None for the client's.
        """

        def one(image: "ImageSource") -> Prediction | ClientError:
            try:
                return self.classify(image, timeout_s=timeout_s)
            except ClientError as error:
                return error

        return bounded_map(one, images, concurrency)

    def start_audit(self, profile: str = "smoke", **request: Any) -> StartedAudit:
        """Queues an audit of the served library.

        Args:
          profile: smoke, standard, full or reference.
          request: other fields of an audit's request, such as images, attacks, epsilons and data.

        Raises:
          RequestRefused, DeadlineExpired, ServiceUnreachable.
        """
        return started(self.run(self.admin("POST", "/admin/audits", {"profile": profile, **request})))

    def watch_audit(self, id: str) -> "Iterator[Event]":
        """Yields each event of an audit, from the first on, until it has ended."""
        seen = 0
        while True:
            pending = self.audit(id)["state"] in PENDING
            for place, event in enumerate(self.events(id)):
                if place >= seen:
                    yield event
                    seen = place + 1
            if not pending:
                return
            time.sleep(POLL_S)

    def events(self, id: str) -> "Iterator[Event]":
        """The stream of events as far as it goes: it may break where an attack takes long."""
        import httpx

        path = f"/admin/audits/{id}/events"
        try:
            with self.http.stream(
                "GET", self.target(path), headers=self.admin_headers, timeout=self.timeout_s
            ) as response:
                if response.is_error:
                    raise refusal_of(Answer(response.status_code, response.headers, response.read()))
                yield from filter(None, map(event_of, response.iter_lines()))
        except (httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ReadError):
            return
        except httpx.HTTPError as error:
            raise unreachable(self.target(path), error) from None

    def audit(self, id: str) -> dict[str, Any]:
        """An audit's state, request, progress and figures, as `GET /admin/audits/{id}` has them."""
        return dict(self.run(self.admin("GET", f"/admin/audits/{id}")))

    def cancel_audit(self, id: str) -> None:
        """Cancels an audit that waits or runs."""
        self.run(self.admin("DELETE", f"/admin/audits/{id}"))

    def audit_report(self, id: str) -> "Report":
        """A finished audit's report. Raises also AuditError: one whose digest does not hold."""
        from service.audit.report.model import parse_report

        path = f"/admin/audits/{id}/report.json"
        return parse_report(self.run(self.admin("GET", path)), self.target(path))

    def run(self, flow: Flow[Result]) -> Result:
        answer: Answer | None = None
        try:
            while True:
                step = flow.send(answer)
                if isinstance(step, Call):
                    answer = self.send(step)
                else:
                    time.sleep(step)
                    answer = None
        except StopIteration as end:
            result: Result = end.value
            return result

    def send(self, call: Call) -> Answer:
        import httpx

        ends_at, body = time.monotonic() + call.timeout_s, bytearray()
        try:
            with self.http.stream(
                call.method, self.target(call.path), content=call.body, headers=call.headers, timeout=call.timeout_s
            ) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    check_size(body)
                    if time.monotonic() > ends_at:
                        raise DeadlineExpired(f"no whole answer within {call.timeout_s:.3g} s")
                return Answer(response.status_code, response.headers, bytes(body))
        except httpx.TimeoutException:
            raise DeadlineExpired(f"no answer of {self.target(call.path)} within {call.timeout_s:.3g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.target(call.path), error) from None


class AsyncClient(Connections):
    """As Client, for asyncio: the same arguments and methods, awaited; close it with `aclose` or `async with`."""

    http: "httpx.AsyncClient"

    def connect(self) -> "httpx.AsyncClient":
        from service.outbound import async_http_client

        return connected(async_http_client, self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.http.aclose()

    async def classify(self, image: "ImageSource", *, timeout_s: float | None = None) -> Prediction:
        """As Client.classify."""
        return (await self.run(self.draws(await asyncio.to_thread(encode, image), 1, timeout_s)))[0]

    async def stable(self, image: "ImageSource", *, draws: int = 9, timeout_s: float | None = None) -> StablePrediction:
        """As Client.stable, where it says what agreement is worth."""
        data = await asyncio.to_thread(encode, image)
        return StablePrediction.of(await self.run(self.draws(data, draws, timeout_s)))

    async def classify_many(
        self, images: "Iterable[ImageSource]", *, concurrency: int = 8, timeout_s: float | None = None
    ) -> AsyncIterator[Prediction | ClientError]:
        """As Client.classify_many."""

        async def one(image: "ImageSource") -> Prediction | ClientError:
            try:
                return await self.classify(image, timeout_s=timeout_s)
            except ClientError as error:
                return error

        async for result in bounded_amap(one, images, concurrency):
            yield result

    async def start_audit(self, profile: str = "smoke", **request: Any) -> StartedAudit:
        """As Client.start_audit."""
        return started(await self.run(self.admin("POST", "/admin/audits", {"profile": profile, **request})))

    async def watch_audit(self, id: str) -> "AsyncIterator[Event]":
        """As Client.watch_audit."""
        seen = 0
        while True:
            pending = (await self.audit(id))["state"] in PENDING
            place = 0
            async for event in self.events(id):
                if place >= seen:
                    yield event
                place += 1
            seen = max(seen, place)
            if not pending:
                return
            await asyncio.sleep(POLL_S)

    async def events(self, id: str) -> "AsyncIterator[Event]":
        """As Client.events."""
        import httpx

        path = f"/admin/audits/{id}/events"
        try:
            async with self.http.stream(
                "GET", self.target(path), headers=self.admin_headers, timeout=self.timeout_s
            ) as response:
                if response.is_error:
                    raise refusal_of(Answer(response.status_code, response.headers, await response.aread()))
                async for line in response.aiter_lines():
                    if event := event_of(line):
                        yield event
        except (httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ReadError):
            return
        except httpx.HTTPError as error:
            raise unreachable(self.target(path), error) from None

    async def audit(self, id: str) -> dict[str, Any]:
        """As Client.audit."""
        return dict(await self.run(self.admin("GET", f"/admin/audits/{id}")))

    async def cancel_audit(self, id: str) -> None:
        """As Client.cancel_audit."""
        await self.run(self.admin("DELETE", f"/admin/audits/{id}"))

    async def audit_report(self, id: str) -> "Report":
        """As Client.audit_report."""
        from service.audit.report.model import parse_report

        path = f"/admin/audits/{id}/report.json"
        return parse_report(await self.run(self.admin("GET", path)), self.target(path))

    async def run(self, flow: Flow[Result]) -> Result:
        answer: Answer | None = None
        try:
            while True:
                step = flow.send(answer)
                if isinstance(step, Call):
                    answer = await self.send(step)
                else:
                    await asyncio.sleep(step)
                    answer = None
        except StopIteration as end:
            result: Result = end.value
            return result

    async def send(self, call: Call) -> Answer:
        import httpx

        try:
            async with asyncio.timeout(call.timeout_s):
                return await self.receive(call)
        except (TimeoutError, httpx.TimeoutException):
            raise DeadlineExpired(f"no answer of {self.target(call.path)} within {call.timeout_s:.3g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.target(call.path), error) from None

    async def receive(self, call: Call) -> Answer:
        body = bytearray()
        async with self.http.stream(
            call.method, self.target(call.path), content=call.body, headers=call.headers, timeout=call.timeout_s
        ) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                check_size(body)
        return Answer(response.status_code, response.headers, bytes(body))


def connected(connect: Callable[..., Result], client: Connections) -> Result:
    from service.outbound import ProxyRejected

    try:
        return connect(timeout_s=client.timeout_s, proxy=client.proxy)
    except ProxyRejected as error:
        raise ClientError(str(error)) from None


def check_size(body: bytearray) -> None:
    if len(body) > ANSWER_BYTES:
        raise ServiceUnreachable(f"an answer of more than {ANSWER_BYTES:,} bytes: this is no Tombola service")


def unreachable(url: str, error: Exception) -> ServiceUnreachable:
    return ServiceUnreachable(f"{url}: {type(error).__name__}: {error}".rstrip(": "))


def bounded_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Applies a function in threads. Yields in order, and reads items as far ahead as there are threads."""
    if workers < 1:
        raise ClientError(f"concurrency {workers}: expected at least 1")
    with ThreadPoolExecutor(workers, "tombola") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


async def bounded_amap(
    function: Callable[[Item], Awaitable[Result]], items: Iterable[Item], workers: int
) -> AsyncIterator[Result]:
    """As bounded_map, with tasks."""
    if workers < 1:
        raise ClientError(f"concurrency {workers}: expected at least 1")
    waiting: deque[asyncio.Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(asyncio.ensure_future(function(item)))
            if len(waiting) >= workers:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
