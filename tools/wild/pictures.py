"""Pictures as the world sends them: every form that the formats allow and that decoders are known to disagree about.

`pictures()` grows: add a form whenever a report, a browser or a camera shows one. Nothing is read from disk, and the
same bytes come out each time. `python -m tools.wild.compare` shows each to a real Chromium and to our decoder.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_store.colour import BT1886, PRIMARIES, SRGB_CURVE, icc_profile, matrix_profile
from tools.wild.exif import Kind, write_exif
from tools.wild.png_writer import (
    GREY,
    GREY_ALPHA,
    INDEXED,
    SAMPLES,
    TRUECOLOUR,
    TRUECOLOUR_ALPHA,
    Samples,
    chunk,
    profile_chunk,
    write_png,
)

WIDTH: Final = 40
HEIGHT: Final = 24
DEPTHS: Final = {
    GREY: (1, 2, 4, 8, 16),
    TRUECOLOUR: (8, 16),
    INDEXED: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    TRUECOLOUR_ALPHA: (8, 16),
}
NAMES: Final = {GREY: "grey", TRUECOLOUR: "rgb", INDEXED: "palette", GREY_ALPHA: "grey-alpha", TRUECOLOUR_ALPHA: "rgba"}
P3: Final = PRIMARIES[12]
SRGB: Final = PRIMARIES[1]
ADOBE: Final = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290))


@dataclass(frozen=True)
class Picture:
    """One file, and what Chromium does not do with it.

    turned: how a person turns it upright, 1 to 8, where Chromium does not.  whole: the file that Chromium is shown
    instead, where it leaves out pixels that are there.
    """

    name: str
    data: bytes
    turned: int = 1
    whole: bytes | None = None


def gradient(samples: int, depth: int) -> Samples:
    """[HEIGHT, WIDTH, samples]: another gradient in every sample; no two corners look the same."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    parts = (
        columns / (WIDTH - 1),
        rows / (HEIGHT - 1),
        (rows + columns) / (HEIGHT + WIDTH - 2),
        1 - columns / (WIDTH - 1) * rows / (HEIGHT - 1),
    )
    chosen = (parts[0], parts[3]) if samples == 2 else parts[:samples]
    return np.stack([np.rint(part * ((1 << depth) - 1)) for part in chosen], axis=2).astype(np.uint16)


