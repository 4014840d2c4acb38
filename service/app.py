"""Two planes in one process and one event loop, from the first socket to the last answer.

Start: ports are bound and live at once; ready only when the library is verified and warm. SIGTERM: not ready, yet
answering for drain_delay_s; then no new connections, what is in flight is answered, exit 0. SIGINT: the same without
the delay; a second signal: at once. SIGHUP: the library and the API keys are read again.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import torch
import uvicorn
from fastapi import APIRouter, FastAPI

from model_store.errors import StoreError
from service import errors
from service.admin import audit_api as audits
from service.admin import console_api, console_files, library_api
from service.admin.audit_jobs import AuditQueue
from service.audit.config import Audit
from service.library_manager import LibraryManager, LoadedLibrary
from service.observability import tracing
from service.observability.logs import configure_logging
from service.observability.metrics import Metrics, describe_build
from service.settings import (
    Settings,
    SettingsRejected,
    admin_token,
    cors_origins,
    ensure_state_dir,
    require_folders,
)
from service.web import classify, docs_files, open_inference
from service.web.auth import (
    ADMIN_SCHEMES,
    ADMIN_SECURITY,
    KEY_SCHEMES,
    KEY_SECURITY,
    AdminAuthMiddleware,
    ApiKeyStore,
)
from service.web.http_protocol import HttpProtocol
from service.web.inference import DataPlane
from service.web.middleware import (
    ConcurrencyLimitMiddleware,
    CrossOriginMiddleware,
    HeadMiddleware,
    RequestMetricsMiddleware,
)
from service.web.openapi import DocumentedApp
from service.web.schemas import ClassifyRequest, InferRequestBody

if TYPE_CHECKING:
    from service.grpc.server import GrpcServer

log = logging.getLogger(__name__)

PUBLIC_DESCRIPTION: Final = "Classifies images, by a protocol of its own and by the Open Inference Protocol, version 2."
ADMIN_DESCRIPTION: Final = "Shows and swaps the library, audits it, and publishes metrics. For operators alone."
BACKLOG: Final = 2048  # connections the kernel holds while the event loop is busy
SO_ATTACH_FILTER: Final = 26  # <asm-generic/socket.h>
BPF_RETURN: Final = 0x06  # BPF_RET | BPF_K, <linux/bpf_common.h>
LINGER_S: Final = 1.0  # between closing a port and closing its idle connections: a request may be on its way
SWITCH_S: Final = 0.00005  # an engine thread that waits for the interpreter gets it after so long; Python's own is 5 ms


def create_fastapi(**options: Any) -> FastAPI:
    """Documented by routes and files of our own, and without telemetry but our own; HEAD wherever GET is."""
    app = DocumentedApp(
        version=open_inference.product_version(),
        openapi_url=None,
        redirect_slashes=False,
        telemetry=tracing.FASTAPI_TELEMETRY_OFF,
        **options,
    )
    app.add_middleware(HeadMiddleware)
    app.include_router(docs_files.router(app.openapi))
    return app


def create_public_app(manager: LibraryManager, settings: Settings, metrics: Metrics, keys: ApiKeyStore) -> FastAPI:
    """Classification, health, and the Open Inference Protocol."""
    optional: Sequence[Any] = () if settings.api_keys_file else ({},)
    app = create_fastapi(
        title="Tombola",
        description=PUBLIC_DESCRIPTION,
        schemes=KEY_SCHEMES,
        security=[*optional, *KEY_SECURITY],
        requests=(ClassifyRequest, InferRequestBody),
    )
    classify.install(app, DataPlane(manager, settings, metrics, keys))
    app.add_middleware(
        ConcurrencyLimitMiddleware, limit=settings.max_requests, metrics=metrics
    )  # around the shortcut, too
    add_common_middleware(app, manager, settings, metrics, "public")
    if settings.tracing:
        tracing.install(app, open_inference.product_version(), settings.tracing_proxy)
    return app


def create_admin_app(
    manager: LibraryManager, settings: Settings, metrics: Metrics, token: str, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """Metrics and the library, and what `routers` add; all but metrics and health behind the token."""
    app = create_fastapi(
        title="Tombola, admin plane",
        description=ADMIN_DESCRIPTION,
        schemes=ADMIN_SCHEMES,
        security=ADMIN_SECURITY,
        requests=(Audit,),
    )
    for router in (library_api.router(manager, metrics), *routers):
        app.include_router(router)
    app.add_middleware(AdminAuthMiddleware, token=token, metrics=metrics, metrics_open=settings.metrics_open)
    return add_common_middleware(app, manager, settings, metrics, "admin")


def add_common_middleware(
    app: FastAPI, manager: LibraryManager, settings: Settings, metrics: Metrics, plane: str
) -> FastAPI:
    """The middlewares that stand around everything else; the last one added is the outermost."""
    errors.install(app)
    if plane == "public" and settings.cors_origins:
        app.add_middleware(CrossOriginMiddleware, origins=cors_origins(settings))
    app.add_middleware(
        RequestMetricsMiddleware, manager=manager, metrics=metrics, plane=plane, log_all=settings.log_requests
    )
    return app


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


def create_server(app: FastAPI, settings: Settings, listener: socket.socket) -> Server:
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
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(cast("Any", address), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise SettingsRejected(f"TOMBOLA_{setting} {host}:{port}: cannot listen there ({error.strerror})") from None


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass
class ServerProcess:
    """Everything that runs, and how it ends."""

    settings: Settings
    manager: LibraryManager
    keys: ApiKeyStore
    planes: tuple[Server, Server]
    public_url: str
    admin_url: str
    jobs: AuditQueue
    grpc: "GrpcServer | None" = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    delay: bool = True
    code: int = 0

    def on_signal(self, number: int) -> None:
        """SIGTERM and SIGINT. The second one of either kind ends the process without waiting for anybody."""
        if self.stop.is_set():
            self.hurry.set()
            for server in self.planes:
                server.should_exit = server.force_exit = True
            return
        log.info("signal %s: draining", signal.Signals(number).name)
        self.delay = number == signal.SIGTERM
        self.stop.set()

    def on_sighup(self) -> None:
        self.keys.reload()
        task = asyncio.ensure_future(self.reload())
        self.reloading = task  # a task that nobody holds may be collected

    async def reload(self) -> None:
        try:
            await self.manager.reload()
        except StoreError as error:
            log.error("library refused, the old one keeps serving: %s", error)  # noqa: TRY400 -- says all there is

    def on_broken(self) -> None:
        """The engine is dead for good: end, so that the platform starts the process again."""
        self.code, self.delay = 1, False
        self.stop.set()

    async def drain(self) -> None:
        """The public plane first; the admin plane keeps telling how that goes."""
        self.manager.drain()
        if self.delay:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.hurry.wait(), self.settings.drain_delay_s)


def create_service(
    settings: Settings, routers: Callable[[LibraryManager], Sequence[APIRouter]] = lambda _: ()
) -> ServerProcess:
    """Binds both ports and puts the parts together. Raises SettingsRejected."""
    metrics = Metrics()
    describe_build(metrics, open_inference.product_version(), settings.commit, torch.__version__)
    token, keys = admin_token(settings), ApiKeyStore(settings.api_keys_file, metrics)
    ensure_state_dir(settings)
    require_folders(settings)
    public_socket = bind(settings.host, settings.port, "PORT")
    admin_socket = bind(settings.admin_host, settings.admin_port, "ADMIN_PORT")
    manager = LibraryManager(settings, metrics)
    jobs = AuditQueue(settings, metrics, manager.library, url(public_socket))
    public_app = create_public_app(manager, settings, metrics, keys)
    console = (console_files.router(), console_api.router(manager, settings, metrics, jobs))
    admin_app = create_admin_app(manager, settings, metrics, token, (*console, audits.router(jobs), *routers(manager)))
    planes = (create_server(public_app, settings, public_socket), create_server(admin_app, settings, admin_socket))
    grpc = create_grpc_server(public_app.state.protocol) if settings.grpc else None
    service = ServerProcess(settings, manager, keys, planes, url(public_socket), url(admin_socket), jobs, grpc)
    manager.workers.on_broken = service.on_broken
    return service


def create_grpc_server(protocol: open_inference.OpenInferenceApi) -> "GrpcServer":
    """Binds its port. Raises SettingsRejected."""
    try:
        from service.grpc.server import GrpcServer
    except ImportError as error:
        raise SettingsRejected(f"TOMBOLA_GRPC: {error.name} is not installed; `pip install tombola[grpc]`") from None
    return GrpcServer(protocol, protocol.data_plane.settings)


Announce = Callable[[ServerProcess, LoadedLibrary], None]


async def serve(settings: Settings, announce: Announce, on_step: Callable[[str], None] | None = None) -> int:
    """Runs until told to end; the process's exit code. Raises SettingsRejected, StoreError."""
    service = create_service(settings)
    service.manager.on_step = on_step or service.manager.on_step
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, service.on_sighup)
    running = [asyncio.ensure_future(server.serve_forever()) for server in service.planes]
    if service.grpc is not None:
        await service.grpc.start()
    try:
        await wait_for_shutdown(service, announce)
    finally:
        await shut_down(service, running)
    return service.code


