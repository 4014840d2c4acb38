"""Waits for what other threads and processes do. No test asserts how long that takes."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

LIMIT_S: Final = 120.0


def until(condition: Callable[[], bool], what: str = "the condition", *, limit_s: float = LIMIT_S) -> None:
    """Looks every few milliseconds; fails once the limit has passed."""
    late = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < late, f"waited too long for {what}"
        time.sleep(0.01)


async def until_async(condition: Callable[[], bool]) -> None:
    """The same, while the event loop goes on."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 -- the condition is somebody else's
            await asyncio.sleep(0.002)
