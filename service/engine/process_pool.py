"""Tickets in processes of their own: the service's side of it.

Threads that run tickets would share one interpreter with the event loop, and a crash inside a native library would end
the service. So a host (`service/engine/fork_server.py`) opens and compiles the library once, and forks a process for
each core, which share its memory.
A process answers one part of a window at a time; one that dies or hangs is replaced by another fork,
within milliseconds. What ends the service or forgets the engine closes their sockets, and so ends them all.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from model_store.library import Library
from service.engine.base import Engine, EngineDied, EngineRejected, Heartbeat, JobResult, Jobs, Logits, Rows
from service.engine.ipc import FAILED, HEARTBEAT, READY, WORD, decode_result, encode_request
from service.settings import PREFIX, Settings

TOLD: Final = ("engine", "device", "threads", "state_dir", "int8_images", "log_level")
"""The settings that a host needs."""


def open_in_processes(library: Library, settings: Settings) -> Engine:
    """The library's tickets, compiled by a host, which proved that they are this library's. Raises EngineRejected."""
    control, popen = start_fork_server(library, settings)
    try:
        found = json.loads(control.recv_bytes())
    except (EOFError, OSError):
        control.close()
        raise EngineRejected(f"the engine's process ended with code {popen.wait()} while it opened") from None
    if "refused" in found or found["digest"] != library.digest:
        control.close()
        popen.wait()
        raise EngineRejected(found.get("refused", f"{library.path}: changed while it was being opened"))
    del found["digest"]
    found["costs"] = tuple(found["costs"])
    pool = Pool(control, popen, len(library.classes), settings.engine_timeout_s)
    try:
        pool.fill(found["threads"])
    except EngineDied as error:
        raise EngineRejected(f"engine {found['name']}: {error}") from None
    return Engine(forward=pool.forward, apart=pool.run, pids=pool.pids, **found)


def start_fork_server(library: Library, settings: Settings) -> "tuple[Connection, subprocess.Popen[bytes]]":
    ours, theirs = socket.socketpair()
    told = {name: value for name in TOLD if (value := getattr(settings, name)) is not None}
    words = json.dumps({"library": str(library.path), "settings": told}, default=str)
    packages = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment["PYTHONPATH"] = os.pathsep.join([packages, *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "service.engine.fork_server", str(theirs.fileno()), words]
    with theirs:
        popen = subprocess.Popen(  # noqa: S603 -- our own interpreter and module
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the service, which lets work end first
        )
    return Connection(ours.detach()), popen


@dataclass(frozen=True)
class Process:
    """One fork. It has proved itself: its logits are the host's."""

    pid: int
    connection: Connection


class Pool:
    """Processes that are free. A thread takes one for each part of a window, and a new one where there is none, so that
    there are never more than threads. timeout_s: how long one may be silent."""

    def __init__(self, control: Connection, popen: "subprocess.Popen[bytes]", classes: int, timeout_s: float) -> None:
        self.control = control
        self.host = popen.pid
        self.forks: set[int] = set()
        self.classes = classes
        self.timeout_s = timeout_s
        self.lock = threading.Lock()
        self.free: queue.SimpleQueue[Process] = queue.SimpleQueue()
        weakref.finalize(self, close, control, popen).atexit = False  # the system closes sockets then

    def fill(self, processes: int) -> None:
        for process in [self.spawn() for _ in range(processes)]:
            self.free.put(process)

    def pids(self) -> list[int]:
        return [self.host, *list(self.forks)]

    def spawn(self) -> Process:
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
                raise EngineDied("the process that starts the others has ended, or hangs") from None
        process = Process(pid, Connection(ours.detach()))
        self.forks.add(pid)
        if self.receive(process) != WORD.pack(READY):
            self.discard(process)
            raise EngineDied("a new process said something else than that its logits are right")
        return process

    def discard(self, process: Process, *, hangs: bool = False) -> None:
        """hangs: it holds its end of the connection, so its number is still its own."""
        self.forks.discard(process.pid)
        if hangs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        process.connection.close()

    def receive(self, process: Process) -> bytes:
        """What it says next. Raises EngineDied, and ends it, if it has died or is silent for too long."""
        try:
            return process.connection.recv_bytes()
        except BlockingIOError:  # the socket's own limit
            self.discard(process, hangs=True)
            raise EngineDied("a process of the engine hung") from None
        except (EOFError, OSError):
            self.discard(process)
            raise EngineDied("a process of the engine died") from None

    def run(self, rows: Rows, jobs: Jobs, alive: Heartbeat) -> list[JobResult]:
        """Raises RuntimeError with the name of what a process raised, EngineDied."""
        process = self.acquire_and_send(encode_request(rows, jobs))
        while (message := self.receive(process))[: WORD.size] == WORD.pack(HEARTBEAT):
            alive()
        self.free.put(process)
        answer = message[WORD.size :]
        if message[: WORD.size] == WORD.pack(FAILED):
            raise RuntimeError(answer.decode())
        return decode_result(answer, jobs, self.classes)

    def acquire_and_send(self, message: bytes) -> Process:
        """A process that has the message. One that died while it was free has cost nobody anything: the next one."""
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

    def forward(self, member: int, rows: Rows) -> Logits:
        return self.run(rows, [(member, list(range(len(rows))))], lambda: None)[0][0]


def timeval(seconds: float) -> bytes:
    """A timeval."""
    whole = int(seconds)
    return struct.pack("ll", whole, max(1, round(1e6 * (seconds - whole))))


def close(control: Connection, popen: "subprocess.Popen[bytes]") -> None:
    """The host ends when its socket is closed; somebody has to wait for it, lest it stay a zombie."""
    control.close()
    threading.Thread(target=popen.wait, name="reap", daemon=True).start()