async def wait_for_shutdown(service: ServerProcess, announce: Announce) -> None:
    """Loads the library while the ports already answer, then waits for a signal."""
    loading = asyncio.ensure_future(service.manager.start())
    stop = asyncio.ensure_future(service.stop.wait())
    await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # told to end before the library was there
        loading.cancel()
        return
    service.delay = loading.exception() is None
    announce(service, loading.result())
    del loading  # it would keep the first library for good
    gc.collect()
    gc.freeze()  # what is there now stays: no collection has to walk over the library's objects again
    service.jobs.start()
    await stop


async def shut_down(service: ServerProcess, running: Sequence[Awaitable[None]]) -> None:
    await service.drain()
    await asyncio.to_thread(service.jobs.stop)
    if service.grpc is not None:
        await service.grpc.stop(0.0 if service.hurry.is_set() else service.settings.drain_timeout_s)
    for server, task in zip(service.planes, running, strict=True):
        server.should_exit = True
        await task
    service.manager.workers.stop()
    log.info("ended")


def run(settings: Settings, announce: Announce, on_step: Callable[[str], None] | None = None) -> int:
    """Serves in this thread until told to end. Raises SettingsRejected, StoreError.

    on_step: called with each step of loading a library; None to log it.
    """
    configure_logging(settings.log_level)
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(serve(settings, announce, on_step))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is there."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