def photo(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(gradient(3, 8).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def palette(depth: int) -> bytes:
    """PLTE of 2 ** depth colours."""
    steps = np.arange(1 << depth)
    colours = np.stack([steps * 37, steps * 91 + 60, 255 - steps * 53], axis=1) % 256
    return chunk(b"PLTE", colours.astype(np.uint8).tobytes())


def pictures() -> list[Picture]:
    """All of them, by distinct names."""
    makers = (png_kinds, png_transparency, png_colours, png_oddities, jpegs, webps, profiles, orientations, others)
    return [picture for maker in makers for picture in maker()]


def png_kinds() -> Iterator[Picture]:
    for colour, depths in DEPTHS.items():
        for depth in depths:
            before = [palette(depth)] if colour == INDEXED else []
            for interlaced in (False, True):
                data = write_png(gradient(SAMPLES[colour], depth), colour, depth, before=before, interlaced=interlaced)
                yield Picture(f"png-{NAMES[colour]}-{depth}{'-adam7' if interlaced else ''}", data)


def png_transparency() -> Iterator[Picture]:
    for depth in DEPTHS[GREY]:
        samples = gradient(1, depth)
        for name, value in (("first", samples[0, 0]), ("middle", samples[10, 20]), ("none", samples[0, 0] ^ 1)):
            before = [chunk(b"tRNS", struct.pack(">H", int(value[0])))]
            yield Picture(f"png-grey-{depth}-trns-{name}", write_png(samples, GREY, depth, before=before))
        high = struct.pack(">H", int(samples[10, 20, 0]) | 0x8000)
        yield Picture(
            f"png-grey-{depth}-trns-high-bits", write_png(samples, GREY, depth, before=[chunk(b"tRNS", high)])
        )
    for depth in DEPTHS[TRUECOLOUR]:
        samples = gradient(3, depth)
        for name, shift in (("exact", 0), ("neighbour", 1)):
            colour = struct.pack(">3H", *(int(value) ^ shift for value in samples[10, 20]))
            for interlaced in (False, True):
                data = write_png(samples, TRUECOLOUR, depth, before=[chunk(b"tRNS", colour)], interlaced=interlaced)
                yield Picture(f"png-rgb-{depth}-trns-{name}{'-adam7' if interlaced else ''}", data)
    deep = gradient(1, 16)
    before = [chunk(b"tRNS", struct.pack(">H", int(deep[10, 20, 0])))]
    yield Picture("png-grey-16-trns-adam7", write_png(deep, GREY, 16, before=before, interlaced=True))
    for depth in DEPTHS[INDEXED]:
        before = [palette(depth), chunk(b"tRNS", b"\x40")]
        data = write_png(gradient(1, depth), INDEXED, depth, before=before, interlaced=True)
        yield Picture(f"png-palette-{depth}-trns-adam7", data)
        for name, opacities in (("first", b"\0"), ("half", b"\xff\x80"), ("all", bytes(range(0, 256, 256 >> depth)))):
            before = [palette(depth), chunk(b"tRNS", opacities[: 1 << depth])]
            yield Picture(
                f"png-palette-{depth}-trns-{name}", write_png(gradient(1, depth), INDEXED, depth, before=before)
            )
    yield Picture("png-grey-8-trns-short", write_png(gradient(1, 8), GREY, 8, before=[chunk(b"tRNS", b"\5")]))
    yield Picture("png-rgb-8-trns-short", write_png(gradient(3, 8), TRUECOLOUR, 8, before=[chunk(b"tRNS", b"\0\5")]))


def number(value: float) -> bytes:
    return struct.pack(">I", round(value * 100_000))


def chromaticities(primaries: Any) -> bytes:
    red, green, blue, white = primaries
    return chunk(b"cHRM", b"".join(number(part) for xy in (white, red, green, blue) for part in xy))


def png_colours() -> Iterator[Picture]:
    """What changes the meaning of samples: gAMA, cHRM, sRGB, cICP, and which of them wins."""
    powers = {"2.2": 1 / 2.2, "1.0": 1.0, "1.8": 1 / 1.8, "almost-2.2": 0.47, "2.5": 0.4, "4.5": 0.22222}
    gammas = {name: chunk(b"gAMA", number(value)) for name, value in powers.items()}
    for colour in (GREY, TRUECOLOUR, TRUECOLOUR_ALPHA):
        for name, gamma in gammas.items():
            yield Picture(
                f"png-{NAMES[colour]}-gamma-{name}", write_png(gradient(SAMPLES[colour], 8), colour, 8, before=[gamma])
            )
    for name, primaries in (("srgb", SRGB), ("p3", P3), ("adobe", ADOBE)):
        for power in ("2.2", "1.0"):
            before = [gammas[power], chromaticities(primaries)]
            yield Picture(f"png-rgb-gamma-{power}-chrm-{name}", write_png(gradient(3, 8), TRUECOLOUR, 8, before=before))
    rgb = gradient(3, 8)
    yield Picture("png-rgb-chrm-alone", write_png(rgb, TRUECOLOUR, 8, before=[chromaticities(P3)]))
    yield Picture("png-rgb-gamma-0", write_png(rgb, TRUECOLOUR, 8, before=[chunk(b"gAMA", bytes(4))]))
    yield Picture("png-rgb-gamma-late", write_png(rgb, TRUECOLOUR, 8, after=[gammas["1.0"]]))
    yield Picture("png-rgb-srgb-wins", write_png(rgb, TRUECOLOUR, 8, before=[chunk(b"sRGB", b"\0"), gammas["1.0"]]))
    before = [gammas["1.0"], palette(4)]
    yield Picture("png-palette-4-gamma-1.0", write_png(gradient(1, 4), INDEXED, 4, before=before))
    for code in sorted(PRIMARIES):
        yield Picture(f"png-rgb-cicp-{code}-13", cicp(code, 13))
    for curve in (1, 4, 5, 6, 7, 8, 14, 15):
        yield Picture(f"png-rgb-cicp-1-{curve}", cicp(1, curve))
    yield Picture("png-rgb-cicp-narrow", cicp(12, 8, full=0))
    for curve in (16, 18):
        yield Picture(f"png-rgb-cicp-9-{curve}", cicp(9, curve))


def cicp(primaries: int, curve: int, full: int = 1) -> bytes:
    return write_png(gradient(3, 8), TRUECOLOUR, 8, before=[chunk(b"cICP", bytes([primaries, curve, 0, full]))])


def png_oddities() -> Iterator[Picture]:
    rgb = gradient(3, 8)
    text = chunk(b"tEXt", b"Comment\0" + b"x" * (1 << 20))
    yield Picture("png-text-1mb", write_png(rgb, TRUECOLOUR, 8, before=[text]))
    yield Picture("png-text-1mb-after", write_png(rgb, TRUECOLOUR, 8, after=[text]))
    inflated = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20)))
    yield Picture("png-ztxt-2mb", write_png(rgb, TRUECOLOUR, 8, before=[inflated]))
    yield Picture("png-many-idat", write_png(rgb, TRUECOLOUR, 8, parts=40))
    yield Picture("png-private-chunk", write_png(rgb, TRUECOLOUR, 8, before=[chunk(b"prVt", b"anything")]))
    still = [chunk(b"acTL", struct.pack(">II", 1, 0)),
             chunk(b"fcTL", struct.pack(">5I2H2B", 0, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0))]  # fmt: skip
    yield Picture("png-animation-of-one", write_png(rgb, TRUECOLOUR, 8, before=still))
    yield Picture("png-trailing-bytes", write_png(rgb, TRUECOLOUR, 8) + b"trailing bytes" * 10)
    yield Picture("png-suggested-palette", write_png(rgb, TRUECOLOUR, 8, before=[palette(2)]))
    beyond = write_png(gradient(1, 4), INDEXED, 4, before=[palette(2)])
    yield Picture("png-palette-index-beyond", beyond)


