"""One port of the process: its socket, uvicorn on it, and how it ends without losing a request."""

import asyncio
import contextlib
import ctypes
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import uvicorn
from starlette.types import ASGIApp

from service.settings import Settings, SettingsRejected
from service.web.http_protocol import HttpProtocol

BACKLOG: Final = 2048  # connections the kernel holds while the event loop is busy
SO_ATTACH_FILTER: Final = 26  # <asm-generic/socket.h>
BPF_RETURN: Final = 0x06  # BPF_RET | BPF_K, <linux/bpf_common.h>
SWITCH_S: Final = 0.00005  # a thread that waits for the interpreter gets it after so long; Python's own is 5 ms
LINGER_S: Final = 1.0  # between closing a port and closing its idle connections: a request may be on its way


class Server(uvicorn.Server):
    """One port. Signals are the process's business, not a plane's."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.listener = listener
        self.dup_listener = listener.dup()  # keeps the port open when the event loop has closed its own

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve_forever(self) -> None:
        await self.serve(sockets=[self.listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new connections, but none is turned away that was made before: not those the kernel holds, which a closed
        port would reset, and not those whose request is still on its way. While draining every answer ends its
        connection, so what is open now has not been used yet, or soon ends."""
        drop_new_connections(self.dup_listener)
        for server in self.servers:
            server.close()
        for connection in drain_accept_backlog(self.dup_listener):
            await asyncio.get_running_loop().connect_accepted_socket(self.protocol, connection)
        late = time.monotonic() + LINGER_S
        while self.server_state.connections and time.monotonic() < late:  # noqa: ASYNC110 -- uvicorn has no event
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)

    def protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made


def drop_new_connections(listener: socket.socket) -> None:
    """From now on the kernel drops whatever comes to this port, as if it had been lost. Without that, connections made
    between the last one accepted and the port's end would be reset, and their requests lost; these try again after a
    second, and are refused. Only Linux can do that."""
    if sys.platform == "linux":
        keep_nothing = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, 0))
        program = struct.pack("HP", 1, ctypes.addressof(keep_nothing))
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def drain_accept_backlog(listener: socket.socket) -> list[socket.socket]:
    """Closes the port, and returns the connections that had been made to it and not yet been accepted."""
    connections: list[socket.socket] = []
    listener.setblocking(False)
    with listener, contextlib.suppress(BlockingIOError):
        while True:
            connections.append(listener.accept()[0])
    return connections


def create_server(app: ASGIApp, settings: Settings, listener: socket.socket) -> Server:
    protocol = type("Protocol", (HttpProtocol,), {"header_timeout_s": settings.header_timeout_s})
    config = uvicorn.Config(
        app,
        http=cast("Any", protocol),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=cast("int", settings.keep_alive_s),
        timeout_graceful_shutdown=cast("int", settings.drain_timeout_s),
    )
    return Server(config, listener)


def bind(host: str, port: int, setting: str) -> socket.socket:
    """Listens on an address, or on the first one of a name. `::` takes both families where the system can do that."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(addresses, key=lambda each: each[0] != socket.AF_INET)
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(cast("Any", address), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise SettingsRejected(f"TOMBOLA_{setting} {host}:{port}: cannot listen there ({error.strerror})") from None


def bind_several(host: str, port: int, setting: str, count: int) -> list[socket.socket]:
    """So many sockets that listen on one address; the kernel shares connections out among them. Only Linux does so.

    Such a port can also be taken by another program of this user, so a socket of the usual kind looks first.
    """
    if count == 1:
        return [bind(host, port, setting)]
    with bind(host, port, setting) as first:
        address, family = first.getsockname(), first.family
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return [
            socket.create_server(
                cast("Any", address), family=family, backlog=BACKLOG, reuse_port=True, dualstack_ipv6=both
            )
            for _ in range(count)
        ]
    except OSError as error:
        raise SettingsRejected(f"TOMBOLA_{setting} {host}:{port}: cannot listen there ({error.strerror})") from None


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is there."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
