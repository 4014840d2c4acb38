"""Tickets on a device. A backend is one function: images for one ticket -> its calibrated logits."""

import importlib.util
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from model_store.library import Library
from model_store.policy import Policy, draw_theta
from model_store.processor import has_bfloat16
from model_store.structures import multiply_adds
from service.cpu import usable_cores
from service.engine.base import (
    Backend,
    Engine,
    FoldedTicket,
    Images,
    Precision,
    fold_ticket,
    max_relative_error,
    random_images,
    reference_logits,
)
from service.engine.errors import EngineRejected
from service.settings import Settings, ensure_state_dir

if TYPE_CHECKING:
    from service.engine.launcher import ForkServer

log = logging.getLogger(__name__)

CALIBRATION_IMAGES: Final = 256
MAX_CACHED: Final = 2  # libraries whose compiled models stay on disk: the one served, and the one before
MEASURE_S: Final = 1.0  # for each candidate of `auto`
CUDA_BATCH_SIZE: Final = 256
PROBES: Final = 3  # random images on which every ticket is compared with torch in float32: a pair and one alone


Step = Callable[[str], None]
"""Called with each step of a start, in words for a person."""


def open_engine(
    library: Library, settings: Settings, calibration: Images | None = None, *, on_step: Step = lambda _: None
) -> Engine:
    """Compiles and warms up every ticket and compares it with torch in float32. Raises EngineRejected.

    calibration: images to run in 8 bits by; None for what the settings say.
    """
    device = resolve_device(settings.device)
    name = resolve_backend(settings.engine, device)
    if calibration is None:
        calibration = calibration_images(name, library, settings)
    precision = resolve_precision(settings.precision, name, device) if calibration is None else "int8"
    threads = engine_threads(settings)
    torch.set_num_threads(1)  # tickets run beside each other, one core each
    with ThreadPoolExecutor(threads, "fold") as pool:
        tickets = tuple(pool.map(fold_ticket, library.tickets))
    *first, last = fallbacks(name, settings, precision)
    for attempt in first:
        try:
            return build_engine(attempt, library, tickets, settings, device, calibration, on_step)
        except EngineRejected as error:
            log.warning("engine refused, another is tried: %s", error)
    return build_engine(last, library, tickets, settings, device, calibration, on_step)


def open_for_serving(
    library: Library,
    settings: Settings,
    fork_server: "ForkServer | None" = None,
    on_step: Step = lambda _: None,
) -> Engine:
    """As open_engine, but in processes of its own where that is possible. Raises EngineRejected.

    fork_server: what the launcher's `start_ahead` gave for this library; None to start one here.
    """
    if fork_server is not None and (chooses_by_speed(settings) or not uses_processes(settings)):
        fork_server.close()  # torch knows of a GPU that the launcher was not told of
    if chooses_by_speed(settings):
        candidates = [settings.model_copy(update=dict(choice)) for choice in CHOICES]
        return open_fastest(
            library, candidates, lambda choice: open_for_serving(library, choice, on_step=on_step), on_step
        )
    if not uses_processes(settings):
        return open_engine(library, settings, on_step=on_step)
    from service.engine.launcher import start_fork_server
    from service.engine.process_pool import open_in_processes

    try:
        return open_in_processes(library, settings, fork_server or start_fork_server(library.path, settings, on_step))
    except EngineRejected as error:
        if settings.engine != "auto" or settings.int8_images is not None:
            raise
        log.warning("engine refused, another is tried: %s", error)
    return open_engine(library, settings.model_copy(update={"engine": "torch"}), on_step=on_step)


CHOICES: Final = (
    (("device", "cuda"), ("engine", "torch")),
    (("device", "cpu"), ("engine", "openvino")),
)
"""What `auto` measures against each other."""


def chooses_by_speed(settings: Settings) -> bool:
    """Whether device and engine are left to `auto`, and both a GPU and OpenVINO are there."""
    if (settings.device, settings.engine, settings.int8_images) != ("auto", "auto", None):
        return False
    return torch.cuda.is_available() and importlib.util.find_spec("openvino") is not None


def open_fastest(
    library: Library, candidates: Sequence[Settings], open_candidate: Callable[[Settings], Engine], on_step: Step
) -> Engine:
    """Opens each candidate, measures it, and returns the fastest. Raises EngineRejected if none can be opened."""
    speeds: list[tuple[float, Engine]] = []
    for candidate in candidates:
        try:
            engine = open_candidate(candidate)
        except EngineRejected as error:
            log.warning("engine refused, another is tried: %s", error)
            continue
        speeds.append((images_per_s(engine, library.policy, batch_limit(engine.device, candidate)), engine))
    if not speeds:
        raise EngineRejected("neither the GPU nor the CPU can run this library")
    figures = ", ".join(f"{engine.device} {speed:,.0f} images/s" for speed, engine in speeds)
    fastest = max(speeds, key=lambda pair: pair[0])[1]
    on_step(f"measured {figures}: using {fastest.device}")
    return replace(fastest, note=f"{fastest.note}; measured {figures}")