def jpegs() -> Iterator[Picture]:
    for quality in (30, 95):
        for subsampling, name in enumerate(("444", "422", "420")):
            data = encoded(photo(), "JPEG", quality=quality, subsampling=subsampling)
            yield Picture(f"jpeg-{quality}-{name}", data)
    yield Picture("jpeg-progressive", encoded(photo(), "JPEG", progressive=True))
    yield Picture("jpeg-optimized", encoded(photo(), "JPEG", optimize=True))
    yield Picture("jpeg-restart-markers", encoded(photo(), "JPEG", restart_marker_blocks=2))
    yield Picture("jpeg-grey", encoded(photo("L"), "JPEG"))
    yield Picture("jpeg-grey-progressive", encoded(photo("L"), "JPEG", progressive=True))
    yield Picture("jpeg-rgb", encoded(photo(), "JPEG", keep_rgb=True))
    cmyk = encoded(Image.fromarray(gradient(4, 8).astype(np.uint8), "CMYK"), "JPEG", quality=95)
    yield Picture("jpeg-cmyk-adobe", cmyk)
    yield Picture("jpeg-ycck", adobe_transform(cmyk, 2))
    yield Picture("jpeg-cmyk-no-adobe", without_adobe(cmyk))
    yield Picture("jpeg-cmyk-progressive", encoded(photo("CMYK"), "JPEG", progressive=True))
    yield Picture("jpeg-comment", encoded(photo(), "JPEG", comment="x" * 60_000))
    for name, progressive in (("baseline", False), ("progressive", True)):
        whole = encoded(photo(), "JPEG", progressive=progressive)
        yield Picture(f"jpeg-no-end-{name}", whole[:-2], whole=whole)
    two = encoded(photo(), "MPO", save_all=True, append_images=[photo().transpose(Image.Transpose.ROTATE_180)])
    yield Picture("jpeg-of-two-pictures", two)
    yield Picture("jpeg-411", encoded(photo(), "JPEG", subsampling="4:1:1"))
    yield Picture("jpeg-one-pixel", encoded(photo().resize((1, 1)), "JPEG"))
    yield Picture("jpeg-cmyk-exif-6", encoded(photo("CMYK"), "JPEG", exif=b"Exif\0\0" + write_exif(6)))
    yield Picture("jpeg-trailing-bytes", encoded(photo(), "JPEG") + b"trailing bytes" * 10)


