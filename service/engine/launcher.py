"""Starts fork servers. Imports nothing heavy: a start of the service begins with it, before torch is imported."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from service.settings import PREFIX, Settings

FORWARDED_SETTINGS: Final = ("engine", "device", "threads", "state_dir", "int8_images", "log_level")
"""The settings that the fork server needs."""
GPU_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # of the NVIDIA driver, on Linux and in WSL


@dataclass(frozen=True)
class ForkServer:
    """A process that opens a library, and then forks workers."""

    control: Connection
    popen: "subprocess.Popen[bytes]"

    def wait(self, on_step: Callable[[str], None]) -> dict[str, Any]:
        """The description of its engine, or {"refused": why}. Raises EOFError or OSError if it ended.

        on_step: called in this thread with each step that it reports.
        """
        while "step" in (message := json.loads(self.control.recv_bytes())):
            on_step(message["step"])
        description: dict[str, Any] = message
        return description

    def close(self) -> None:
        """Ends it."""
        close(self.control, self.popen)


def start_fork_server(path: Path | None, settings: Settings) -> ForkServer:
    """Starts a process that opens the library in a folder (None: the embedded one). Does not wait for it."""
    ours, theirs = socket.socketpair()
    forwarded = {name: value for name in FORWARDED_SETTINGS if (value := getattr(settings, name)) is not None}
    arguments = json.dumps({"library": path, "settings": forwarded | {"engine": "openvino"}}, default=str)
    packages = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment["PYTHONPATH"] = os.pathsep.join([packages, *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "service.engine.fork_server", str(theirs.fileno()), arguments]
    with theirs:
        popen = subprocess.Popen(  # noqa: S603 -- our own interpreter and module
            command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the service, which drains first
        )
    return ForkServer(Connection(ours.detach()), popen)


def start_early(settings: Settings) -> ForkServer | None:
    """The fork server of a service that is about to start; None where it will surely have none, or may have none."""
    if not settings.engine_processes or sys.platform != "linux" or settings.engine == "torch":
        return None
    if settings.device not in ("auto", "cpu") or importlib.util.find_spec("openvino") is None:
        return None
    if settings.device == "auto" and any(path.exists() for path in GPU_DEVICES):
        return None
    return start_fork_server(settings.library, settings)


def close(control: Connection, popen: "subprocess.Popen[bytes]") -> None:
    """Ends a fork server by closing its socket, and reaps it in a thread, so that no zombie stays."""
    control.close()
    threading.Thread(target=popen.wait, name="reap", daemon=True).start()