def images_per_s(engine: Engine, policy: Policy, batch_size: int, seconds: float = MEASURE_S) -> float:
    """Images that the engine answers in a second, in batches of random draws, with all its threads."""
    images = np.zeros((batch_size, *engine.input_shape), np.uint8)
    ends_at = time.perf_counter() + seconds

    def count(seed: int) -> int:
        rng, total = random.Random(seed), 0
        while time.perf_counter() < ends_at:
            engine.run(images, draw_jobs(policy, rng, batch_size), lambda: None)
            total += batch_size
        return total

    started_at = time.perf_counter()
    with ThreadPoolExecutor(engine.threads, "measure") as pool:
        total = sum(pool.map(count, range(engine.threads)))
    return total / (time.perf_counter() - started_at)


def draw_jobs(policy: Policy, rng: random.Random, size: int) -> list[tuple[int, list[int]]]:
    """The jobs of a batch of so many images, each with a draw of its own."""
    jobs: dict[int, list[int]] = {}
    for index in range(size):
        for member in set(draw_theta(policy, rng).members):
            jobs.setdefault(member, []).append(index)
    return list(jobs.items())


def batch_limit(device: str, settings: Settings) -> int:
    """The most images of a batch. On CUDA the default is larger: a batch's time hardly depends on its size there."""
    if device.startswith("cuda") and "max_batch_size" not in settings.model_fields_set:
        return CUDA_BATCH_SIZE
    return settings.max_batch_size


def uses_processes(settings: Settings) -> bool:
    """Whether the tickets get processes of their own. Only Linux forks safely."""
    if not settings.engine_processes or sys.platform != "linux":
        return False
    device = resolve_device(settings.device)
    return device.type == "cpu" and resolve_backend(settings.engine, device) == "openvino"


def engine_threads(settings: Settings) -> int:
    """How many tickets run at once: one a core, one at all on a GPU."""
    on_cpu = resolve_device(settings.device).type == "cpu"
    return settings.threads or (usable_cores() if on_cpu else 1)


class Attempt(NamedTuple):
    """A way to run the tickets. cached: whether compiled models may come from disk."""

    backend: str
    precision: Precision
    cached: bool


def fallbacks(name: str, settings: Settings, precision: Precision) -> list[Attempt]:
    """What to try, in this order.

    A damaged cache is no reason to refuse a library. Where the settings are `auto`, a library whose logits bfloat16
    would change too much runs in float32, and torch runs everywhere.
    """
    exact = Attempt("torch", "float32", cached=False)
    if name == "torch":
        return [exact]
    precisions: list[Precision] = [precision]
    if precision == "bfloat16" and settings.precision == "auto":
        precisions.append("float32")
    attempts = [Attempt(name, kind, cached) for kind in precisions for cached in (True, False)]
    return [*attempts, *([exact] if settings.engine == "auto" and precision != "int8" else [])]


def resolve_precision(requested: str, name: str, device: torch.device) -> Precision:
    """Raises EngineRejected where bfloat16 cannot be had."""
    if requested == "bfloat16" and name != "openvino":
        raise EngineRejected(f"TOMBOLA_PRECISION bfloat16: is for OpenVINO on a CPU; the engine is {name} on {device}")
    if requested == "bfloat16" and not has_bfloat16():
        raise EngineRejected("TOMBOLA_PRECISION bfloat16: this processor does not multiply in it; choose auto")
    if requested == "float32" or name != "openvino" or not has_bfloat16():
        return "float32"
    return "bfloat16"


def calibration_images(name: str, library: Library, settings: Settings) -> Images | None:
    """What 8 bits are calibrated on; None where the tickets run in float32."""
    if settings.int8_images is None:
        return None
    if name != "openvino":
        raise EngineRejected(f"TOMBOLA_INT8_IMAGES: 8 bits are for OpenVINO on a CPU; the engine is {name}")
    from model_store.errors import DataRejected
    from model_store.image_sample import read_sample

    try:
        return read_sample(settings.int8_images, library.classes, CALIBRATION_IMAGES, library.input).pixels.numpy()
    except DataRejected as error:
        raise EngineRejected(f"TOMBOLA_INT8_IMAGES: {error}") from None


