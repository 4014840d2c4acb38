"""Writes PNG files by hand: every colour type, bit depth and ancillary chunk, also those that no library writes."""

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
GREY, TRUECOLOUR, INDEXED, GREY_ALPHA, TRUECOLOUR_ALPHA = 0, 2, 3, 4, 6
SAMPLES: Final = {GREY: 1, TRUECOLOUR: 3, INDEXED: 1, GREY_ALPHA: 2, TRUECOLOUR_ALPHA: 4}
# Adam7 (PNG specification, section 8.2): first column, first row, column step and row step of each pass.
ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
Samples = NDArray[np.uint16]


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(
    samples: Samples,
    colour: int,
    depth: int,
    *,
    before: Iterable[bytes] = (),
    after: Iterable[bytes] = (),
    interlaced: bool = False,
    parts: int = 1,
) -> bytes:
    """A PNG file.

    Args:
      samples: [H, W, samples of a pixel], each below 2 ** depth.
      colour: the colour type of the specification: 0, 2, 3, 4 or 6.
      depth: bits of a sample: 1, 2, 4, 8 or 16.
      before: chunks between IHDR and IDAT.
      after: chunks between IDAT and IEND.
      interlaced: whether the rows come in Adam7's seven passes.
      parts: the number of IDAT chunks.
    """
    height, width, count = samples.shape
    if count != SAMPLES[colour]:
        raise ValueError(f"{count} samples a pixel; colour type {colour} has {SAMPLES[colour]}")
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    packed = zlib.compress(b"".join(scanlines(samples, depth, interlaced)))
    step = -(-len(packed) // parts)
    data = (chunk(b"IDAT", packed[start : start + step]) for start in range(0, len(packed), step))
    return b"".join([SIGNATURE, chunk(b"IHDR", header), *before, *data, *after, chunk(b"IEND", b"")])


def scanlines(samples: Samples, depth: int, interlaced: bool) -> Iterator[bytes]:
    """Every row with its filter type in front; the filters Sub and Up take turns with None."""
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    for left, top, across, down in passes:
        rows = samples[top::down, left::across]
        if not rows.size:
            continue
        above = b""
        for index, row in enumerate(rows):
            packed = pack_row(row, depth)
            step = max(1, depth * samples.shape[2] // 8)
            yield filtered(index % 3, packed, above or bytes(len(packed)), step)
            above = packed


def pack_row(row: Samples, depth: int) -> bytes:
    values = row.reshape(-1)
    if depth == 16:
        return values.astype(">u2").tobytes()
    if depth == 8:
        return values.astype(np.uint8).tobytes()
    bits = (values[:, None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()


def filtered(kind: int, row: bytes, above: bytes, step: int) -> bytes:
    """A row through one of the filters None, Sub and Up (PNG specification, section 9.2)."""
    predicted = (bytes(len(row)), bytes(step) + row[:-step], above)[kind]
    return bytes([kind, *((value - guess) & 255 for value, guess in zip(row, predicted, strict=False))])


def profile_chunk(profile: bytes) -> bytes:
    """iCCP."""
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))
