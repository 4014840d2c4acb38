"""Our processes in tests without their imports: forked from a process that has imported torch already.

A command imports for two to five seconds of processor time, and the tests start some hundred. Files whose subject is
not the start itself use the fixture `warm_start`: then `subprocess.Popen` forks `python -m MODULE` for MODULES. The
new process is a child of the test's own, with its own arguments, environment, folder, descriptors and session; only
its modules were imported before.
"""

import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.support.waiting import until

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = sys.executable
MODULES: Final = ("tombola", "service.engine.fork_server", "service.admin.audit_worker")
PRELOADED: Final = (  # not OpenVINO, which starts a thread
    "service.lifecycle",
    "service.audit.run",
    "service.engine.factory",
    "tombola.commands.serve",
    "training.run_job",
)
READ_AT_IMPORT: Final = ("PYTHON", "LD_", "LANG", "LC_", "PROMETHEUS_")
"""How the names of variables begin that count while a process imports: with others of them it starts from nothing."""
CHILD_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER
LARGEST: Final = 1 << 17  # bytes of a request
FREE: Final = 512  # descriptors from this number on are not in use
SIGNATURE: Final = tuple(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]  # type: ignore[attr-defined]


@dataclass
class Origin:
    """The process that others are forked from, seen from the test's."""

    control: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """The pid of a new child of this process."""
        with self.lock, adoption():
            socket.send_fds(self.control, [json.dumps(request).encode()], descriptors)
            pid = int(self.control.recv(64) or b"0")
        if not pid:
            raise ChildProcessError("the process to fork from has ended; its error is above")
        return pid


@contextmanager
def adoption() -> Iterator[None]:
    """Meanwhile, descendants whose parent ends become children of this process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(CHILD_SUBREAPER, 0)


@contextmanager
def started_origin() -> Iterator[Origin]:
    """A new one, which ends when left; what was forked from it goes on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = theirs.fileno()
    command = [PYTHON, "-m", "tests.support.warm_start", str(descriptor)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests give it to every process of ours
    with subprocess.Popen(command, cwd=ROOT, env=variables, pass_fds=[descriptor], stdin=subprocess.DEVNULL), ours:
        theirs.close()
        yield Origin(ours)


class WarmPopen(subprocess.Popen[Any]):
    """A Popen that forks a command of ours where it can."""

    origin: ClassVar[Origin]

    def _execute_child(self, *words: Any) -> None:
        given = dict(zip(SIGNATURE, words, strict=True))
        if not can_fork(given):
            super()._execute_child(*words)  # type: ignore[misc]
            return
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        streams = [number if stream == -1 else stream for number, stream in enumerate(streams)]
        request = {
            "module": given["args"][2],
            "arguments": list(map(str, given["args"][3:])),
            "folder": str(given["cwd"] or Path.cwd()),
            "variables": dict(os.environ if given["env"] is None else given["env"]),
            "targets": [0, 1, 2, *given["pass_fds"]],
            "new_session": given["start_new_session"],
        }
        self.pid = self.origin.start(request, [*streams, *given["pass_fds"]])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]


def can_fork(given: Mapping[str, Any]) -> bool:
    """Whether it is `python -m MODULE` with nothing that only a start from nothing gives it."""
    args = given["args"]
    if not isinstance(args, list) or args[:2] != [PYTHON, "-m"] or args[2] not in MODULES:
        return False
    usual = {"gid": None, "gids": None, "uid": None, "umask": -1, "preexec_fn": None, "shell": False}
    if any(given[name] != value for name, value in usual.items()) or given["process_group"] not in (None, -1):
        return False
    return given["env"] is None or read_at_import(given["env"]) == read_at_import(os.environ)


def read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process reads while it imports, but for where our packages are."""
    chosen = {name: value for name, value in variables.items() if name.startswith(READ_AT_IMPORT)}
    return {name: value for name, value in chosen.items() if name != "PYTHONPATH"}


# The process that others are forked from


def serve(control: socket.socket) -> None:
    """Forks for each request; returns in the new process, ready to run its program, and when the socket is closed."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, *_ = socket.recv_fds(control, LARGEST, 64)
        if not message:
            return
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread runs: what it holds would be held for ever"
        pids, pid_of_child = os.pipe()
        between = os.fork()
        if between == 0:
            os.close(pids)
            begin(control, descriptors, json.loads(message), pid_of_child)
            return
        os.close(pid_of_child)
        os.waitpid(between, 0)
        control.send(os.read(pids, 64))
        for descriptor in (pids, *descriptors):
            os.close(descriptor)


def begin(control: socket.socket, descriptors: Sequence[int], request: Mapping[str, Any], pid_of_child: int) -> None:
    """Forks once more, so that the test's process adopts the new one when this one ends, and runs the program there.

    pid_of_child: where its pid is written to.
    """
    between = os.getpid()
    pid = os.fork()
    if pid:
        os.write(pid_of_child, str(pid).encode())
        os._exit(0)
    until(lambda: os.getppid() != between)
    os.close(pid_of_child)
    control.close()
    high = [fcntl(descriptor, F_DUPFD, FREE) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, target in zip(high, request["targets"], strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    open_streams()
    if request["new_session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    time.tzset()
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def open_streams() -> None:
    """Python's three streams anew, since what they can do depends on what lies behind them."""
    for descriptor, (name, mode, buffering) in enumerate((("stdin", "r", -1), ("stdout", "w", -1), ("stderr", "w", 1))):
        old = getattr(sys, name)
        new = open(descriptor, mode, buffering, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
