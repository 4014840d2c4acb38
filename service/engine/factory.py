"""Tickets on a device. A backend is one function: rows of one ticket -> its calibrated logits."""

import importlib.util
import logging
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import torch

from model_store.library import Library
from model_store.structures import multiply_adds
from model_store.ticket import Ticket
from service.cpu import usable_cores
from service.engine.base import (
    Backend,
    Engine,
    EngineRejected,
    Folded,
    Rows,
    folded,
    max_relative_error,
    reference,
)
from service.settings import Settings, ensure_state_dir

log = logging.getLogger(__name__)

CALIBRATION_IMAGES: Final = 256
MAX_CACHED: Final = (
    2  # libraries whose compiled models stay on disk: the one served, and the way back to the one before
)
PROBES: Final = 3  # random images on which every ticket is compared with torch in float32: a pair and one alone


def open_engine(library: Library, settings: Settings, calibration: Rows | None = None) -> Engine:
    """Compiles and warms up every ticket and compares it with torch in float32. Raises EngineRejected.

    calibration: images to run in 8 bits by; None for what the settings say.
    """
    device = chosen_device(settings.device)
    name = chosen_backend(settings.engine, device)
    if calibration is None:
        calibration = calibration_images(name, library, settings)
    threads = engine_threads(settings)
    torch.set_num_threads(1)  # tickets run beside each other, one core each
    with ThreadPoolExecutor(threads, "fold") as pool:
        tickets = tuple(pool.map(folded, library.tickets))
    *first, last = fallbacks(name, settings, eight_bits=calibration is not None)
    for attempt, cached in first:
        try:
            return build_engine(attempt, library, tickets, settings, device, cached, calibration)
        except EngineRejected as error:
            log.warning("engine refused, another is tried: %s", error)
    return build_engine(last[0], library, tickets, settings, device, last[1], calibration)


def open_for_serving(library: Library, settings: Settings) -> Engine:
    """As open_engine, but apart from this process where that is possible. Raises EngineRejected."""
    if not uses_processes(settings):
        return open_engine(library, settings)
    from service.engine.process_pool import open_in_processes

    try:
        return open_in_processes(library, settings.model_copy(update={"engine": "openvino"}))
    except EngineRejected as error:
        if settings.engine != "auto" or settings.int8_images is not None:
            raise
        log.warning("engine refused, another is tried: %s", error)
    return open_engine(library, settings.model_copy(update={"engine": "torch"}))


def uses_processes(settings: Settings) -> bool:
    """Whether the tickets get processes of their own. Other systems than Linux do not fork safely."""
    if not settings.engine_processes or sys.platform != "linux":
        return False
    device = chosen_device(settings.device)
    return device.type == "cpu" and chosen_backend(settings.engine, device) == "openvino"


def engine_threads(settings: Settings) -> int:
    """How many tickets run at once: one a core, one at all on a GPU."""
    on_cpu = chosen_device(settings.device).type == "cpu"
    return settings.threads or (usable_cores() if on_cpu else 1)


def fallbacks(name: str, settings: Settings, *, eight_bits: bool) -> list[tuple[str, bool]]:
    """(backend, whether its compiled models may come from disk), in the order to try. A damaged cache is no reason to
    refuse a library; and where the backend was not asked for by name, torch runs everywhere."""
    if name == "torch":
        return [("torch", False)]
    fallback = [("torch", False)] if settings.engine == "auto" and not eight_bits else []
    return [(name, True), (name, False), *fallback]


def calibration_images(name: str, library: Library, settings: Settings) -> Rows | None:
    """What 8 bits are calibrated on; None where the tickets run in float32."""
    if settings.int8_images is None:
        return None
    if name != "openvino":
        raise EngineRejected(f"TOMBOLA_INT8_IMAGES: 8 bits are for OpenVINO on a CPU; the engine is {name}")
    from service.audit.errors import DataRejected
    from service.audit.labelled_data import read_data

    try:
        return read_data(settings.int8_images, library.classes, CALIBRATION_IMAGES).pixels.numpy()
    except DataRejected as error:
        raise EngineRejected(f"TOMBOLA_INT8_IMAGES: {error}") from None


