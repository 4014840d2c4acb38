"""The one decoder: files of every form that the formats allow, against arithmetic and against a real Chromium."""

import ast
import io
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from model_store import images
from model_store.errors import ImageDamaged, ImageEmpty, ImageFormatUnknown, ImageRejected, ImageTooLarge
from model_store.images import DATA_FORMATS, Format, decode, fit, render
from model_store.input_spec import CIFAR10_INPUT, MAX_PIXELS, InputSpec, Interpolation, Resize
from model_store.png import read_png
from service.settings import Settings
from tools.console.browser import CHROMIUM, chromium
from tools.wild.compare import compare
from tools.wild.exif import write_exif
from tools.wild.pictures import HEIGHT, WIDTH, encoded, gradient, photo, pictures
from tools.wild.png_writer import GREY, TRUECOLOUR, chunk, write_png

ROOT: Final = Path(__file__).parents[2]
REFUSED: Final = {"png-rgb-cicp-9-16", "png-rgb-cicp-9-18", "png-palette-index-beyond"}


def spec_of(height: int, width: int, resize: Resize = "squash", interpolation: Interpolation = "bilinear") -> InputSpec:
    return InputSpec(height, width, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resize=resize, interpolation=interpolation)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_every_wild_picture_looks_as_it_does_in_chromium_or_is_refused() -> None:
    with chromium() as browser:
        results = list(compare(browser.new_page(), pictures()))
    assert len(results) >= 120
    assert [result.name for result in results if result.wrong] == []
    assert {result.name for result in results if result.refusal} == REFUSED
    assert all(result.shown for result in results)


def test_pictures_are_the_same_bytes_each_time_and_have_names_of_their_own() -> None:
    first, again = pictures(), pictures()
    assert first == again
    assert len({picture.name for picture in first}) == len(first)


def test_no_other_file_opens_pictures() -> None:
    """`Image.open` in the three packages: in the decoder alone."""
    opening = set()
    for package in ("model_store", "training", "service", "tombola"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Attribute)
                    and node.attr == "open"
                    and ast.unparse(node.value).endswith("Image")
                ):
                    opening.add(file.relative_to(ROOT).as_posix())
    assert opening == {"model_store/images.py"}


