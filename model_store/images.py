"""Encoded pictures -> uint8 [3, H, W]: the one decoder. Training, serving and audits see the same pixels through it.

A picture becomes what a browser shows on a white page, within one level (tools/wild compares them):

- Format: told by the first bytes; names and content types are not believed.
- Size: read from the header and checked before anything is decoded. A JPEG of more than SCALED_ABOVE pixels is decoded
  at a half, a quarter or an eighth. It is still at least twice as large as the network's input.
- Orientation: EXIF's tag is applied, as SHORT or LONG, also after a doubled header, in PNG and WebP too. Chromium
  applies it as SHORT in JPEG and PNG alone; Pillow and ImageMagick do as is done here.
- Animations: the first frame; for APNG the default image. The others are never decoded.
- Transparency, also of palettes and single colours, at every bit depth: composed over white.
- Colours: ICC profiles and PNG's colour chunks become sRGB (colour.py). 16 bits become their upper eight.
- CMYK and YCCK: Pillow's conversion, which is Chromium's. Their profiles are not applied.
- A JPEG without its end marker is read if all its pixels are there.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Final, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from model_store.colour import png_profile, to_srgb
from model_store.errors import (
    ImageDamaged,
    ImageEmpty,
    ImageFormatUnknown,
    ImageRejected,
    ImageTooLarge,
    ImageUnsupported,
)
from model_store.input_spec import InputSpec, Interpolation
from model_store.png import INDEXED, PngFile, read_png

Format = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
WEB_FORMATS: Final[tuple[Format, ...]] = ("PNG", "JPEG", "WEBP")
DATA_FORMATS: Final[tuple[Format, ...]] = (*WEB_FORMATS, "GIF", "BMP", "TIFF", "AVIF")
MAGIC: Final[tuple[tuple[Format, tuple[bytes, ...]], ...]] = (
    ("PNG", (b"\x89PNG\r\n\x1a\n",)),
    ("JPEG", (b"\xff\xd8\xff",)),
    ("GIF", (b"GIF87a", b"GIF89a")),
    ("TIFF", (b"II*\0", b"MM\0*")),
    ("BMP", (b"BM",)),
)
DEFAULT_MAX_PIXELS: Final = 4_000_000
SCALED_ABOVE: Final = 4_000_000  # pixels of a JPEG
MEMORY_PER_PIXEL: Final = 16  # bytes: an RGBA picture, white, their composition, and the result, at four bytes each
ORIENTATION: Final = 0x0112  # EXIF tag; TIFF 6.0, page 36
SHORT, LONG = 3, 4  # TIFF's kinds of numbers
UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FILTERS: Final[dict[Interpolation, Image.Resampling]] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
END_OF_JPEG: Final = b"\xff\xd9"
NOISE: Final = bytes((37 * place + 11) % 251 for place in range(512))  # no byte is 255, which would begin a marker
Pixels = NDArray[np.uint8]

# Process-wide and once: warnings.catch_warnings is not safe in threads. Beyond Pillow's own limit, not ours.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # a lenient decoder's remarks, with its paths


@dataclass(frozen=True)
class DecodedImage:
    """pixels: uint8 [3, H, W] of the input's size.  width, height: as a person sees it.  mode: Pillow's, before."""

    pixels: Pixels
    width: int
    height: int
    mode: str


def sniff(data: bytes) -> Format | None:
    """The format that the first bytes promise."""
    for kind, starts in MAGIC:
        if data.startswith(starts):
            return kind
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return "AVIF" if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis") else None


def decode(
    data: bytes,
    spec: InputSpec,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    formats: tuple[Format, ...] = WEB_FORMATS,
    scaled: bool = True,
) -> DecodedImage:
    """Decodes one picture to a network's input.

    Args:
      data: the file's bytes, not trusted.
      spec: the size of the result, and how other sizes become it.
      max_pixels: the largest picture that is decoded; also bounds memory, at MEMORY_PER_PIXEL for each.
      formats: those that are read.
      scaled: whether a large JPEG may be decoded at a fraction of its size.

    Raises:
      ImageRejected: one of its kinds, with a sentence that says what was found.
    """
    target = (spec.width, spec.height)
    image, turn = open_rgb(data, target, max_pixels, formats, scaled)
    mode, (width, height) = image.info["mode"], image.info["size"]
    if turn in (5, 6, 7, 8):
        width, height = height, width
    if spec.resize != "squash" and turn in UPRIGHT:  # margins of an odd number of pixels lie as a person sees them
        image, turn = image.transpose(UPRIGHT[turn]), 1
    small = fit(image, target[::-1] if turn in (5, 6, 7, 8) else target, spec)
    if turn in UPRIGHT:
        small = small.transpose(UPRIGHT[turn])
    return DecodedImage(np.asarray(small).transpose(2, 0, 1).copy(), width, height, mode)


def render(
    data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, formats: tuple[Format, ...] = WEB_FORMATS
) -> Image.Image:
    """The picture at its own size, upright, RGB on white: what decode() makes smaller. Raises ImageRejected."""
    image, turn = open_rgb(data, None, max_pixels, formats, scaled=False)
    return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image


def open_rgb(
    data: bytes, target: tuple[int, int] | None, max_pixels: int, formats: tuple[Format, ...], scaled: bool
) -> tuple[Image.Image, int]:
    """An RGB picture on white, not turned yet, and EXIF's number for how to turn it. Raises ImageRejected."""
    if not data:
        raise ImageEmpty("no bytes")
    kind = sniff(data)
    if kind is None or kind not in formats:
        raise ImageFormatUnknown(f"an unsupported format: it begins with {data[:12]!r}")
    try:
        if kind == "PNG":
            return open_png(data, max_pixels)
        return open_other(data, kind, target if scaled else None, max_pixels)
    except ImageRejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(max_pixels) from None
    except UnidentifiedImageError:
        raise ImageDamaged(f"begins as {kind} and is none") from None
    except Exception as error:  # noqa: BLE001 -- hostile bytes make a decoder raise anything; it means a damaged image
        raise ImageDamaged(f"a damaged {kind} file ({error!s:.100})") from None


