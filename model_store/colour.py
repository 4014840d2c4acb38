"""Colours as a browser shows them: ICC profiles and PNG's colour chunks become sRGB.

What is followed, because Chromium does (measured, tools/wild): a profile that fits the kind of picture is applied; one
that is damaged or of another kind is ignored. In a PNG the first of cICP, iCCP, sRGB and gAMA counts. A gAMA within 5 %
of 1/2.2 without cHRM means sRGB; with cHRM it is a power law. What is sRGB to within one level is left as it is.
Profiles of CMYK are not applied: Chromium 156 applies them to values it has already made RGB, which nobody can want.
"""

import io
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from model_store.errors import ImageDamaged, ImageUnsupported
from model_store.png import PngFile

Matrix = NDArray[np.float64]
Chromaticity = tuple[float, float]
# ITU-T H.273 (cICP): red, green, blue and white of each set of primaries.
D65: Final = (0.3127, 0.3290)
C: Final = (0.310, 0.316)
PRIMARIES: Final[dict[int, tuple[Chromaticity, Chromaticity, Chromaticity, Chromaticity]]] = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65),
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), C),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), C),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), D65),
}
# Parametric curves of ICC (function type 3: g, a, b, c, d; type 0: g) for the transfer functions of H.273.
SRGB_CURVE: Final = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
BT1886: Final = (2.4,)  # how displays show what cameras encode after BT.709, and Chromium with them
SMPTE240: Final = (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4.0, 0.0913)
CURVES: Final[dict[int, tuple[float, ...]]] = {
    1: BT1886, 4: (2.2,), 5: (2.8,), 6: BT1886, 7: SMPTE240, 8: (1.0,), 11: BT1886, 13: SRGB_CURVE, 14: BT1886,
    15: BT1886,
}  # fmt: skip
HDR: Final = (16, 18)  # PQ and HLG, which a browser maps by taste
D50: Final = np.array([0.9642, 1.0, 0.8249])
BRADFORD: Final = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SPACES: Final = {b"RGB ": "RGB", b"GRAY": "L"}
NO_OPTIMIZATION: Final = ImageCms.Flags.NOOPTIMIZE  # lcms's table for grey is off by up to ten levels


def png_profile(png: PngFile) -> bytes | None:
    """The ICC profile that a PNG's chunks come to. None: sRGB. Raises ImageDamaged, ImageUnsupported."""
    meaning = png.meaning
    if b"cICP" in meaning:
        return cicp_profile(meaning[b"cICP"])
    profile = png.profile
    if profile is not None and colour_space(profile) is not None:
        return profile
    if b"sRGB" in meaning or len(meaning.get(b"gAMA", b"")) != 4:
        return None
    return gamma_profile(int.from_bytes(meaning[b"gAMA"], "big"), meaning.get(b"cHRM", b""))


def cicp_profile(data: bytes) -> bytes | None:
    if len(data) != 4 or data[2] != 0:
        raise ImageDamaged("a PNG whose cICP chunk is not of RGB samples")
    primaries, curve, _, full = data
    if curve in HDR:
        raise ImageUnsupported("a PNG of high dynamic range (cICP with PQ or HLG); expected one in sRGB")
    if not full or primaries not in PRIMARIES or curve not in CURVES:
        return None
    return matrix_profile(PRIMARIES[primaries], CURVES[curve])


def gamma_profile(gamma: int, chromaticities: bytes) -> bytes | None:
    if gamma == 0:
        return None
    if len(chromaticities) == 32:
        white, red, green, blue = np.frombuffer(chromaticities, ">u4").reshape(4, 2) / 100_000
        primaries = tuple((float(x), float(y)) for x, y in (red, green, blue, white))
        return matrix_profile(primaries, (100_000 / gamma,))
    if abs(gamma * 2.2 / 100_000 - 1) < 0.05:
        return None
    return matrix_profile(PRIMARIES[1], (100_000 / gamma,))


@lru_cache(maxsize=64)
def matrix_profile(primaries: Sequence[Chromaticity], curve: Sequence[float]) -> bytes | None:
    """An ICC profile (version 4) of red, green, blue and white and one curve; None if they are no colours."""
    try:
        red, green, blue, white = (tristimulus(*xy) for xy in primaries)
        columns = np.stack([red, green, blue], axis=1)
        columns = columns * np.linalg.solve(columns, white)
        scale = (BRADFORD @ D50) / (BRADFORD @ white)
        adapted = np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ columns
        kind = 3 if len(curve) > 1 else 0
        response = b"para" + bytes(4) + struct.pack(">HH", kind, 0) + b"".join(map(fixed, curve))
        tags = {
            name: b"XYZ " + bytes(4) + b"".join(map(fixed, column))
            for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (*adapted.T, D50), strict=True)
        }
    except (ArithmeticError, np.linalg.LinAlgError, struct.error, ValueError):
        return None
    return icc_profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), response))


def tristimulus(x: float, y: float) -> Matrix:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(float(value) * 65536))


def icc_profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """The bytes of a display profile with these tags (ICC.1:2022, section 7)."""
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s28s", start + len(body), b"", 0x04200000, b"mntr", space, connection, bytes(12),
                       b"acsp", bytes(28))  # fmt: skip
    return head + b"".join(map(fixed, D50)) + bytes(48) + table + body


def colour_space(profile: bytes) -> str | None:
    """The mode of the pictures that a profile describes; None for no profile and for kinds that no picture has."""
    return SPACES.get(profile[16:20]) if profile[36:40] == b"acsp" else None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture of mode L, RGB or RGBA with its profile applied, where there is anything to apply."""
    space = colour_space(profile)
    if space == "RGB":
        change = transform(profile, "RGBA" if image.mode == "RGBA" else "RGB")
        return image if change is None else change.apply(image.convert("RGB") if image.mode == "L" else image)
    curve = grey_curve(profile) if space == image.mode == "L" else None
    return image if curve is None else image.point(curve)


@lru_cache(maxsize=8)
def transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for a profile that cannot be used, or is sRGB within one level."""
    change = build_transform(profile, mode, mode, ImageCms.Flags.NONE)
    if change is None:
        return None
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    probe = np.concatenate([cube, ramp], axis=1)
    shown = np.asarray(change.apply(Image.fromarray(probe).convert(mode)).convert("RGB"))
    return None if np.abs(shown.astype(int) - probe).max() <= 1 else change


@lru_cache(maxsize=8)
def grey_curve(profile: bytes) -> tuple[int, ...] | None:
    """What each of the 256 levels becomes; None as above."""
    change = build_transform(profile, "L", "RGB", NO_OPTIMIZATION)
    if change is None:
        return None
    ramp = np.arange(256, dtype=np.uint8)[None]
    shown = np.asarray(change.apply(Image.fromarray(ramp)))[0, :, 1].astype(int)
    return None if np.abs(shown - ramp[0]).max() <= 1 else tuple(shown.tolist())


def build_transform(profile: bytes, mode: str, out: str, flags: ImageCms.Flags) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        return ImageCms.ImageCmsTransform(source, target, mode, out, intent, flags=flags)
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        return None