def resolve_device(requested: str) -> torch.device:
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch raises either for a device that is missing
        raise EngineRejected(f"device {requested}: torch cannot use such a device here") from None
    return device


def resolve_backend(requested: str, device: torch.device) -> str:
    installed = importlib.util.find_spec("openvino") is not None
    if requested == "openvino" and device.type != "cpu":
        raise EngineRejected(f"TOMBOLA_ENGINE openvino: runs on the CPU, not on {device}; choose torch or auto")
    if requested == "openvino" and not installed:
        raise EngineRejected("TOMBOLA_ENGINE openvino: not installed; `pip install openvino`, or choose torch or auto")
    if requested == "auto":
        return "openvino" if installed and device.type == "cpu" else "torch"
    return requested


def precision_on_cpu(settings: Settings) -> Precision:
    """What tickets run in on this machine's CPU, if their logits allow it. Raises EngineRejected."""
    cpu = torch.device("cpu")
    return resolve_precision(settings.precision, resolve_backend(settings.engine, cpu), cpu)


def build_engine(
    attempt: Attempt,
    library: Library,
    tickets: tuple[FoldedTicket, ...],
    settings: Settings,
    device: torch.device,
    calibration: Images | None,
    on_step: Step,
) -> Engine:
    started_at, threads, name = time.perf_counter(), engine_threads(settings), attempt.backend
    cache = cache_dir(library, settings) if attempt.cached else None
    on_step(
        f"compiling {len(tickets)} tickets for {name}"
        if name == "openvino"
        else f"moving {len(tickets)} tickets to {device}"
    )
    backend = build_backend(attempt, tickets, cache, device, threads, calibration)
    on_step("comparing logits with torch's")
    difference = verify(name, backend, tickets, threads, None if calibration is None else calibration[-PROBES:])
    return Engine(
        name=name,
        device=str(device),
        threads=threads,
        forward=backend.forward,
        macs=macs_of(library),
        input_shape=library.input.shape,
        difference=difference,
        note=backend.note,
        warm_up_s=time.perf_counter() - started_at,
    )


def cache_dir(library: Library, settings: Settings) -> Path | None:
    """The folder of a library's compiled models, or None where there is no room for it.

    Removes the folders of all but the libraries that were opened last.
    """
    root = ensure_state_dir(settings) / "engine"
    folder = root / library.digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        by_age = sorted(root.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-MAX_CACHED]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:  # written by a version before each library had a folder
                old.unlink()
    except OSError as error:
        log.warning("compiled models are not kept: %s", error)
        return None
    return folder


def build_backend(
    attempt: Attempt,
    tickets: tuple[FoldedTicket, ...],
    cache: Path | None,
    device: torch.device,
    threads: int,
    calibration: Images | None,
) -> Backend:
    """Imports a backend where it is used: OpenVINO is not installed everywhere."""
    if attempt.backend == "openvino":
        from service.engine import openvino_engine

        return openvino_engine.build(
            tickets, cache=cache, threads=threads, precision=attempt.precision, calibration=calibration
        )
    from service.engine import torch_engine

    return torch_engine.build(tickets, device=device)


def macs_of(library: Library) -> tuple[int, ...]:
    size = library.input.size
    structures = [ticket.structure for ticket in library.tickets]
    by_structure = {structure: multiply_adds(structure, size) for structure in set(structures)}
    return tuple(by_structure[structure] for structure in structures)


def verify(
    name: str, backend: Backend, tickets: tuple[FoldedTicket, ...], threads: int, images: Images | None = None
) -> float:
    """Runs every ticket on fresh random images, which also warms it up. Returns the largest difference from torch.

    images: to compare on instead. Noise is far outside of the ranges of 8 bits.
    """
    probes = random_images(PROBES, tickets[0].input.shape) if images is None else images

    def compare(index: int) -> float:
        try:
            return max_relative_error(backend.forward(index, probes), reference_logits(tickets[index], probes))
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises RuntimeError
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise EngineRejected(
                f"engine {name}: {tickets[index].name} cannot run pictures of {tickets[index].input}: {why:.160}"
            ) from error

    with ThreadPoolExecutor(threads, "warm-up") as pool:
        worst = max(zip(pool.map(compare, range(len(tickets))), range(len(tickets)), strict=True))
    if not worst[0] <= backend.tolerance:  # also true of NaN
        raise EngineRejected(
            f"engine {name}: logits of {tickets[worst[1]].name} differ from torch's by {worst[0]:.1e} of the largest; "
            f"expected at most {backend.tolerance:.0e}"
        )
    return worst[0]
