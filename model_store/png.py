"""A PNG file's chunks: what Pillow needs to decode the pixels, and apart from that what they mean.

Pillow reads only the chunks that make up the pixels. So text of any length, profiles of any size and animations cost
nothing. Whatever changes the meaning of a pixel is read here (PNG specification, third edition, section 11.3).
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from model_store.errors import ImageDamaged

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
GREY, TRUECOLOUR, INDEXED = 0, 2, 3  # colour types without an alpha channel
PIXELS: Final = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
MEANING: Final = frozenset((b"tRNS", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"))  # valid before IDAT alone
IHDR_BYTES: Final = b"\0\0\0\x0d"
USUAL: Final = bytes((8, TRUECOLOUR, 0, 0, 0))  # depth, colour, compression, filter, not interlaced
MAX_PROFILE_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class PngFile:
    """pixels: the file with nothing but pixels in it.  meaning: the first chunk of each kind that changes them.

    rows: the compressed rows alone, of a file that needs nothing else: eight bits of red, green and blue, in order.
    """

    depth: int
    colour: int
    pixels: bytes
    meaning: dict[bytes, bytes]
    rows: bytes | None = None

    @property
    def transparent(self) -> tuple[int, ...] | None:
        """The one colour that is transparent, as samples of the file's depth. None for palettes and without tRNS."""
        count = {GREY: 1, TRUECOLOUR: 3}.get(self.colour, 0)
        data = self.meaning.get(b"tRNS", b"")
        if not count or len(data) != 2 * count:
            return None
        return tuple(sample & ((1 << self.depth) - 1) for sample in struct.unpack(f">{count}H", data))

    @property
    def profile(self) -> bytes | None:
        """The ICC profile; None if there is none, or none that can be unpacked within MAX_PROFILE_BYTES."""
        _, _, packed = self.meaning.get(b"iCCP", b"").partition(b"\0")
        try:
            unpacker = zlib.decompressobj()
            profile = unpacker.decompress(packed[1:], MAX_PROFILE_BYTES)
        except zlib.error:
            return None
        return profile if profile and unpacker.eof else None


def read_png(data: bytes) -> PngFile:
    """Sorts the chunks. Raises ImageDamaged where a length or a checksum of a chunk of pixels is wrong."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageDamaged("a PNG that does not begin with IHDR")
    parts: list[memoryview | bytes] = [SIGNATURE]
    kinds: list[bytes] = []
    rows: list[memoryview] = []
    meaning: dict[bytes, bytes] = {}
    begun = False
    view = memoryview(data)
    for kind, start, end in chunks(data):
        begun = begun or kind == b"IDAT"
        if kind in PIXELS:
            check_sum(view, kind, start, end)
            parts.append(view[start:end])
            kinds.append(kind)
            if kind == b"IDAT":
                rows.append(view[start + 8 : end - 4])
        elif kind == b"eXIf" or (kind in MEANING and not begun):
            meaning.setdefault(kind, data[start + 8 : end - 4])
        if kind == b"tRNS" and not begun and data[25] == INDEXED:
            parts.append(view[start:end])  # opacities of a palette, which Pillow applies
    usual = data[8:12] == IHDR_BYTES and data[24:29] == USUAL and kinds.count(b"IHDR") == 1 and b"PLTE" not in kinds
    return PngFile(data[24], data[25], b"".join(parts), meaning, b"".join(rows) if usual and rows else None)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's kind, where it begins and where it ends, up to IEND."""
    start = len(SIGNATURE)
    while start < len(data):
        if start + 12 > len(data):
            raise ImageDamaged("a PNG that is cut short between two chunks")
        (length,) = struct.unpack_from(">I", data, start)
        kind, end = data[start + 4 : start + 8], start + 12 + length
        if end > len(data):
            raise ImageDamaged(f"a PNG that is cut short in a chunk of {length} bytes")
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end


def check_sum(view: memoryview, kind: bytes, start: int, end: int) -> None:
    if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
        raise ImageDamaged(f"a PNG whose chunk {kind.decode()} has a wrong checksum")