def adobe_segment(data: bytes) -> tuple[int, int]:
    start = data.index(b"\xff\xee")
    return start, start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def adobe_transform(data: bytes, transform: int) -> bytes:
    """The same coefficients, said to be of another colour space."""
    _, end = adobe_segment(data)
    return data[: end - 1] + bytes([transform]) + data[end:]


def without_adobe(data: bytes) -> bytes:
    start, end = adobe_segment(data)
    return data[:start] + data[end:]


def webps() -> Iterator[Picture]:
    alpha = Image.fromarray(gradient(4, 8).astype(np.uint8), "RGBA")
    for name, image in (("rgb", photo()), ("rgba", alpha), ("grey", photo("L"))):
        yield Picture(f"webp-{name}-lossless", encoded(image, "WEBP", lossless=True))
        yield Picture(f"webp-{name}-lossy", encoded(image, "WEBP", quality=80))
    yield Picture("webp-rgba-exact", encoded(alpha, "WEBP", lossless=True, exact=True))
    yield Picture("webp-rgba-exif-6", encoded(alpha, "WEBP", lossless=True, exif=b"Exif\0\0" + write_exif(6)), 6)
    frames = [alpha, alpha.transpose(Image.Transpose.ROTATE_180)]
    yield Picture("webp-animation", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))


def grey_profile(curve: tuple[float, ...]) -> bytes:
    kind = 3 if len(curve) > 1 else 0
    values = b"".join(struct.pack(">i", round(value * 65536)) for value in curve)
    return icc_profile(b"GRAY", {b"kTRC": b"para" + bytes(4) + struct.pack(">HH", kind, 0) + values})


