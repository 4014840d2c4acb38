"""Decodes the pictures of requests off the event loop: model_store's decoder in a pool of threads, within a time."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from model_store import images
from model_store.errors import (
    ImageEmpty,
    ImageFormatUnknown,
    ImageRejected,
    ImageTooLarge,
    ImageUnsupported,
)
from model_store.images import Pixels
from model_store.input_spec import InputSpec
from service.errors import BadRequest, ContentTooLarge, ErrorMessage, UnsupportedMediaType
from service.observability.metrics import Metrics
from service.settings import Settings

CHUNK: Final = 8  # images decoded before another request has its turn
THREADS: Final = 2  # large images are rare, and the cores are the engine's
SMALL_BYTES: Final = 4096  # a 32x32 PNG is at most 3.2 KB; no file within these three bounds takes over a millisecond
SMALL_PIXELS: Final = 64 * 64
COSTLY: Final = (b"zTXt", b"iTXt", b"iCCP", b"ICC_PROFILE", b"ICCP")  # a profile takes tens of milliseconds


def sniff(data: bytes) -> images.Format | None:
    """The format that the first bytes promise, of those that requests may hold."""
    kind = images.sniff(data)
    return kind if kind in images.WEB_FORMATS else None


def decode(data: bytes, spec: InputSpec, max_pixels: int, *, scaled: bool = True) -> Pixels:
    """One encoded picture -> uint8 [3, H, W]. Raises BadRequest, ContentTooLarge, UnsupportedMediaType."""
    try:
        return images.decode(data, spec, max_pixels=max_pixels, scaled=scaled).pixels
    except ImageEmpty:
        raise BadRequest(ErrorMessage.IMAGE_EMPTY) from None
    except ImageFormatUnknown:
        raise UnsupportedMediaType(ErrorMessage.IMAGE_FORMAT) from None
    except ImageUnsupported:
        raise UnsupportedMediaType(ErrorMessage.IMAGE_SAMPLES) from None
    except ImageTooLarge as error:
        raise ContentTooLarge(ErrorMessage.IMAGE_TOO_LARGE, limit=error.limit) from None
    except ImageRejected:
        raise BadRequest(ErrorMessage.IMAGE_DAMAGED) from None


class Decoder:
    """Decodes off the event loop, in threads of its own, within a time.

    A request's images are decoded CHUNK at a time, so that a request with many of them lets others in between. One
    small image (SMALL_BYTES, SMALL_PIXELS) is decoded where it is: that takes 60 us, and waking a thread as much again.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        self.max_pixels = settings.max_pixels
        self.timeout_s = settings.decode_timeout_s
        self.metrics = metrics

    async def rows(self, files: Sequence[bytes], spec: InputSpec) -> Pixels:
        """Encoded images -> uint8 [N, 3, H, W]. Raises what decode() raises, and BadRequest after the time."""
        began = time.perf_counter()
        try:
            rows = self.at_once(files[0], spec) if len(files) == 1 else None
            return await self.in_threads(files, spec) if rows is None else rows
        finally:
            self.metrics.observe("compute_seconds", time.perf_counter() - began, stage="decode")

    def at_once(self, data: bytes, spec: InputSpec) -> Pixels | None:
        """uint8 [1, 3, H, W] of a small file; None for one that belongs in a thread."""
        if len(data) > SMALL_BYTES or any(kind in data for kind in COSTLY):
            return None
        try:
            return decode(data, spec, min(SMALL_PIXELS, self.max_pixels), scaled=False)[None]
        except ContentTooLarge:
            return None

    async def in_threads(self, files: Sequence[bytes], spec: InputSpec) -> Pixels:
        rows = np.empty((len(files), *spec.shape), np.uint8)
        loop = asyncio.get_running_loop()
        late = time.monotonic() + self.timeout_s
        try:
            async with asyncio.timeout(self.timeout_s):
                for start in range(0, len(files), CHUNK):
                    part = slice(start, start + CHUNK)
                    await loop.run_in_executor(self.pool, self.fill, rows[part], files[part], spec, late)
        except TimeoutError:
            raise BadRequest(ErrorMessage.IMAGE_SLOW, limit=self.timeout_s) from None
        return rows

    def fill(self, rows: Pixels, files: Sequence[bytes], spec: InputSpec, late: float) -> None:
        """In a thread: stops between images once nobody waits any more."""
        for row, data in zip(rows, files, strict=True):
            if time.monotonic() > late:
                return
            row[:] = decode(data, spec, self.max_pixels)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
