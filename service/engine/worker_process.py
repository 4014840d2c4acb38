"""Tickets in processes of their own: the fork server's side, and a worker's.

Forking after everything is compiled takes milliseconds and no memory. It is safe because the fork server has no other
thread by then that could hold a lock. Each worker proves that its logits are the fork server's before it gets work.
"""

import contextlib
import gc
import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from typing import Final, NoReturn

import numpy as np

from service.cpu import NICE_INFERENCE, die_with_parent, lower_priority
from service.engine.base import Engine, Heartbeat, Images, Logits, max_relative_error, random_images
from service.engine.ipc import HEARTBEAT, READY, WORD, decode_request, encode_error, encode_result

HEARTBEAT_S: Final = 0.25  # a worker that is busy sends a heartbeat this often, if its tickets let it
SAME: Final = 1e-6  # the same code on the same numbers


def serve(descriptor: int, control: Connection, engine: Engine) -> None:
    """Forks a worker for every socket that arrives, and sends its pid, until the service closes its end."""
    images = random_images(2, engine.input_shape)
    expected = run_all_tickets(engine, images)
    gc.collect()
    gc.freeze()  # no collection of a worker has to touch, and so copy, what they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=descriptor) as requests:
        while True:
            _, sockets, _, _ = socket.recv_fds(requests, 1, 1)
            if not sockets:
                return
            pid = os.fork()
            if pid == 0:
                requests.close()
                control.close()
                run_worker(Connection(sockets[0]), engine, images, expected)
            os.close(sockets[0])
            control.send_bytes(WORD.pack(pid))


def run_all_tickets(engine: Engine, images: Images) -> Logits:
    return np.stack([engine.forward(member, images) for member in range(len(engine.macs))])


def run_worker(connection: Connection, engine: Engine, images: Images, expected: Logits) -> NoReturn:
    """Proves itself, then works until the connection is closed."""
    with contextlib.suppress(EOFError, OSError):  # the service has ended, or has discarded this worker
        die_with_parent(signal.SIGKILL)
        lower_priority(NICE_INFERENCE)
        if max_relative_error(run_all_tickets(engine, images), expected) <= SAME:
            connection.send_bytes(WORD.pack(READY))
            while True:
                connection.send_bytes(respond(engine, connection.recv_bytes(), heartbeat_sender(connection)))
    os._exit(0)  # without the fork server's own way out


def respond(engine: Engine, message: bytes, heartbeat: Heartbeat) -> bytes:
    try:
        return encode_result(engine.run(*decode_request(message, engine.input_shape), heartbeat))
    except Exception as error:  # noqa: BLE001 -- the service handles whatever a backend raises
        return encode_error(error)


def heartbeat_sender(connection: Connection) -> Heartbeat:
    last = time.monotonic()

    def heartbeat() -> None:
        nonlocal last
        if time.monotonic() - last > HEARTBEAT_S:
            last = time.monotonic()
            connection.send_bytes(WORD.pack(HEARTBEAT))

    return heartbeat
