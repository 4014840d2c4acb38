"""Small libraries and stand-in engines for the tests of the service's inside, and the real process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from model_store.input_spec import CIFAR10_INPUT
from model_store.library import Library, write_library
from model_store.policy import Policy
from model_store.structures import StructureName
from service.engine.base import Engine, Forward, Images
from service.observability.metrics import Metrics
from service.outbound import open_url
from service.scheduling.scheduler import AdmissionController, Scheduler
from service.scheduling.worker_pool import WorkerPool
from service.settings import Settings
from tests.support.tickets import CLASSES, items, make_ticket

ROOT: Final = Path(__file__).parents[2]
TOKEN: Final = "a-token-for-the-tests-alone"
TINY: Final[tuple[StructureName, ...]] = ("resnet18", "resnet34")
Answer = TypeVar("Answer")


def tiny_library(
    path: Path,
    *,
    seed: int = 0,
    structures: Sequence[StructureName] = ("resnet18", "resnet34"),
    policy: Policy | None = None,
) -> Library:
    """Two densities of each structure, at the smallest width; another seed is another library."""
    tickets = [
        make_ticket(name, density, seed=seed + 10 * index + place)
        for index, name in enumerate(structures)
        for place, density in enumerate((0.2, 0.5))
    ]
    return write_library(path, classes=CLASSES, data="random", tickets=items(tickets), policy=policy)


# A scheduler over an engine that is one function


def some_rows(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), np.uint8)


def marks_its_members(member: int, images: Images) -> NDArray[np.float32]:
    """Logits that are 1 for class `member` and 0 else: an answer then tells which tickets it came from."""
    logits = np.zeros((len(images), len(CLASSES)), np.float32)
    logits[:, member] = 1
    return logits


def engine(forward: Forward = marks_its_members, *, threads: int = 2, tickets: int = 4) -> Engine:
    return Engine("stand-in", "cpu", threads, forward, (1,) * tickets, CIFAR10_INPUT.shape, 0.0, "no network", 0.0)


def stand_in_library(policy: Policy) -> Any:
    ticket = SimpleNamespace(structure=SimpleNamespace(name="resnet18"), density=0.5)
    return SimpleNamespace(policy=policy, classes=CLASSES, tickets=(ticket,) * policy.tickets)


@dataclass
class Stand:
    """A scheduler on its own workers, as `standing` sets it up."""

    scheduler: Scheduler
    workers: WorkerPool
    admission: AdmissionController
    metrics: Metrics
    settings: Settings
    broken: list[bool] = field(default_factory=list)

    def check(self, size: int, client: str, left_s: float) -> None:
        self.scheduler.check(size, client, left_s)

    async def submit(
        self, images: Images, client: str = "someone", deadline: float | None = None
    ) -> NDArray[np.float32]:
        return await self.scheduler.submit(images, client=client, deadline=deadline)

    def task(self, images: Images, client: str = "someone", within_s: float | None = None) -> asyncio.Task[Any]:
        deadline = None if within_s is None else asyncio.get_running_loop().time() + within_s
        return asyncio.ensure_future(self.submit(images, client, deadline))

    def sibling(self, forward: Forward, policy: Policy) -> Scheduler:
        """Another library on the same workers."""
        library, other = stand_in_library(policy), engine(forward, tickets=policy.tickets)
        return Scheduler(library, other, self.workers, self.admission, self.settings, self.metrics)


def with_scheduler(
    test: Callable[[Stand], Awaitable[Answer]],
    *,
    forward: Forward = marks_its_members,
    policy: Policy | None = None,
    threads: int = 2,
    **overrides: Any,
) -> Answer:
    """Runs a coroutine of the test with a scheduler; default law: four tickets in two groups."""

    async def run() -> Answer:
        settings, metrics, law = Settings(**overrides), Metrics(), policy or Policy.over(["a", "a", "b", "b"])
        broken: list[bool] = []
        workers, admission = (
            WorkerPool(settings, metrics, lambda: broken.append(True)),
            AdmissionController(settings, metrics),
        )
        made = engine(forward, threads=threads, tickets=law.tickets)
        workers.start(threads)
        try:
            scheduler = Scheduler(stand_in_library(law), made, workers, admission, settings, metrics)
            return await test(Stand(scheduler, workers, admission, metrics, settings, broken))
        finally:
            workers.stop()

    return asyncio.run(run())


@contextmanager
def over_and_over(act: Callable[[], None], pause_s: float = 0.0) -> Iterator[None]:
    """Does it in a thread, again and again with a pause before each time, until left."""
    stopped = threading.Event()

    def repeat() -> None:
        while not stopped.wait(pause_s):
            act()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


# The real process


@dataclass
class Process:
    """`tombola serve`, ready."""

    process: subprocess.Popen[str]
    output: list[str]
    public: str
    admin: str

    def get(self, url: str, **headers: str) -> tuple[int, bytes]:
        return fetch(urllib.request.Request(url, headers=headers))

    def post(self, url: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        return fetch(urllib.request.Request(url, body, headers))

    def ready(self) -> bool:
        return self.get(f"{self.public}/health/ready")[0] == 200

    def classify(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"{self.public}/v1/classify", body, {"content-type": "image/png", **headers})
        status, answer = fetch(request)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        """The sum of a metric's series whose lines begin with `name`."""
        lines = self.get(f"{self.admin}/metrics")[1].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"tombola_{name}"))

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def fetch(request: urllib.request.Request) -> tuple[int, bytes]:
    try:
        with open_url(request, 60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def environment(**variables: str) -> dict[str, str]:
    """Ours without any setting of the service, with `variables`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TOMBOLA_")}
    return own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


@contextmanager
def serving(
    library: Path,
    state: Path,
    *flags: str,
    program: Sequence[str] = ("-m", "tombola"),
    without: Sequence[str] = (),
    **variables: str,
) -> Iterator[Process]:
    """The process on free ports, once it says it is ready. Killed if the test leaves it running.

    without, variables: of the environment, taken away and added.
    """
    command = [sys.executable, *program, "serve", "--library", str(library), "--state-dir", str(state)]
    command += ["--port", "0", "--admin-port", "0", "--engine", "torch", "--drain-delay-s", "0", *flags]
    inherited = {name: value for name, value in environment(**variables).items() if name not in without}
    with (state.parent / "log.jsonl").open("w") as log, running(command, inherited, log=log) as process:
        yield process


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    log: IO[str] | int = subprocess.DEVNULL,
) -> Iterator[Process]:
    """A command that serves, once it says it is ready. Killed if the test leaves it running.

    folder: its working folder.  log: where its log lines go.
    """
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
    ) as process:
        try:
            yield announced(process)
        finally:
            process.kill()


def announced(process: subprocess.Popen[str]) -> Process:
    output: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line.rstrip("\n"))
        if line.startswith("Ready"):
            break
    else:
        raise AssertionError(f"the service did not start: {output}, exit code {process.wait()}")
    urls = {line.split()[0]: line.split()[1] for line in output if line.split()[0] in ("public", "admin")}
    return Process(process, output, urls["public"], urls["admin"])
