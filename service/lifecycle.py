"""The life of `tombola serve`: two planes in one process and one event loop, from the first socket to the last answer.

Start: ports are bound and live at once; ready only when the library is verified and warm. SIGTERM: not ready, yet
answering for drain_delay_s; then no new connections, what is in flight is answered, exit 0. SIGINT: the same without
the delay; a second signal: at once. SIGHUP: the library and the API keys are read again.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model_store.code_version import product_version
from model_store.errors import StoreError
from service.admin.audit_jobs import AuditQueue
from service.admin.traffic_history import TrafficHistory
from service.app import create_admin_app
from service.cpu import trim_heap
from service.engine.launcher import ForkServer
from service.http_processes.supervisor import HttpProcesses
from service.library_manager import LibraryManager, LoadedLibrary
from service.observability.logs import configure_logging
from service.observability.metrics import Metrics, describe_build
from service.settings import Settings, SettingsRejected, admin_token, ensure_state_dir, require_folders
from service.web.auth import ApiKeyStore
from service.web.open_inference import OpenInferenceApi
from service.web.public_app import create_public_app
from service.web.server import SWITCH_S, Server, bind, bind_several, create_server, loop_factory, url

if TYPE_CHECKING:
    from service.grpc.server import GrpcServer

log = logging.getLogger(__name__)


@dataclass
class ServerProcess:
    """Everything that runs, and how it ends."""

    settings: Settings
    manager: LibraryManager
    keys: ApiKeyStore
    planes: tuple[Server | HttpProcesses, Server]
    public_url: str
    admin_url: str
    jobs: AuditQueue
    history: TrafficHistory
    grpc: "GrpcServer | None" = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    force_exit: asyncio.Event = field(default_factory=asyncio.Event)
    delay: bool = True
    code: int = 0

    def on_signal(self, number: int) -> None:
        """SIGTERM and SIGINT. The second one of either kind ends the process without waiting for anybody."""
        if self.stop.is_set():
            self.force_exit.set()
            for server in self.planes:
                server.should_exit = server.force_exit = True
            return
        log.info("signal %s: draining", signal.Signals(number).name)
        self.delay = number == signal.SIGTERM
        self.stop.set()

    def on_sighup(self) -> None:
        self.keys.reload()
        if isinstance(self.planes[0], HttpProcesses):
            self.planes[0].reload_keys()
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
                await asyncio.wait_for(self.force_exit.wait(), self.settings.drain_delay_s)


def create_service(settings: Settings) -> ServerProcess:
    """Binds both ports and puts the parts together. Raises SettingsRejected."""
    metrics = Metrics()
    describe_build(metrics, product_version(), settings.commit, torch.__version__)
    token, keys = admin_token(settings), ApiKeyStore(settings.api_keys_file, metrics)
    ensure_state_dir(settings)
    require_folders(settings)
    listeners = bind_several(settings.host, settings.port, "PORT", settings.http_processes)
    admin_socket = bind(settings.admin_host, settings.admin_port, "ADMIN_PORT")
    manager = LibraryManager(settings, metrics)
    jobs = AuditQueue(settings, metrics, manager.library, url(listeners[0]))
    manager.libraries_in_use = jobs.libraries
    public_app = create_public_app(manager, settings, metrics, keys)
    history = TrafficHistory(metrics)
    admin_app = create_admin_app(manager, settings, metrics, token, jobs, history)
    protocol: OpenInferenceApi = public_app.state.protocol
    public: Server | HttpProcesses
    if settings.http_processes == 1:
        public = create_server(public_app, settings, listeners[0])
    else:
        public = HttpProcesses(settings, listeners, protocol.data_plane, manager, metrics)
    planes = (public, create_server(admin_app, settings, admin_socket))
    grpc = create_grpc_server(protocol) if settings.grpc else None
    urls = url(listeners[0]), url(admin_socket)
    service = ServerProcess(settings, manager, keys, planes, *urls, jobs, history, grpc)
    manager.on_broken = service.on_broken
    return service


def create_grpc_server(protocol: OpenInferenceApi) -> "GrpcServer":
    """Binds its port. Raises SettingsRejected."""
    try:
        from service.grpc.server import GrpcServer
    except ImportError as error:
        raise SettingsRejected(f"TOMBOLA_GRPC: {error.name} is not installed; `pip install tombola[grpc]`") from None
    return GrpcServer(protocol, protocol.data_plane.settings)


Announce = Callable[[ServerProcess, LoadedLibrary], None]


async def serve(
    settings: Settings,
    announce: Announce,
    on_step: Callable[[str], None] | None = None,
    fork_server: ForkServer | None = None,
) -> int:
    """Runs until told to end; the process's exit code. Raises SettingsRejected, StoreError."""
    service = create_service(settings)
    service.manager.on_step = on_step or service.manager.on_step
    service.manager.first_fork_server = fork_server
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, service.on_sighup)
    running = [asyncio.ensure_future(server.serve_forever()) for server in service.planes]
    sampling = asyncio.ensure_future(service.history.run())
    if service.grpc is not None:
        await service.grpc.start()
    try:
        await wait_for_shutdown(service, announce)
    finally:
        await shut_down(service, running)
        sampling.cancel()
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
    trim_heap()
    gc.freeze()  # what is there now stays: no collection has to walk over the library's objects again
    service.jobs.start()
    await stop


async def shut_down(service: ServerProcess, running: Sequence[Awaitable[None]]) -> None:
    await service.drain()
    await asyncio.to_thread(service.jobs.stop)
    if service.grpc is not None:
        await service.grpc.stop(0.0 if service.force_exit.is_set() else service.settings.drain_timeout_s)
    for server, task in zip(service.planes, running, strict=True):
        server.should_exit = True
        await task
    service.manager.workers.stop()
    log.info("ended")


def run(
    settings: Settings,
    announce: Announce,
    on_step: Callable[[str], None] | None = None,
    fork_server: ForkServer | None = None,
) -> int:
    """Serves in this thread until told to end. Raises SettingsRejected, StoreError.

    on_step: called with each step of loading a library; None to log it.  fork_server: one that opens it already.
    """
    configure_logging(settings.log_level)
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(serve(settings, announce, on_step, fork_server))