# Transparency


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_is_white_at_every_depth(depth: int) -> None:
    samples = gradient(1, depth)
    clear = int(samples[10, 20, 0])
    data = write_png(samples, GREY, depth, before=[chunk(b"tRNS", clear.to_bytes(2, "big"))])
    levels = samples[..., 0] >> 8 if depth == 16 else samples[..., 0] * (255 // ((1 << depth) - 1))
    expected = np.where(samples[..., 0] == clear, 255, levels)
    assert (np.asarray(render(data))[..., 0] == expected).all()


def test_sixteen_bit_colours_are_transparent_only_if_all_bits_agree() -> None:
    samples = gradient(3, 16)
    colour = samples[10, 20]
    near = write_png(samples, TRUECOLOUR, 16, before=[chunk(b"tRNS", (colour ^ 1).astype(">u2").tobytes())])
    same = write_png(samples, TRUECOLOUR, 16, before=[chunk(b"tRNS", colour.astype(">u2").tobytes())])
    assert (np.asarray(render(near)) == samples >> 8).all()
    assert (np.asarray(render(same))[10, 20] == 255).all()


# The short way for the commonest kind of PNG


def by_pillow(data: bytes) -> bytes | None:
    """The pixels that Pillow's plugin reads; None where it refuses the file."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return image.tobytes()
    except (OSError, SyntaxError, ValueError):
        return None


def by_us(data: bytes) -> bytes | None:
    try:
        return render(data).tobytes()
    except ImageRejected:
        return None


def test_usual_pngs_are_read_as_pillow_s_plugin_reads_them_and_damaged_ones_refused() -> None:
    """Every filter, several chunks, and 3,000 files with a byte of the pixels changed, or cut, its checksum mended."""
    rng = np.random.default_rng(0)
    taken = 0
    for width, height in ((1, 1), (32, 32), (33, 7), (300, 200)):
        rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
        data = write_png(rgb, TRUECOLOUR, 8)
        assert read_png(data).rows is not None
        assert by_us(data) == by_pillow(data) == rgb.tobytes()
    for filtered in range(5):
        rows = b"".join(bytes((filtered,)) + bytes(rng.integers(0, 256, 30 * 3, np.uint8)) for _ in range(20))
        deflated = zlib.compress(rows)
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, 2, 0, 0, 0))
        for number in range(600):
            body = bytearray(deflated)
            if number:
                body[int(rng.integers(len(body)))] ^= int(rng.integers(1, 256))
            if number % 7 == 1:
                del body[int(rng.integers(len(body))) :]
            cut = int(rng.integers(len(body) + 1))
            parts = chunk(b"IDAT", bytes(body[:cut])) + chunk(b"IDAT", bytes(body[cut:]))
            data = b"\x89PNG\r\n\x1a\n" + head + parts + chunk(b"IEND", b"")
            ours = by_us(data)
            if ours != by_pillow(data):  # Pillow does not look at a checksum that has a chunk of its own
                assert ours is None
                with pytest.raises(zlib.error):
                    zlib.decompress(body)
            taken += ours is not None
    assert 5 <= taken < 3000


@pytest.mark.parametrize(("place", "value"), [(10, 1), (11, 1), (12, 2)], ids=["compression", "filter", "interlace"])
def test_a_png_of_unknown_methods_does_not_take_the_short_way(place: int, value: int) -> None:
    data = write_png(np.zeros((4, 4, 3), np.uint8), TRUECOLOUR, 8)
    head = bytearray(data[16:29])
    head[place] = value
    changed = data[:8] + chunk(b"IHDR", bytes(head)) + data[33:]
    assert read_png(changed).rows is None
    assert by_us(changed) == by_pillow(changed)


# Ends and sizes


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_read_and_one_without_its_last_pixels_is_not(progressive: bool) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
    whole = encoded(noise, "JPEG", progressive=progressive)
    assert (decode(whole[:-2], CIFAR10_INPUT).pixels == decode(whole, CIFAR10_INPUT).pixels).all()
    assert (decode(whole[:-1], CIFAR10_INPUT).pixels == decode(whole, CIFAR10_INPUT).pixels).all()
    for lost in (20, 200, len(whole) // 2):
        with pytest.raises(ImageDamaged):
            decode(whole[:-lost], CIFAR10_INPUT)


def large_photo(**options: Any) -> bytes:
    """A JPEG of 12 megapixels with as much detail as a telephone keeps: about 3 MB."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8))
    smooth = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-6, 7, smooth.shape, np.int16)
    return encoded(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), "JPEG", quality=85, **options)


def test_a_photo_of_twelve_megapixels_is_read_by_default_and_looks_as_if_decoded_whole() -> None:
    spec = spec_of(64, 64)
    data = large_photo(exif=b"Exif\0\0" + write_exif(6))
    began = time.process_time()
    decoded = decode(data, spec, max_pixels=Settings().max_pixels)
    seconds = time.process_time() - began
    whole = render(data, max_pixels=MAX_PIXELS).resize((64, 64), Image.Resampling.BILINEAR)
    assert (decoded.width, decoded.height) == (3000, 4000)
    assert np.abs(np.asarray(whole).transpose(2, 0, 1).astype(int) - decoded.pixels).max() <= 1
    assert seconds < 0.2  # 36 ms where little else runs


def test_a_jpeg_is_handed_to_its_decoder_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 800, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", quality=95)
    pieces: list[bytes] = []
    read = JpegImageFile.load_read

    def remember(image: JpegImageFile, size: int) -> bytes:
        pieces.append(read(image, size))
        return pieces[-1]

    monkeypatch.setattr(JpegImageFile, "load_read", remember)
    decode(data, CIFAR10_INPUT)
    assert len(data) > 4 * ImageFile.MAXBLOCK
    assert pieces == [data]


def test_a_large_photo_without_its_end_is_read_like_a_small_one() -> None:
    data = encoded(photo().resize((2400, 2000)), "JPEG", quality=30)
    assert (decode(data[:-2], CIFAR10_INPUT).pixels == decode(data, CIFAR10_INPUT).pixels).all()


def test_a_jpeg_in_several_scans_is_measured_by_its_coefficients() -> None:
    """Each takes two bytes, and all are kept: 5 megapixels of three full components are 30 MB."""
    data = encoded(Image.new("RGB", (2500, 2000)), "JPEG", progressive=True, subsampling=0)
    assert decode(data, CIFAR10_INPUT, max_pixels=2_000_000).pixels.shape == (3, 32, 32)
    with pytest.raises(ImageTooLarge):
        decode(data, CIFAR10_INPUT, max_pixels=1_500_000)
    assert decode(encoded(Image.new("RGB", (2500, 2000)), "JPEG"), CIFAR10_INPUT, max_pixels=1_500_000).width == 2500


