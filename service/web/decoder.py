"""Untrusted bytes -> uint8 [3, 32, 32]: the only decoder of the service.

What every image goes through, in this order: its first bytes must be those of PNG, JPEG or WebP (names and content
types are not believed); its size is read from the header and refused above the pixel limit before anything is
decoded; then it becomes upright 8-bit RGB and is resized to 32x32.

- Orientation: the EXIF tag is applied, so that the network sees what a person sees.
- Animations (APNG, WebP): the first frame, for APNG the default image. The others are never decoded.
- Alpha, also of palettes and tRNS: composed over white. Ignoring alpha would let an image look different to a person.
- 16-bit grey: the upper 8 bits. 16-bit RGB likewise. Greyscale and 1-bit: repeated in the three channels.
- CMYK and YCCK: Pillow's plain conversion. Colour profiles are not applied; training does not either.
- Size: stretched to 32x32 (bilinear, antialiased), exactly as training reads its data. 32x32 is left as it is.
"""

import asyncio
import io
import struct
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import BadRequest, ContentTooLarge, ErrorMessage, UnsupportedMediaType
from service.observability.metrics import Metrics
from service.settings import Settings

SIZE: Final = 32
FORMATS: Final = ("PNG", "JPEG", "WEBP")
CHUNK: Final = 8  # images decoded before another request has its turn
THREADS: Final = 2  # large images are rare, and the cores are the engine's
SMALL_BYTES: Final = 4096  # a 32x32 PNG is at most 3.2 KB; no file within these three bounds takes over a millisecond
SMALL_PIXELS: Final = 64 * 64
INFLATED: Final = (b"zTXt", b"iTXt", b"iCCP")  # PNG chunks that unpack to a thousand times their size
ORIENTATION: Final = 0x0112  # EXIF tag; TIFF 6.0, page 36
UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Pixels = NDArray[np.uint8]

# Process-wide and once: warnings.catch_warnings is not safe in threads. Beyond Pillow's own limit, not ours.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def sniff(data: bytes) -> str | None:
    """The format that the first bytes promise, of those accepted."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def decode(data: bytes, max_pixels: int) -> Pixels:
    """One encoded image -> uint8 [3, 32, 32]. Raises BadRequest, TooLarge, Unsupported."""
    if not data:
        raise BadRequest(ErrorMessage.IMAGE_EMPTY)
    kind = sniff(data)
    if kind is None:
        raise UnsupportedMediaType(ErrorMessage.IMAGE_FORMAT)
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            return as_pixels(image, max_pixels)
    except ContentTooLarge:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ContentTooLarge(ErrorMessage.IMAGE_TOO_LARGE, limit=max_pixels) from None
    except Exception:  # noqa: BLE001 -- hostile bytes make a decoder raise anything; it means a damaged image
        raise BadRequest(ErrorMessage.IMAGE_DAMAGED) from None


def as_pixels(image: Image.Image, max_pixels: int) -> Pixels:
    """An opened image, of which only the header has been read. Raises TooLarge, and whatever Pillow raises."""
    if image.width * image.height > max_pixels:
        raise ContentTooLarge(ErrorMessage.IMAGE_TOO_LARGE, limit=max_pixels)
    image.load()
    small = as_rgb(image)
    if small.size != (SIZE, SIZE):
        small = small.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    turn = UPRIGHT.get(orientation(image.info.get("exif", b"")))
    if turn is not None:
        small = small.transpose(turn)
    return np.asarray(small).transpose(2, 0, 1).copy()


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, whose values convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def orientation(exif: bytes) -> int:
    """The orientation, 1..8, of a block of EXIF; 1 where there is none or it is damaged.

    Read by hand: a full EXIF parser copies every value, and a hostile block can make each of 65,535 entries megabytes.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for position in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, position)
            if (tag, kind, count) == (ORIENTATION, 3, 1):
                return int(value)
    except struct.error:
        return 1
    return 1


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

    async def rows(self, files: Sequence[bytes]) -> Pixels:
        """Encoded images -> uint8 [N, 3, 32, 32]. Raises what decode() raises, and BadRequest after the time."""
        began = time.perf_counter()
        try:
            rows = self.at_once(files[0]) if len(files) == 1 else None
            return await self.in_threads(files) if rows is None else rows
        finally:
            self.metrics.observe("compute_seconds", time.perf_counter() - began, stage="decode")

    def at_once(self, data: bytes) -> Pixels | None:
        """uint8 [1, 3, 32, 32] of a small file; None for one that belongs in a thread."""
        if len(data) > SMALL_BYTES or any(kind in data for kind in INFLATED):
            return None
        try:
            return decode(data, min(SMALL_PIXELS, self.max_pixels))[None]
        except ContentTooLarge:
            return None

    async def in_threads(self, files: Sequence[bytes]) -> Pixels:
        rows = np.empty((len(files), 3, SIZE, SIZE), np.uint8)
        loop = asyncio.get_running_loop()
        late = time.monotonic() + self.timeout_s
        try:
            async with asyncio.timeout(self.timeout_s):
                for start in range(0, len(files), CHUNK):
                    part = slice(start, start + CHUNK)
                    await loop.run_in_executor(self.pool, self.fill, rows[part], files[part], late)
        except TimeoutError:
            raise BadRequest(ErrorMessage.IMAGE_SLOW, limit=self.timeout_s) from None
        return rows

    def fill(self, rows: Pixels, files: Sequence[bytes], late: float) -> None:
        """In a thread: stops between images once nobody waits any more."""
        for row, data in zip(rows, files, strict=True):
            if time.monotonic() > late:
                return
            row[:] = decode(data, self.max_pixels)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
