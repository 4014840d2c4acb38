"""Load: closed loop by wrk, open loop (Poisson arrivals) by a small generator that counts from the intended moment."""

import asyncio
import json
import random
import re
import resource
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.requests import Form

LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
KEEP_S: Final = 2.0  # an idle connection; servers here keep theirs for 5 s
PATIENCE_S: Final = 15.0  # after the last request has left; what is not answered by then never counts
CONNECTIONS: Final = 1024  # of the open loop; a request that finds none free waits, and its wait counts
Idle = tuple[asyncio.StreamReader, asyncio.StreamWriter, float]
"""A connection, and since when nobody uses it."""


def closed_loop(place: str, form: Form, clients: int, seconds: float) -> dict[str, Any]:
    """`clients` connections, each asking again as soon as it has its answer."""
    with tempfile.TemporaryDirectory() as folder:
        script = form.script(Path(folder))
        command = [
            "wrk",
            "-t1",
            f"-c{clients}",
            f"-d{max(1, round(seconds))}s",
            "--timeout",
            "30s",
            "-s",
            str(script),
            f"http://{place}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("JSON"))[5:])
    good = figures["answers"] - figures["refused"]
    return {"clients": clients, "images_per_s": round(good / figures["seconds"], 1), **round_floats(figures)}


def round_floats(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


@dataclass
class Outcome:
    """latencies: seconds from the moment a request was due to the end of its answer, of those answered with 200.
    late: seconds from that moment until the request left, of all: the generator's own share of a latency."""

    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    without_pause: int = 0  # refusals that did not say when to come back


async def open_loop(place: str, form: Form, rate: float, seconds: float, *, seed: int = 0) -> Outcome:
    """Requests leave at the moments of a Poisson process, whatever became of those before."""
    generator, outcome = random.Random(seed), Outcome()
    messages, free = form.messages(place), asyncio.Semaphore(CONNECTIONS)
    idle: list[Idle] = []
    started_at, due, tasks = time.perf_counter(), 0.0, []
    number = 0
    while (due := due + generator.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, started_at + due - time.perf_counter()))
        message = messages[number % len(messages)]
        tasks.append(asyncio.ensure_future(one(place, message, started_at + due, idle, free, outcome)))
        number += 1
    if tasks:
        _, unanswered = await asyncio.wait(tasks, timeout=PATIENCE_S)
        outcome.statuses["unanswered"] += len(unanswered)
        for task in unanswered:
            task.cancel()
        await asyncio.gather(*unanswered, return_exceptions=True)
    for _, writer, _ in idle:
        writer.close()
    return outcome


async def one(
    place: str,
    message: bytes,
    due: float,
    idle: list[Idle],
    free: asyncio.Semaphore,
    outcome: Outcome,
) -> None:
    async with free:
        try:
            reader, writer = await connection(place, idle)
            writer.write(message)
            outcome.late.append(time.perf_counter() - due)
            status, head = await answer(reader)
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome.statuses[type(error).__name__] += 1
            return
    outcome.statuses[str(status)] += 1
    if status == 200:
        outcome.latencies.append(time.perf_counter() - due)
    elif status in (429, 503) and b"retry-after" not in head.lower():
        outcome.without_pause += 1
    if b"connection: close" in head.lower():
        writer.close()
    else:
        idle.append((reader, writer, time.monotonic()))


async def connection(place: str, idle: list[Idle]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The connection last used, or a new one.

    Connections are kept for less time than the server keeps them, which may close one just when it is used again.
    """
    while idle:
        reader, writer, since = idle.pop()
        if not reader.at_eof() and not writer.is_closing() and time.monotonic() - since < KEEP_S:
            return reader, writer
        writer.close()
    return await asyncio.open_connection(*place.split(":"))


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    await reader.readexactly(int(length.group(1)) if length else 0)
    return int(head[9:12]), head


def open_figures(place: str, form: Form, rate: float, seconds: float, deadline_s: float) -> dict[str, Any]:
    """goodput: answers within the deadline, for each second."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(open_loop(place, form, rate, seconds))
    after = resource.getrusage(resource.RUSAGE_SELF)
    attempts = sum(outcome.statuses.values())
    shed = outcome.statuses["503"] + outcome.statuses["429"]
    return {
        "rate": round(rate, 1),
        "seconds": seconds,
        "asked": attempts,
        "statuses": dict(outcome.statuses),
        "goodput_per_s": round(sum(latency <= deadline_s for latency in outcome.latencies) / seconds, 1),
        "deadline_s": deadline_s,
        "shed_share": round(shed / max(1, attempts), 4),
        "refused_without_retry_after": outcome.without_pause,
        **{f"p{part}_ms": quantile_ms(outcome.latencies, part / 100) for part in (50, 95, 99)},
        "late_p99_ms": quantile_ms(outcome.late, 0.99),
        "generator_cores": round((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / seconds, 3),
    }


def quantile_ms(latencies: Sequence[float], share: float) -> float | None:
    if not latencies:
        return None
    return round(1000 * sorted(latencies)[min(len(latencies) - 1, int(share * len(latencies)))], 3)