def chosen_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch says both for a device that is not there
        raise EngineRejected(f"device {wanted}: torch cannot use such a device here") from None
    return device


def chosen_backend(wanted: str, device: torch.device) -> str:
    there = importlib.util.find_spec("openvino") is not None
    if wanted == "openvino" and device.type != "cpu":
        raise EngineRejected(f"TOMBOLA_ENGINE openvino: runs on the CPU, not on {device}; choose torch or auto")
    if wanted == "openvino" and not there:
        raise EngineRejected("TOMBOLA_ENGINE openvino: not installed; `pip install openvino`, or choose torch or auto")
    if wanted == "auto":
        return "openvino" if there and device.type == "cpu" else "torch"
    return wanted


def build_engine(
    name: str,
    library: Library,
    tickets: tuple[Folded, ...],
    settings: Settings,
    device: torch.device,
    cached: bool,
    calibration: Rows | None,
) -> Engine:
    begun, threads = time.perf_counter(), engine_threads(settings)
    cache = cache_dir(library, settings) if cached else None
    backend = build(name, tickets, cache, device, threads, calibration)
    difference = verified(name, backend, tickets, threads, None if calibration is None else calibration[-PROBES:])
    return Engine(
        name=name,
        device=str(device),
        threads=threads,
        forward=backend.forward,
        costs=costs(library.tickets),
        difference=difference,
        note=backend.note,
        warm_up_s=time.perf_counter() - begun,
    )


def cache_dir(library: Library, settings: Settings) -> Path | None:
    """The folder of a library's compiled models; those of the libraries that were opened last stay, the rest goes. None
    where there is no room for it."""
    everything = ensure_state_dir(settings) / "engine"
    folder = everything / library.digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        by_age = sorted(everything.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-MAX_CACHED]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:  # from before each library had a folder
                old.unlink()
    except OSError as error:
        log.warning("compiled models are not kept: %s", error)
        return None
    return folder


def build(
    name: str,
    tickets: tuple[Folded, ...],
    cache: Path | None,
    device: torch.device,
    threads: int,
    calibration: Rows | None,
) -> Backend:
    """The backends are imported where they are used: OpenVINO is not everywhere."""
    if name == "openvino":
        from service.engine import openvino_engine

        return openvino_engine.build(tickets, cache=cache, threads=threads, calibration=calibration)
    from service.engine import torch_engine

    return torch_engine.build(tickets, device=device)


def costs(tickets: tuple[Ticket, ...]) -> tuple[int, ...]:
    by_structure = {structure: multiply_adds(structure) for structure in {ticket.structure for ticket in tickets}}
    return tuple(by_structure[ticket.structure] for ticket in tickets)


def verified(
    name: str, backend: Backend, tickets: tuple[Folded, ...], threads: int, pictures: Rows | None = None
) -> float:
    """Runs every ticket on fresh random images, which also warms it up. Returns the largest difference from torch.

    pictures: to compare on instead. Noise is far outside of the ranges of 8 bits.
    """
    noise = np.frombuffer(bytearray(os.urandom(PROBES * 3 * 32 * 32)), np.uint8).reshape(PROBES, 3, 32, 32)
    probes = noise if pictures is None else pictures

    def compare(index: int) -> float:
        return max_relative_error(backend.forward(index, probes), reference(tickets[index], probes))

    with ThreadPoolExecutor(threads, "warm-up") as pool:
        worst = max(zip(pool.map(compare, range(len(tickets))), range(len(tickets)), strict=True))
    if not worst[0] <= backend.tolerance:  # also true of NaN
        raise EngineRejected(
            f"engine {name}: logits of {tickets[worst[1]].name} differ from torch's by {worst[0]:.1e} of the largest; "
            f"expected at most {backend.tolerance:.0e}"
        )
    return worst[0]
