"""Starts the fork server, without torch: before the service imports what takes it seconds.

Nothing here is slow to import. So the fork server opens the library while the service itself is still starting.
"""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any, Final

from service.engine.errors import EngineRejected
from service.settings import PREFIX, Settings

FORWARDED_SETTINGS: Final = ("engine", "device", "threads", "state_dir", "precision", "int8_images", "log_level")
"""The settings that the fork server needs."""
NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class ForkServer:
    """A fork server that opens a library. on_step: called with each step that it reports, in the thread that waits."""

    control: Connection
    popen: "subprocess.Popen[bytes]"
    on_step: Callable[[str], None]

    def wait(self) -> dict[str, Any]:
        """The description of its engine, or {"refused": why}. Raises EngineRejected if it ended."""
        try:
            while "step" in (message := json.loads(self.control.recv_bytes())):
                self.on_step(message["step"])
        except (EOFError, OSError):
            self.control.close()
            raise EngineRejected(f"the engine's process ended with code {self.popen.wait()} while it opened") from None
        description: dict[str, Any] = message
        return description

    def close(self) -> None:
        """Ends it."""
        close(self.control, self.popen)


def start_fork_server(
    path: Path | None,
    settings: Settings,
    on_step: Callable[[str], None] = lambda _: None,
    *,
    background: bool = True,
) -> ForkServer:
    """Starts a process that opens the library in a folder (None: the embedded one) with OpenVINO. Does not wait for it.

    background: whether it stands back for requests that another library answers meanwhile.
    """
    ours, theirs = socketpair()
    forwarded = {name: value for name in FORWARDED_SETTINGS if (value := getattr(settings, name)) is not None}
    forwarded["engine"] = "openvino"
    arguments = json.dumps({"library": path, "settings": forwarded, "background": background}, default=str)
    command = [sys.executable, "-m", "service.engine.fork_server", str(theirs.fileno()), arguments]
    with theirs:
        popen = subprocess.Popen(  # noqa: S603 -- our own interpreter and module
            command,
            pass_fds=[theirs.fileno()],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the service, which drains first
        )
    return ForkServer(Connection(ours.detach()), popen, on_step)


def child_environment() -> dict[str, str]:
    """For a process of ours: where our packages are, and no setting, which it gets by other ways."""
    packages = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment["PYTHONPATH"] = os.pathsep.join([packages, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


def start_ahead(
    path: Path | str | None,
    settings: Settings,
    on_step: Callable[[str], None] = lambda _: None,
    *,
    gpu: bool,
    background: bool = True,
) -> ForkServer | None:
    """Starts the fork server of a library that is about to be opened for serving, beside what the caller does.

    None where no fork server is used, or torch has to choose first; and for a URL, which has to be fetched.

    gpu: whether there is one, or may be.  background: as start_fork_server has it.
    """
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not gpu)
    by_openvino = settings.engine != "torch" and importlib.util.find_spec("openvino") is not None
    in_processes = settings.engine_processes and sys.platform == "linux"
    if isinstance(path, str) or not (on_cpu and by_openvino and in_processes):
        return None
    return start_fork_server(path, settings, on_step, background=background)


def close(control: Connection, popen: "subprocess.Popen[bytes]") -> None:
    """Ends the fork server by closing its socket, and reaps it in a thread, so that no zombie stays."""
    control.close()
    threading.Thread(target=popen.wait, name="reap", daemon=True).start()
