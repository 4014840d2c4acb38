"""Tickets in processes of their own: the service's side of it.

Threads that run tickets would share one interpreter with the event loop, and a crash inside a native library would end
the service. So a fork server (`service/engine/fork_server.py`) opens and compiles the library once, and forks a worker
process for each core. They share its memory. A worker runs one shard of a batch at a time. One that dies or hangs is
replaced by another fork within milliseconds. Closing their sockets, as the end of the service does, ends them all.
"""

import contextlib
import os
import queue
import signal
import socket
import struct
import subprocess
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection

from model_store.library import Library
from service.engine.base import Engine, Heartbeat, Images, JobResult, Jobs, Logits
from service.engine.errors import EngineDied, EngineRejected
from service.engine.ipc import ERROR, HEARTBEAT, READY, WORD, decode_result, encode_request
from service.engine.launcher import ForkServer, close
from service.settings import Settings


def open_in_processes(library: Library, settings: Settings, server: ForkServer) -> Engine:
    """The library's tickets, compiled by a fork server, which proved that they are this library's.

    server: one that was started for this library.  Raises EngineRejected.
    """
    description = server.wait()
    if "refused" in description or description["digest"] != library.digest:
        server.close()
        raise EngineRejected(description.get("refused", f"{library.path}: changed while it was being opened"))
    del description["digest"]
    description |= {name: tuple(description[name]) for name in ("macs", "input_shape")}
    pool = ProcessPool(server.control, server.popen, len(library.classes), settings.engine_timeout_s)
    try:
        pool.fill(description["threads"])
    except EngineDied as error:
        raise EngineRejected(f"engine {description['name']}: {error}") from None
    return Engine(forward=pool.forward, run_remote=pool.run, pids=pool.pids, **description)


@dataclass(frozen=True)
class WorkerProcess:
    """One fork. It has proved itself: its logits are the fork server's."""

    pid: int
    connection: Connection


class ProcessPool:
    """Worker processes that are free.

    A thread takes one for each shard, and forks one where none is free. So there are never more workers than threads.
    timeout_s: how long a worker may be silent.
    """

    def __init__(self, control: Connection, popen: "subprocess.Popen[bytes]", classes: int, timeout_s: float) -> None:
        self.control = control
        self.fork_server = popen.pid
        self.workers: set[int] = set()
        self.classes = classes
        self.timeout_s = timeout_s
        self.lock = threading.Lock()
        self.free: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        weakref.finalize(self, close, control, popen).atexit = False  # the system closes sockets then

    def fill(self, processes: int) -> None:
        for process in [self.spawn() for _ in range(processes)]:
            self.free.put(process)

    def pids(self) -> list[int]:
        return [self.fork_server, *list(self.workers)]

    def spawn(self) -> WorkerProcess:
        """Raises EngineDied."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(self.timeout_s))
        with self.lock, theirs:
            try:
                with socket.socket(fileno=os.dup(self.control.fileno())) as control:
                    socket.send_fds(control, [b"\0"], [theirs.fileno()])
                if not self.control.poll(self.timeout_s):
                    raise TimeoutError
                (pid,) = WORD.unpack(self.control.recv_bytes())
            except (EOFError, OSError):
                ours.close()
                raise EngineDied("the fork server has ended, or hangs") from None
        process = WorkerProcess(pid, Connection(ours.detach()))
        self.workers.add(pid)
        if self.receive(process) != WORD.pack(READY):
            self.discard(process)
            raise EngineDied("a new worker process sent something else than that its logits are right")
        return process

    def discard(self, process: WorkerProcess, *, hangs: bool = False) -> None:
        """hangs: it still holds its end of the connection, so its pid is still its own and may be killed."""
        self.workers.discard(process.pid)
        if hangs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        process.connection.close()

    def receive(self, process: WorkerProcess) -> bytes:
        """Its next message. Raises EngineDied, and discards it, if it has died or is silent for too long."""
        try:
            return process.connection.recv_bytes()
        except BlockingIOError:  # the socket's own limit
            self.discard(process, hangs=True)
            raise EngineDied("a process of the engine hung") from None
        except (EOFError, OSError):
            self.discard(process)
            raise EngineDied("a process of the engine died") from None

    def run(self, images: Images, jobs: Jobs, heartbeat: Heartbeat) -> list[JobResult]:
        """Raises RuntimeError with the type of what a worker raised, EngineDied."""
        process = self.acquire_and_send(encode_request(images, jobs))
        while (message := self.receive(process))[: WORD.size] == WORD.pack(HEARTBEAT):
            heartbeat()
        self.free.put(process)
        payload = message[WORD.size :]
        if message[: WORD.size] == WORD.pack(ERROR):
            raise RuntimeError(payload.decode())
        return decode_result(payload, jobs, self.classes)

    def acquire_and_send(self, message: bytes) -> WorkerProcess:
        """A worker that has the message. If a free one has died, the next one is taken: nothing is lost."""
        while True:
            try:
                process = self.free.get_nowait()
            except queue.Empty:
                process = self.spawn()
            try:
                process.connection.send_bytes(message)
            except OSError:
                self.discard(process)
            else:
                return process

    def forward(self, member: int, images: Images) -> Logits:
        return self.run(images, [(member, list(range(len(images))))], lambda: None)[0][0]


def timeval(seconds: float) -> bytes:
    """A C `struct timeval`."""
    whole = int(seconds)
    return struct.pack("ll", whole, max(1, round(1e6 * (seconds - whole))))
