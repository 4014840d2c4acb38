"""Runs `tombola bench`: the engine alone, what an answer's time and digits reveal, rounding, and a server's cost."""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from model_store.files import write_atomically
from model_store.library import Library, open_library
from model_store.pages import END, replace_section
from model_store.policy import Theta, draw_theta
from model_store.structures import Network
from service.audit.errors import DataRejected
from service.audit.labelled_data import read_data
from service.benchmarks import SETTINGS, capacity, output_leakage, rounding, timing_leakage
from service.benchmarks.timing_leakage import scheduling
from service.engine.base import Engine, Images
from service.engine.errors import EngineRejected
from service.engine.factory import engine_threads, open_engine, open_for_serving
from service.library_source import local_library
from service.scheduling.scheduler import Scheduler
from service.settings import Settings, SettingsRejected, read_settings

CONCURRENT_CLIENTS: Final = 32


class Benchmark(NamedTuple):
    """measure: what is measured, with the arguments.  start: how its engine is opened.  table: for a page."""

    measure: Callable[[argparse.Namespace, Settings, Library, Engine], tuple[dict[str, Any], str]]
    start: Callable[[Library, Settings], Engine]
    table: Callable[[dict[str, Any]], str] | None = None


def run(arguments: argparse.Namespace) -> int:
    """Raises SettingsRejected for a device, an engine or data that cannot be used."""
    benchmark = BENCHMARKS[arguments.benchmark]
    settings = read_settings({name: value for name, value in vars(arguments).items() if name in SETTINGS})
    library = open_library(local_library(settings))
    try:
        engine = benchmark.start(library, settings)
        results, line = benchmark.measure(arguments, settings, library, engine)
    except (EngineRejected, DataRejected) as error:
        raise SettingsRejected(str(error)) from None
    whole = {"library": library.digest, "machine": machine(), "engine": described(engine), **results}
    print(json.dumps(whole, indent=2))
    if benchmark.table is not None and arguments.into is not None:
        mark, _, table = benchmark.table(whole).partition("\n")
        replace_section(arguments.into, (mark, END), table)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(whole, indent=2) + "\n")
    print(line)
    return 0


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "openvino": openvino_version(),
    }


