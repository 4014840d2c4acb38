"""Messages between the service and one of its HTTP processes: lines of JSON on a Unix socket. Nothing is unpickled.

From an HTTP process, `number` tells its requests apart:

| message | meaning |
| --- | --- |
| reserve, number, serial, size, client, deadline | so many images for the library of that serial: may they come in? |
| submit, number, start | the pixels of a granted request are in the shared memory from there on |
| release, number | the client has gone, or the images were refused: the reservation ends |
| metrics, increments, observations | what has been counted since the last time |
| inferences, statistics | the same for `/v2/models/stats` |
| statistics, number | what have all processes counted for it? |
| dropped, serial | no request uses that library any more |

From the service:

| message | meaning |
| --- | --- |
| state, serial, library, ready, draining | what is being served |
| granted, number | |
| answered, number | probabilities, float32 [size, classes], are where the pixels were |
| refused, number, kind, retry_after | an error's class; the reservation has ended |
| statistics, number, statistics | what all processes have counted |
| keys | read the file of API keys again |
| stop | answer what is there, then end |
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from pydantic_core import from_json, to_json

from service.web.http_protocol import WriteCoalescingTransport

Message = list[Any]


class Channel(asyncio.Protocol):
    """One end. Messages that are sent in one turn of the event loop leave together."""

    def __init__(self, receive: Callable[[Message], None], on_closed: Callable[[], None]) -> None:
        self.receive = receive
        self.on_closed = on_closed
        self.rest = b""
        self.transport: WriteCoalescingTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = WriteCoalescingTransport(cast("asyncio.Transport", transport), asyncio.get_running_loop())

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.receive(from_json(line))

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self.on_closed()

    def send(self, *message: Any) -> None:
        """Does nothing once the other end has gone."""
        if self.transport is not None:
            self.transport.write(to_json(message) + b"\n")

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
