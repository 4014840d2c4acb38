"""Tickets in processes of their own: the host's side, and a fork's.

Forking after everything is compiled takes milliseconds and no memory. It is safe because the host has no other thread
by then that could hold a lock; and each fork shows that its logits are the host's before it is given work.
"""

import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final, NoReturn

import numpy as np

from service.cpu import NICE_INFERENCE, die_with_parent, lower_priority
from service.engine.base import Engine, Logits, Rows, max_relative_error
from service.engine.ipc import HEARTBEAT, READY, WORD, decode_request, encode_error, encode_result

BEAT_S: Final = 0.25  # a fork that works shows life this often, if its tickets let it
SAME: Final = 1e-6  # the same code on the same numbers


def serve(descriptor: int, control: Connection, engine: Engine) -> None:
    """Forks a process for every socket that comes, and says its number, until the service closes its end."""
    rows = np.frombuffer(bytearray(os.urandom(2 * 3 * 32 * 32)), np.uint8).reshape(2, 3, 32, 32)
    expected = every_ticket(engine, rows)
    gc.collect()
    gc.freeze()  # no collection of a fork has to touch, and so copy, what they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=descriptor) as asked:
        while True:
            _, sockets, _, _ = socket.recv_fds(asked, 1, 1)
            if not sockets:
                return
            pid = os.fork()
            if pid == 0:
                asked.close()
                control.close()
                fork(Connection(sockets[0]), engine, rows, expected)
            os.close(sockets[0])
            control.send_bytes(WORD.pack(pid))


def every_ticket(engine: Engine, rows: Rows) -> Logits:
    return np.stack([engine.forward(member, rows) for member in range(len(engine.costs))])


def fork(connection: Connection, engine: Engine, rows: Rows, expected: Logits) -> NoReturn:
    """Proves itself, then works until the connection is closed."""
    with contextlib.suppress(EOFError, OSError):  # the service has ended, or has no use for this process any more
        die_with_parent(signal.SIGKILL)
        lower_priority(NICE_INFERENCE)
        if max_relative_error(every_ticket(engine, rows), expected) <= SAME:
            connection.send_bytes(WORD.pack(READY))
            while True:
                connection.send_bytes(answered(engine, connection.recv_bytes(), beat(connection)))
    os._exit(0)  # without the host's own way out


def answered(engine: Engine, message: bytes, alive: Callable[[], None]) -> bytes:
    try:
        return encode_result(engine.run(*decode_request(message), alive))
    except Exception as error:  # noqa: BLE001 -- whatever a backend raises is the asker's to handle
        return encode_error(error)


def beat(connection: Connection) -> Callable[[], None]:
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last > BEAT_S:
            last = time.monotonic()
            connection.send_bytes(WORD.pack(HEARTBEAT))

    return alive
