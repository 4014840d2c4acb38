"""What a command does outside of itself: the files it makes, changes or removes, and the sockets it opens."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.serving import ROOT

CALLS: Final = (
    "network,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,symlink,symlinkat,link,linkat,mknod,mknodat"
)
CHANGES: Final = re.compile(r"O_CREAT|O_WRONLY|O_RDWR|O_TRUNC|O_APPEND")
PROXIES: Final = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "grpc_proxy")
TALK: Final = ("connect", "sendto", "sendmsg", "sendmmsg", "bind")
WITHOUT: Final = "strace is not installed, or this machine does not let it trace"


@dataclass
class Listener:
    """A proxy that answers nobody: `heard` is what was sent to it, an entry a connection."""

    port: int
    heard: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return dict.fromkeys(PROXIES, self.url)


@contextmanager
def listening() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = Listener(server.getsockname()[1])

        def hear() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    try:
                        listener.heard.append(connection.recv(65536))
                    except OSError:
                        listener.heard.append(b"")

        thread = threading.Thread(target=hear)
        thread.start()
        try:
            yield listener
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@dataclass(frozen=True)
class Trace:
    """files: paths that were made or opened to be changed.  peers: IP addresses with ports that were named to a socket.

    programs: what was started.
    """

    files: frozenset[str]
    peers: frozenset[tuple[str, int]]
    programs: frozenset[str]


def bare(home: Path, temporary: Path, **variables: str) -> dict[str, str]:
    """A user's environment with an empty HOME, and no variable that would keep a package quiet, such as CI."""
    own = {name: value for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if (value := os.environ.get(name))}
    folders = {"HOME": str(home), "TMPDIR": str(temporary)}
    # The interpreter's own compiled sources lie beside them; that is no side effect of a command.
    quiet = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return own | folders | quiet | variables


def command(log: Path, *words: str) -> list[str]:
    """The words as a command of this interpreter, traced into `log` with every process that it starts."""
    trace = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-s", "128", "-e", f"trace={CALLS},execve", "-o", str(log)]
    return [*trace, sys.executable, *words]


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    words = [
        "strace",
        "-f",
        "-y",
        "-qq",
        "--seccomp-bpf",
        "-e",
        "trace=execve",
        "-o",
        os.devnull,
        sys.executable,
        "-c",
        "",
    ]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def read_trace(log: Path) -> Trace:
    files: set[str] = set()
    peers: set[tuple[str, int]] = set()
    programs: set[str] = set()
    for name, rest in calls(log.read_text(errors="replace").splitlines()):
        if name in TALK:
            peers.update(addresses(rest))
        elif name == "execve":
            programs.update(re.findall(r'^"([^"]*)"', rest))
        elif name in ("openat", "open", "creat"):
            if name == "creat" or CHANGES.search(rest):
                files.update(paths(rest)[:1])
        elif name in CALLS.split(","):
            files.update(paths(rest))
    return Trace(frozenset(files), frozenset(peers), frozenset(programs))


def calls(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, arguments and result) of every call that did not fail, those that another process interrupted included.

    A call on the network counts whether it failed or not: without a network it would not have.
    """
    begun: dict[tuple[str, str], str] = {}
    for line in lines:
        pid, _, text = line.partition(" ")
        text = text.strip()
        if part := re.match(r"(\w+)\((.*) <unfinished \.\.\.>$", text):
            begun[pid, part[1]] = part[2]
            continue
        if part := re.match(r"<\.\.\. (\w+) resumed>(.*)$", text):
            whole = (part[1], begun.pop((pid, part[1]), "") + part[2])
        elif part := re.match(r"(\w+)\((.*)$", text):
            whole = (part[1], part[2])
        else:
            continue
        if whole[0] in TALK or not re.search(r"\) += -1 E", whole[1]):
            yield whole


def paths(rest: str) -> list[str]:
    """Every path among the arguments, whole where `-y` shows the folder that a relative one is meant from.

    A relative path of rename(2) or mkdir(2) stays relative, and so counts as outside of every allowed folder.
    """
    resolved = []
    for folder, name in re.findall(r'(?:\b\w+<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', rest):
        resolved.append(os.path.normpath(Path(folder, name)))
    return resolved


def addresses(rest: str) -> Iterator[tuple[str, int]]:
    for family in re.findall(r"\{sa_family=AF_INET6?,[^}]*\}", rest):
        port = re.search(r"sin6?_port=htons\((\d+)\)", family)
        host = re.search(r'inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"', family)
        if port and host:
            yield host[1] or host[2], int(port[1])


def outside(trace: Trace, *allowed: Path) -> list[str]:
    """The files of a trace that lie in none of the allowed folders, and are no device."""
    inside = [f"{folder}/" for folder in (*map(str, allowed), "/dev", "/proc")]
    return sorted(path for path in trace.files if not f"{path}/".startswith(tuple(inside)))


def beyond_loopback(trace: Trace) -> list[tuple[str, int]]:
    """Whom a trace's processes called. Port 0 is not a call: it asks the system for an address of its own."""
    loopback = ("127.", "::1", "::ffff:127.")
    return sorted(peer for peer in trace.peers if not peer[0].startswith(loopback) and peer[1])


def left_behind(folder: Path, known: Mapping[str, str] | None = None) -> list[str]:
    """What lies in a folder when a command has ended, but for names that begin with one of `known`."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(tuple(known or ("\0",))))