def open_png(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    if (
        data[12:16] == b"IHDR" and len(data) >= 24
    ):  # before the chunks, so that nothing of a picture that is too large is copied
        width, height = struct.unpack_from(">II", data, 16)
        check_size(width, height, max_pixels)
    png = read_png(data)
    image = open_usual(data, png) or open_with_pillow(png, max_pixels)
    mode, size, shown = image.mode, image.size, samples_of(image, png)
    profile = png_profile(png)
    rgb = on_white(shown if profile is None else with_profile(shown, profile))
    rgb.info |= {"mode": mode, "size": size}
    return rgb, orientation(png.meaning.get(b"eXIf", b""))


def open_usual(data: bytes, png: PngFile) -> Image.Image | None:
    """The commonest kind of PNG, by the decoder that Pillow's plugin would choose, without the plugin: its start takes
    half of the time of a small picture."""
    width, height = struct.unpack_from(">II", data, 16)
    if png.rows is None or not width * height:
        return None
    return Image.frombytes("RGB", (width, height), png.rows, "zip", ("RGB", False))


def open_with_pillow(png: PngFile, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(png.pixels), formats=("PNG",)) as image:
        check_size(*image.size, max_pixels)
        image.load()
        return image


def samples_of(image: Image.Image, png: PngFile) -> Image.Image:
    """Eight bits of each sample, with the one transparent colour of a tRNS chunk as an alpha channel."""
    if png.colour == INDEXED:
        check_indices(image)
        return image
    transparent = png.transparent
    clear = None if transparent is None else is_colour(image, png, transparent)
    if image.mode.startswith("I"):  # 16-bit grey, whose values convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if clear is None:
        return image
    image = image.convert("RGB")
    image.putalpha(Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255))))
    return image


def is_colour(image: Image.Image, png: PngFile, colour: tuple[int, ...]) -> NDArray[np.bool_]:
    """Where a picture has exactly this colour, in samples of the file's own depth. bool [H, W]."""
    if png.depth == 16 and len(colour) == 3:
        matches = np.asarray(image) == np.array([sample >> 8 for sample in colour])
        return np.asarray((matches & (low_bytes(png) == np.array([s & 255 for s in colour]))).all(axis=2))
    steps = 255 // ((1 << png.depth) - 1) if png.depth < 8 else 1
    array = np.asarray(image.convert("L") if image.mode == "1" else image)
    if len(colour) == 3:
        return np.asarray((array == np.array(colour)).all(axis=2))
    return np.asarray(array == colour[0] * steps)


