"""Twice the capacity, and a long mixture of honest, hasty, slow and hostile clients: what the server does meanwhile."""

import asyncio
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from benchmarks import requests
from benchmarks.load import answer, closed_loop, open_figures, open_loop, quantile_ms
from benchmarks.servers import Running

LOAD: Final = 0.6  # of the capacity, during the soak
DEADLINE_S: Final = 1.0  # of every request of the overload
SWAP_S: Final = 60.0
QUIET_S: Final = 12.0  # after the soak: beyond the server's limits on slow and idle connections
NORMAL: Final = 5  # answers in a row, each within twice the idle p95


def overload(running: Running, seconds: float) -> dict[str, Any]:
    """Twice the capacity for `seconds`; from its last request on, one image at a time: when is it as fast as before?"""
    form = requests.files("/v1/classify", ("Tombola-Timeout-Ms", f"{1000 * DEADLINE_S:.0f}"))
    capacity = closed_loop(running.place, form, 32, min(10.0, seconds))["images_per_s"]
    before = closed_loop(running.place, form, 1, 3)
    sizes, before_counts = [running.memory_mb()], served_counts(running)
    with ThreadPoolExecutor(2) as pool:
        flood = pool.submit(open_figures, running.place, form, 2 * capacity, seconds, DEADLINE_S)
        recovered = pool.submit(recovery_s, running.place, form, seconds, 2 * before["p95_ms"] / 1000)
        while not recovered.done():
            sizes.append(running.memory_mb())
            time.sleep(1)
    after = closed_loop(running.place, form, 1, 3)
    return {
        "capacity": capacity,
        "overload": flood.result(),
        "by_its_own_clock": {name: count - before_counts[name] for name, count in served_counts(running).items()},
        "memory_mb": [round(size, 1) for size in (sizes[0], max(sizes), running.memory_mb())],
        "recovery_s": round(recovered.result(), 3),
        "idle_p50_ms": {"before": before["p50_ms"], "after": after["p50_ms"]},
    }


def served_counts(running: Running) -> dict[str, float]:
    """Answers by the server's clock, from a request's headers to the end of its answer: all, and those in time."""
    duration = 'http_request_duration_seconds_{kind}{{code="200",{le}route="/v1/classify"'
    return {
        "answers": running.metric(duration.format(kind="count", le="")),
        "within_deadline": running.metric(duration.format(kind="bucket", le=f'le="{DEADLINE_S:.1f}",')),
    }


def recovery_s(place: str, form: requests.Form, pause_s: float, fast_s: float) -> float:
    """After the pause: seconds until the first of NORMAL answers in a row, each within `fast_s`."""
    time.sleep(pause_s)
    started_at = time.perf_counter()
    return asyncio.run(first_of_fast(place, form.messages(place)[0], fast_s)) - started_at


async def first_of_fast(place: str, message: bytes, fast_s: float) -> float:
    """When (time.perf_counter) the first of NORMAL fast answers was there. Each on a connection of its own."""
    moments: list[float] = []
    while len(moments) < NORMAL:
        started_at = time.perf_counter()
        reader, writer = await asyncio.open_connection(*place.split(":"))
        writer.write(message)
        status, _ = await answer(reader)
        writer.close()
        now = time.perf_counter()
        moments = [*moments, now] if status == 200 and now - started_at <= fast_s else []
    return moments[0]


async def soak(running: Running, seconds: float, compiled: Path) -> dict[str, Any]:
    """Honest load at LOAD of the capacity; beside it hang-ups, slow senders, nonsense, requests of 100 images, and the
    library swapped for itself again and again.  compiled: the folder of the server's compiled models."""
    form = requests.files("/v1/classify")
    capacity = await asyncio.to_thread(closed_loop, running.place, form, 32, 5)
    files, samples = running.open_files(), list[dict[str, float]]()
    outcomes: Counter[str] = Counter()
    beside = [
        asyncio.ensure_future(task)
        for task in (
            watch(running, samples),
            swap(running, outcomes, compiled),
            repeat(running.place, hang_up, outcomes, 0.05),
            repeat(running.place, nonsense, outcomes, 0.2),
            repeat(running.place, many, outcomes, 5.0),
            *(repeat(running.place, slow, outcomes, 0.1) for _ in range(200)),
        )
    ]
    outcome = await open_loop(running.place, form, LOAD * capacity["images_per_s"], seconds)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    await wait_for_swaps(running, outcomes["swaps"])
    await asyncio.sleep(QUIET_S)
    return {
        "seconds": seconds,
        "rate": round(LOAD * capacity["images_per_s"], 1),
        "statuses": dict(outcome.statuses),
        "beside": dict(outcomes),
        **{f"p{part}_ms": quantile_ms(outcome.latencies, part / 100) for part in (50, 95, 99)},
        "left": {
            "queue_depth": running.metric("queue_depth"),
            "in_flight": running.metric("http_requests_in_flight"),
            "held_bytes": running.metric("http_body_memory_bytes"),
        },
        "open_files": {"before": files, "after": running.open_files()},
        "after_mb": round(running.memory_mb(), 1),
        "samples": samples,
        "memory_mb_per_hour": slope_per_hour(samples),
    }


async def swap(running: Running, outcomes: Counter[str], compiled: Path) -> None:
    while True:
        await asyncio.sleep(SWAP_S)
        shutil.rmtree(compiled, ignore_errors=True)  # those of a new library would have to be made, too
        running.process.send_signal(signal.SIGHUP)
        outcomes["swaps"] += 1


async def wait_for_swaps(running: Running, times: int) -> None:
    """Waits until so many swaps are through: what is left is only counted then."""
    async with asyncio.timeout(600):
        while running.metric('library_swaps_total{outcome="ok"}') < times:  # noqa: ASYNC110 -- it is another process's
            await asyncio.sleep(1)


async def watch(running: Running, samples: list[dict[str, float]]) -> None:
    started_at = time.monotonic()
    while True:
        sample = {"s": time.monotonic() - started_at, "mb": running.memory_mb(), "open_files": running.open_files()}
        samples.append({name: round(value, 1) for name, value in sample.items()})
        await asyncio.sleep(5)


async def repeat(place: str, act: Any, outcomes: Counter[str], pause_s: float) -> None:
    while True:
        with suppress(OSError, asyncio.IncompleteReadError):
            outcomes[await act(place)] += 1
        await asyncio.sleep(pause_s)


async def hang_up(place: str) -> str:
    _, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(requests.files("/v1/classify").messages(place)[0])
    await writer.drain()
    writer.close()
    return "hang-up"


async def nonsense(place: str) -> str:
    reader, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nnothing")
    status = (await reader.readuntil(b"\r\n"))[9:12].decode()
    writer.close()
    return f"nonsense {status}"


async def many(place: str) -> str:
    reader, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(requests.several(100).messages(place)[0])
    status = (await reader.readuntil(b"\r\n"))[9:12].decode()
    writer.close()
    return f"100 images {status}"


async def slow(place: str) -> str:
    """A body at one byte a second, until the server has had enough."""
    reader, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
    while not reader.at_eof():
        writer.write(b"x")
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(4096), 1.0)
    writer.close()
    return "slow"


def slope_per_hour(samples: list[dict[str, float]]) -> float:
    """Least squares over the second half, when caches and pools are full."""
    half = samples[len(samples) // 2 :]
    times, sizes = [row["s"] for row in half], [row["mb"] for row in half]
    mean_t, mean_s = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - mean_t) ** 2 for t in times)
    return round(
        3600 * sum((t - mean_t) * (s - mean_s) for t, s in zip(times, sizes, strict=True)) / max(spread, 1e-9), 2
    )