def test_a_pixel_limit_that_pillow_would_not_honour_is_refused_when_it_is_set() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    assert Settings(max_pixels=MAX_PIXELS).max_pixels == MAX_PIXELS
    with pytest.raises(ValueError, match="max_pixels"):
        Settings(max_pixels=MAX_PIXELS + 1)


def test_nothing_but_the_refusal_is_said_of_a_damaged_file(tmp_path: Path) -> None:
    """Pillow warns of some, with the paths of its own files. A sound one of which it warns is read."""
    file = tmp_path / "cut.tif"
    file.write_bytes(encoded(photo(), "TIFF")[:100])
    script = """
import sys
from model_store.images import DATA_FORMATS, ImageRejected, decode
from model_store.input_spec import CIFAR10_INPUT
try:
    decode(open(sys.argv[1], "rb").read(), CIFAR10_INPUT, formats=DATA_FORMATS)
except ImageRejected as error:
    print(error)
"""
    shown = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (shown.stdout, shown.stderr) == ("begins as TIFF and is none\n", "")


# Resizing


@pytest.mark.parametrize(("resize", "expected"), [("squash", (0, 255)), ("cover", (0, 255)), ("contain", (255, 255))])
def test_other_proportions_become_the_input_s(resize: Resize, expected: tuple[int, int]) -> None:
    """A picture twice as wide as high, black at the left and white at the right, with a grey third in the middle."""
    wide = np.full((16, 32, 3), 255, np.uint8)
    wide[:, :16] = 0
    spec = spec_of(16, 16, resize, "nearest")
    pixels = decode(encoded(Image.fromarray(wide), "PNG"), spec).pixels[0]
    assert (pixels[0, 0], pixels[0, 15]) == expected
    assert pixels[8].tolist() == [0] * 8 + [255] * 8
    assert (pixels[0] == 255).all() == (resize == "contain")


@pytest.mark.parametrize("resize", ["squash", "cover", "contain"])
def test_pictures_of_any_proportions_become_the_input_s_size_whatever_rounding_does(resize: Resize) -> None:
    for spec in (spec_of(64, 64, resize), spec_of(48, 64, resize), spec_of(37, 91, resize)):
        for width in range(10, 200, 7):
            for height in range(11, 200, 5):
                assert fit(Image.new("RGB", (width, height)), (spec.width, spec.height), spec).size == (
                    spec.width,
                    spec.height,
                )


@pytest.mark.parametrize("resize", ["squash", "cover", "contain"])
@pytest.mark.parametrize("value", range(1, 9))
def test_turned_pictures_are_resized_as_a_person_sees_them(resize: Resize, value: int) -> None:
    spec = spec_of(20, 48, resize)
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0" + write_exif(value))
    upright = encoded(render(data), "PNG")
    decoded, expected = decode(data, spec), decode(upright, spec)
    assert (decoded.width, decoded.height) == (expected.width, expected.height)
    assert (decoded.width, decoded.height) == ((WIDTH, HEIGHT) if value < 5 else (HEIGHT, WIDTH))
    assert np.abs(decoded.pixels.astype(int) - expected.pixels).max() <= 1


# Formats


@pytest.mark.parametrize("kind", DATA_FORMATS)
def test_every_format_of_data_sets_is_told_by_its_first_bytes_and_read(kind: Format) -> None:
    data = encoded(photo(), kind)
    assert images.sniff(data) == kind
    assert decode(data, CIFAR10_INPUT, formats=DATA_FORMATS).pixels.shape == (3, 32, 32)
    if kind not in images.WEB_FORMATS:
        with pytest.raises(ImageFormatUnknown):
            decode(data, CIFAR10_INPUT)


def test_floats_and_nothing_are_refused_in_words() -> None:
    with pytest.raises(ImageRejected, match="samples of 32 bits"):
        decode(encoded(Image.new("F", (9, 9)), "TIFF"), CIFAR10_INPUT, formats=DATA_FORMATS)
    with pytest.raises(ImageEmpty):
        decode(b"", CIFAR10_INPUT)