def low_bytes(png: PngFile) -> Pixels:
    """The lower eight bits of 16-bit colours, which Pillow drops: the same rows, read as if they were little-endian."""
    with Image.open(io.BytesIO(png.pixels), formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(image)


def check_indices(image: Image.Image) -> None:
    """A palette must have every colour that a pixel names; decoders disagree about what is shown otherwise."""
    palette = image.palette
    highest = cast("tuple[int, int]", image.getextrema())[1]
    if palette is None or 3 * highest >= len(palette.palette):
        raise ImageDamaged(f"a PNG with a pixel of colour {highest}, which its palette does not have")


def open_other(data: bytes, kind: Format, target: tuple[int, int] | None, max_pixels: int) -> tuple[Image.Image, int]:
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        size = image.size
        if isinstance(image, JpegImageFile):
            prepare(image, len(data), target)
            check_memory(image, size, data, max_pixels)
        check_size(*image.size, max_pixels)
        shown = load(image, data, target)
        exif, mode = image.info.get("exif", b""), image.mode
        profile = image.info.get("icc_profile")
    rgb = on_white(with_profile(shown, profile) if profile else shown)
    rgb.info |= {"mode": mode, "size": size}
    return rgb, orientation(exif)


def prepare(image: JpegImageFile, length: int, target: tuple[int, int] | None) -> None:
    """Decodes a JPEG of `length` bytes in one call, and a large one at a fraction of its size, of at least twice the
    target, whichever way it is turned.

    Pillow would hand over 64 KB at a time: each block is copied twice, and libjpeg reads its last 3 KB more slowly.
    """
    image.decodermaxblock = length
    if target is not None and image.width * image.height > SCALED_ABOVE:
        image.draft(None, (2 * max(target), 2 * max(target)))


def check_memory(image: JpegImageFile, size: tuple[int, int], data: bytes, max_pixels: int) -> None:
    """A JPEG in several scans keeps all coefficients, two bytes each, however small the result is."""
    if not image.info.get("progressive") and scan_components(image, data) == len(image.layer):
        return
    most = max(across * down for _, across, down, _ in image.layer)
    samples = sum(size[0] * size[1] * across * down / most for _, across, down, _ in image.layer)
    if 2 * samples > MEMORY_PER_PIXEL * max_pixels:
        raise ImageTooLarge(max_pixels)


def scan_components(image: JpegImageFile, data: bytes) -> int:
    """Components of the first scan, whose header (ITU-T T.81, B.2.3) Pillow has just read; 0 if it is not there."""
    end = image.fp.tell() if image.fp is not None else 0
    for count in range(1, 5):
        size = 6 + 2 * count
        if data[end - size - 2 : end - size + 3] == b"\xff\xda" + struct.pack(">HB", size, count):
            return count
    return 0


def load(image: Image.Image, data: bytes, target: tuple[int, int] | None) -> Image.Image:
    try:
        image.load()
    except OSError:
        if image.format != "JPEG":
            raise
        return load_unfinished(data, target)
    return image


def load_unfinished(data: bytes, target: tuple[int, int] | None) -> Image.Image:
    """A JPEG whose file ends early, if the pixels do not depend on what would have followed. Raises ImageDamaged."""
    body = data.rstrip(b"\xff")
    one, other = (load_with_tail(body, tail, target) for tail in (END_OF_JPEG, NOISE + END_OF_JPEG))
    if one.tobytes() != other.tobytes():
        raise ImageDamaged("a JPEG that ends before its last pixels")
    return one


def load_with_tail(body: bytes, tail: bytes, target: tuple[int, int] | None) -> Image.Image:
    image = cast("JpegImageFile", Image.open(io.BytesIO(body + tail), formats=("JPEG",)))
    prepare(image, len(body + tail), target)
    image.load()
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(max_pixels)


def with_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture with its profile applied, in a mode to which that can be done."""
    if image.mode == "CMYK":
        return image
    if image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info:
        return to_srgb(image, profile)
    if image.mode == "LA":
        grey, alpha = image.split()
        rgb = to_srgb(grey, profile).convert("RGB")
        rgb.putalpha(alpha)
        return rgb
    return to_srgb(image.convert("RGBA" if image.has_transparency_data else "RGB"), profile)


def on_white(image: Image.Image) -> Image.Image:
    """RGB, whatever it was; transparency is composed over white."""
    if image.mode in ("I", "F"):
        raise ImageUnsupported(f"samples of 32 bits (mode {image.mode}); expected 8 or 16")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], spec: InputSpec) -> Image.Image:
    """The picture at the input's size. size: (width, height), before the picture is turned."""
    if image.size == size:
        return image
    method = FILTERS[spec.interpolation]
    if spec.resize == "squash":
        return image.resize(size, method)
    scale = (size[0] / image.width, size[1] / image.height)
    if spec.resize == "cover":
        # One of the two is the whole side, and rounding must not make it longer.
        width, height = min(size[0] / max(scale), image.width), min(size[1] / max(scale), image.height)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return image.resize(size, method, box=(left, top, left + width, top + height))
    inner = (max(1, round(image.width * min(scale))), max(1, round(image.height * min(scale))))
    page = Image.new("RGB", size, "white")
    page.paste(image.resize(inner, method), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return page


def orientation(exif: bytes) -> int:
    """The orientation, 1..8, of a block of EXIF; 1 where there is none or it is damaged.

    Read by hand: a full EXIF parser copies every value, and a hostile block can make each of 65,535 entries megabytes.
    """
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")  # some tools write the header twice
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for position in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, position)
            if tag == ORIENTATION and kind in (SHORT, LONG) and count == 1:
                return int(struct.unpack_from(order + ("H" if kind == SHORT else "I"), tiff, position + 8)[0])
    except struct.error:
        return 1
    return 1