def ink_profile() -> bytes:
    """CMYK to Lab (lut8Type), on a grid of two points a side."""
    corners = np.stack(np.meshgrid(*[np.arange(2)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    lightness = 255 - corners @ np.array([30, 30, 10, 60]) - 20
    table = np.stack([lightness, 128 + corners[:, 1] * 20 - corners[:, 0] * 20, 128 + corners[:, 2] * 25], axis=1)
    ramp = bytes(range(256))
    matrix = b"".join(struct.pack(">i", 65536 * (row == column)) for row in range(3) for column in range(3))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table.astype(np.uint8).tobytes() + ramp * 3
    return icc_profile(b"CMYK", {b"A2B0": lut}, b"Lab ")


def profiles() -> Iterator[Picture]:
    spaces = {
        "srgb": matrix_profile(SRGB, SRGB_CURVE),
        "p3": matrix_profile(P3, SRGB_CURVE),
        "adobe": matrix_profile(ADOBE, (563 / 256,)),
        "bt2020": matrix_profile(PRIMARIES[9], BT1886),
        "linear": matrix_profile(SRGB, (1.0,)),
        "damaged": b"damaged" * 40,
        "grey": grey_profile((1.0,)),
    }
    modes = {"rgb": "RGB", "rgba": "RGBA", "grey": "L", "palette": "P", "grey-alpha": "LA"}
    for name, profile in spaces.items():
        for kind, mode in modes.items():
            yield Picture(f"png-{kind}-icc-{name}", encoded(photo(mode), "PNG", icc_profile=profile))
        yield Picture(f"jpeg-rgb-icc-{name}", encoded(photo(), "JPEG", quality=95, icc_profile=profile))
        yield Picture(f"jpeg-grey-icc-{name}", encoded(photo("L"), "JPEG", quality=95, icc_profile=profile))
        yield Picture(f"webp-rgb-icc-{name}", encoded(photo(), "WEBP", lossless=True, icc_profile=profile))
    rgb, p3, linear = gradient(3, 8), profile_chunk(spaces["p3"] or b""), profile_chunk(spaces["linear"] or b"")
    yield Picture("png-rgb-16-icc-p3", write_png(gradient(3, 16), TRUECOLOUR, 16, before=[p3]))
    yield Picture("png-grey-4-icc-linear", write_png(gradient(1, 4), GREY, 4, before=[linear]))
    for colour, kind in ((GREY, "grey"), (TRUECOLOUR, "rgb")):
        dark = gradient(SAMPLES[colour], 16) // 64
        for name, part in (("icc", linear), ("gamma", chunk(b"gAMA", number(1)))):
            yield Picture(f"png-{kind}-16-dark-{name}-linear", write_png(dark, colour, 16, before=[part]))
    yield Picture("png-icc-before-gamma", write_png(rgb, TRUECOLOUR, 8, before=[p3, chunk(b"gAMA", number(1))]))
    before = [chunk(b"cICP", bytes([1, 8, 0, 1])), p3]
    yield Picture("png-cicp-before-icc", write_png(rgb, TRUECOLOUR, 8, before=before))
    large = (spaces["p3"] or b"") + np.random.default_rng(0).integers(0, 256, 1_500_000, np.uint8).tobytes()
    yield Picture("png-icc-large", write_png(rgb, TRUECOLOUR, 8, before=[profile_chunk(sized(large))]))
    cmyk = Image.fromarray(gradient(4, 8).astype(np.uint8), "CMYK")
    without_profile = encoded(
        cmyk, "JPEG", quality=95
    )  # Chromium 156 applies such a profile to what it has made RGB already
    yield Picture("jpeg-cmyk-icc", encoded(cmyk, "JPEG", quality=95, icc_profile=ink_profile()), whole=without_profile)
    yield Picture("jpeg-cmyk-icc-of-rgb", encoded(cmyk, "JPEG", quality=95, icc_profile=spaces["p3"]))


def sized(profile: bytes) -> bytes:
    """The profile with its size in its header, as it should be after bytes were added."""
    return struct.pack(">I", len(profile)) + profile[4:]


def orientations() -> Iterator[Picture]:
    """Every value in JPEG; the other places and forms for two values. Chromium reads SHORT in JPEG and PNG alone."""
    head = b"Exif\0\0"
    for value in range(1, 9):
        for big in (True, False):
            exif = head + write_exif(value, big_endian=big)
            yield Picture(f"jpeg-exif-{value}-{'big' if big else 'little'}", encoded(photo(), "JPEG", exif=exif))
        yield Picture(f"webp-exif-{value}", encoded(photo(), "WEBP", lossless=True, exif=write_exif(value)), value)
        block = chunk(b"eXIf", write_exif(value))
        yield Picture(f"png-exif-{value}", write_png(gradient(3, 8), TRUECOLOUR, 8, before=[block]))
    for value in (3, 6):
        for big in (True, False):
            kind: Kind = "LONG"
            order = "big" if big else "little"
            exif = write_exif(value, big_endian=big, kind=kind)
            yield Picture(f"jpeg-exif-{value}-long-{order}", encoded(photo(), "JPEG", exif=head + exif), value)
            data = write_png(gradient(3, 8), TRUECOLOUR, 8, before=[chunk(b"eXIf", exif)])
            yield Picture(f"png-exif-{value}-long-{order}", data, value)
        yield Picture(f"jpeg-exif-{value}-twice", encoded(photo(), "JPEG", exif=head * 2 + write_exif(value)), value)
        yield Picture(f"jpeg-exif-{value}-tags", encoded(photo(), "JPEG", exif=head + write_exif(value, other_tags=7)))
        after = [chunk(b"eXIf", write_exif(value))]
        yield Picture(f"png-exif-{value}-after", write_png(gradient(3, 8), TRUECOLOUR, 8, after=after), value)
    yield Picture("jpeg-exif-9", encoded(photo(), "JPEG", exif=head + write_exif(9)))
    yield Picture("jpeg-exif-0", encoded(photo(), "JPEG", exif=head + write_exif(0)))


def others() -> Iterator[Picture]:
    """What labelled data sets may hold beside the formats of requests.

    No AVIF with alpha: Chromium 156 widens its full-range alpha as if it were of limited range.
    """
    yield Picture("gif", encoded(photo("P"), "GIF"))
    yield Picture("gif-transparent", encoded(photo("P"), "GIF", transparency=3))
    yield Picture("bmp", encoded(photo(), "BMP"))
    yield Picture("bmp-grey", encoded(photo("L"), "BMP"))
    yield Picture("bmp-palette", encoded(photo("P"), "BMP"))
    yield Picture("bmp-1", encoded(photo("1"), "BMP"))
    yield Picture("avif", encoded(photo(), "AVIF", quality=90, subsampling="4:4:4"))


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """[H, W, 3] turned as EXIF's orientation says (TIFF 6.0, page 36: where row 0 and column 0 are)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