def openvino_version() -> str:
    """From the package's metadata: importing it takes a second, and it is not everywhere."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def described(engine: Engine) -> dict[str, Any]:
    return {"name": engine.name, "device": engine.device, "threads": engine.threads, "note": engine.note}


# The engine by itself


def raw_engine(
    given: argparse.Namespace, settings: Settings, library: Library, engine: Engine
) -> tuple[dict[str, Any], str]:
    """Images per second on the same images and draws, one by one in torch and by the engine in windows; and, on draws
    of their own, for ASKERS who wait for answers: all of the server but HTTP and decoding."""
    rng = random.Random(given.seed)
    images = np.random.default_rng(given.seed).integers(0, 256, (given.images, *engine.input_shape), np.uint8)
    thetas = [draw_theta(library.policy, rng) for _ in range(given.images)]
    some = max(1, given.images // 8)
    networks = [ticket.network() for ticket in library.tickets]
    loop_rate = some / timed(lambda: reference_loop(library, networks, images[:some], thetas[:some]))
    grouped = given.images / timed(lambda: in_windows(engine, images, thetas, settings.max_batch_size))
    scheduled_rate = given.images / timed(lambda: asyncio.run(scheduler_throughput(library, engine, settings, images)))
    figures = {
        "images": given.images,
        "seed": given.seed,
        "max_batch_size": settings.max_batch_size,
        "mean_members": statistics.mean(len(theta.members) for theta in thetas),
        "plain_loop_images_per_s": round(loop_rate, 1),
        "engine_images_per_s": round(grouped, 1),
        "ratio": round(grouped / loop_rate, 2),
        "askers": CONCURRENT_CLIENTS,
        "without_http_images_per_s": round(scheduled_rate, 1),
    }
    return figures, (
        f"engine {grouped:.0f} images/s, plain loop {loop_rate:.0f}: {grouped / loop_rate:.1f} times; "
        f"{scheduled_rate:.0f} for {CONCURRENT_CLIENTS} who wait for answers, without HTTP"
    )


def timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def reference_loop(library: Library, networks: Sequence[Network], images: Images, thetas: Sequence[Theta]) -> None:
    """As one would write it: draw, run each member at batch 1, add up; torch with all its threads."""
    with torch_threads(engine_threads(Settings())), torch.inference_mode():
        for image, theta in zip(images, thetas, strict=True):
            pixels = torch.from_numpy(image)[None].float() / 255
            total = sum(networks[member](pixels) / library.tickets[member].temperature for member in theta.members)
            torch.softmax(torch.as_tensor(total) / len(theta.members), dim=1)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_windows(engine: Engine, images: Images, thetas: Sequence[Theta], size: int) -> None:
    """Each thread a window of its own: nothing is shared out, nobody waits for anybody."""

    def send_batch(start: int) -> None:
        groups: dict[int, list[int]] = {}
        for row, theta in enumerate(thetas[start : start + size]):
            for member in theta.members:
                groups.setdefault(member, []).append(row)
        engine.run(images[start : start + size], list(groups.items()), lambda: None)

    with ThreadPoolExecutor(engine.threads) as pool:
        list(pool.map(send_batch, range(0, len(images), size)))


async def scheduler_throughput(library: Library, engine: Engine, settings: Settings, images: Images) -> None:
    """Each asker takes the next image when the last is answered."""
    left = iter(images)
    async with scheduling(Scheduler, library, engine, settings) as scheduler:

        async def asker() -> None:
            for image in left:
                await scheduler.submit(image[None], client="bench")

        await asyncio.gather(*(asker() for _ in range(CONCURRENT_CLIENTS)))


# What digits tell


def answer_precision(
    given: argparse.Namespace,
    _settings: Settings,
    library: Library,
    _engine: Engine,
) -> tuple[dict[str, Any], str]:
    data = read_data(given.data, library.classes, given.images, library.input)
    figures = output_leakage.disclosure(library, data.pixels.float() / 255, given.seed)
    rate = figures["guess_accuracy"]["2 decimals"]["theta"]
    return figures | {"data": data.name}, f"two decimals tell theta in {100 * rate:.0f} % of answers"


# What rounding changes


def open_float32(library: Library, settings: Settings) -> Engine:
    """Raises EngineRejected."""
    if settings.int8_images is not None:
        raise EngineRejected("TOMBOLA_INT8_IMAGES: unset it; what rounding changes is measured against float32")
    return open_engine(library, settings.model_copy(update={"precision": "float32"}))


def what_rounding_changes(
    given: argparse.Namespace, settings: Settings, library: Library, engine: Engine
) -> tuple[dict[str, Any], str]:
    data, others = rounding.measured_images(given.data, library, given.images)
    engines = {
        name: open_engine(library, settings, others)
        if name == "int8"
        else open_engine(library, settings.model_copy(update={"precision": name}))
        for name in given.to
    }
    figures = rounding.compare(library, engine, engines, data)
    return figures, " ".join(rounding.sentence(name, figures) for name in engines)


# What a whole server costs


def server_capacity(
    given: argparse.Namespace,
    settings: Settings,
    library: Library,
    _engine: Engine,
) -> tuple[dict[str, Any], str]:
    figures = capacity.measure(settings, SETTINGS, given.images, library.input)
    one, many = figures["one"]["cpu_ms"], figures["many"]["cpu_ms"]
    return figures, f"an image costs {one:.2f} ms of processor time alone, {many:.2f} ms among {figures['batch']}"


# What latency tells


def latency_information(
    given: argparse.Namespace, settings: Settings, library: Library, engine: Engine
) -> tuple[dict[str, Any], str]:
    figures = timing_leakage.leak(library, engine, settings, given.images, sorted({0.0, *given.quantum_ms}))
    summary = ", ".join(f"{row['quantum_ms']:g} ms: {row['bits']:.2f}" for row in figures["quanta"])
    return figures, f"bits of n that latency tells, by quantum: {summary}"


BENCHMARKS: Final[dict[str, Benchmark]] = {
    "raw": Benchmark(raw_engine, open_for_serving),
    "latency": Benchmark(latency_information, open_for_serving, timing_leakage.table),
    "capacity": Benchmark(server_capacity, open_engine, capacity.table),
    "precision": Benchmark(answer_precision, open_engine, output_leakage.table),
    "rounding": Benchmark(what_rounding_changes, open_float32, rounding.table),
}
