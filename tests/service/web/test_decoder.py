"""The decoder: what each kind of image becomes, and what hostile files become."""

import asyncio
import io
import random
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from model_store.data_files import LOCAL
from model_store.images import Pixels, orientation
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.labelled_images import open_data
from service.errors import BadRequest, ContentTooLarge, ErrorMessage, ServiceError, UnsupportedMediaType
from service.observability.metrics import Metrics
from service.settings import Settings
from service.web import decoder as decoder_module
from service.web.decoder import Decoder
from service.web.decoder import decode as decode_for
from tests.support.planes import encoded, picture, png

MAX_PIXELS: Final = 4_000_000
KINDS: Final = ("PNG", "JPEG", "WEBP")
NOISE: Final = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
PILLOW_WARNS: Final = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def decode(data: bytes, max_pixels: int) -> Pixels:
    return decode_for(data, CIFAR10_INPUT, max_pixels)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey PNG by hand: signature, header, the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)


def refusal(data: bytes) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        decode(data, MAX_PIXELS)
    return caught.value


class TestWhatImagesBecome:
    def test_a_32x32_png_is_left_as_it_is(self) -> None:
        image = NOISE.crop((0, 0, 32, 32))
        assert (decode(encoded(image), MAX_PIXELS) == np.asarray(image).transpose(2, 0, 1)).all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [(32, 32), (80, 48), (7, 200), (1, 1)])
    def test_pixels_are_those_that_training_sees(self, kind: str, size: tuple[int, int], tmp_path: Path) -> None:
        data = encoded(NOISE.resize(size), kind)
        (tmp_path / "train" / "cat").mkdir(parents=True)
        (tmp_path / "train" / "cat" / "0.png").write_bytes(data)
        with open_data(tmp_path, LOCAL) as images:
            seen = images.parts["train"].load(0, CIFAR10_INPUT).pixels
        assert (decode(data, MAX_PIXELS) == seen).all()

    @pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
    def test_other_modes_become_rgb(self, mode: str) -> None:
        image = NOISE.crop((0, 0, 32, 32)).convert(mode)
        data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
        if mode == "CMYK":
            data = encoded(image, "JPEG", quality=95)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        assert (decode(data, MAX_PIXELS) == expected).all()

    def test_sixteen_bit_grey_keeps_its_upper_eight_bits(self) -> None:
        values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
        decoded = decode(encoded(Image.fromarray(values)), MAX_PIXELS)
        assert (decoded == (values >> 8).astype(np.uint8)).all()

    def test_alpha_is_composed_over_white(self) -> None:
        half = Image.new("RGBA", (32, 32), (200, 0, 0, 128))
        expected = [round((200 * 128 + 255 * 127) / 255), 127, 127]
        assert abs(decode(encoded(half), MAX_PIXELS)[:, 5, 5].astype(int) - expected).max() <= 1

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_what_is_transparent_is_white_whatever_colour_hides_there(self, kind: str) -> None:
        hidden = Image.new("RGBA", (32, 32), (200, 30, 30, 0))
        assert (decode(encoded(hidden, kind, lossless=True, exact=True), MAX_PIXELS) == 255).all()

    def test_a_transparent_palette_entry_and_grey_are_white_too(self) -> None:
        palette = NOISE.crop((0, 0, 32, 32)).convert("P")
        assert (decode(encoded(palette, transparency=bytes(256)), MAX_PIXELS) == 255).all()
        grey = Image.new("L", (32, 32), 7)
        assert (decode(encoded(grey, transparency=7), MAX_PIXELS) == 255).all()

    @pytest.mark.parametrize("tag", range(1, 9))
    @pytest.mark.parametrize("kind", KINDS)
    def test_images_are_turned_upright_as_their_exif_says(self, tag: int, kind: str) -> None:
        exif = Image.Exif()
        exif[0x0112] = tag
        data = encoded(NOISE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        expected = np.asarray(upright.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert abs(decode(data, MAX_PIXELS).astype(int) - expected).max() <= 1  # resized before turning, not after

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_of_an_animation_the_first_frame_counts(self, kind: str) -> None:
        frames = [picture(red) for red in (10, 110, 210)]
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (decode(data, MAX_PIXELS)[0] == 10).all()

    def test_of_an_apng_with_a_default_image_that_image_counts(self) -> None:
        frames = [picture(red) for red in (10, 110, 210)]
        data = encoded(frames[0], save_all=True, default_image=True, append_images=frames[1:])
        assert (decode(data, MAX_PIXELS)[0] == 10).all()


class TestOrientation:
    def test_both_byte_orders(self) -> None:
        for order, head in (("<", b"II*\0"), (">", b"MM\0*")):
            entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
            assert orientation(b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + entry) == 6

    @given(st.binary(max_size=200))
    def test_any_bytes_give_a_number_and_no_error(self, data: bytes) -> None:
        assert isinstance(orientation(b"II*\0" + data), int)
        assert isinstance(orientation(data), int)


class TestWhatIsRefused:
    def test_nothing(self) -> None:
        assert refusal(b"").message == ErrorMessage.IMAGE_EMPTY

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS", "PDF", "JPEG2000", "TGA", "SGI"])
    def test_other_formats_whose_readers_are_never_run(self, kind: str) -> None:
        error = refusal(encoded(picture(), kind))
        assert (type(error), error.status, error.message) == (UnsupportedMediaType, 415, ErrorMessage.IMAGE_FORMAT)

    def test_another_format_behind_the_first_bytes_of_an_accepted_one(self) -> None:
        for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"):
            assert refusal(start + encoded(picture(), "GIF")).message == ErrorMessage.IMAGE_DAMAGED

    @PILLOW_WARNS
    @pytest.mark.parametrize("kind", KINDS)
    def test_files_cut_short_at_any_place(self, kind: str) -> None:
        data = encoded(NOISE, kind)
        for length in range(1, len(data) - 20, 97):
            assert refusal(data[:length]).message in (ErrorMessage.IMAGE_DAMAGED, ErrorMessage.IMAGE_FORMAT)

    def test_too_many_pixels_are_seen_in_the_header_before_any_is_decoded(self) -> None:
        for width, height in ((20_000, 20_000), (1_000_000, 5), (2001, 2000)):
            error = refusal(png_of(width, height, chunk(b"IDAT", b"")))  # not one pixel could be decoded
            assert (type(error), error.status) == (ContentTooLarge, 413)
            assert error.message == ErrorMessage.IMAGE_TOO_LARGE.format(limit=MAX_PIXELS)

    def test_a_bomb_of_fifty_kilobytes_costs_no_memory(self) -> None:
        bomb = png_of(20_000, 20_000, chunk(b"IDAT", zlib.compress(bytes(20_001 * 2_000), 9)), chunk(b"IEND", b""))
        assert len(bomb) < 50_000
        assert peak_bytes(bomb) < 1_000_000

    def test_exactly_the_limit_is_accepted(self) -> None:
        strip = encoded(picture(100, (1_000_000, 4)))
        assert decode(strip, MAX_PIXELS).shape == (3, 32, 32)
        assert refusal(encoded(picture(100, (1_000_001, 4)))).status == 413

    def test_text_chunks_that_inflate_without_end(self) -> None:
        bombs = [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9)) for _ in range(3)]
        pixels = chunk(b"IDAT", zlib.compress(bytes(33 * 32)))
        data = png_of(32, 32, *bombs, pixels, chunk(b"IEND", b""))
        assert peak_bytes(data) < 8_000_000

    @PILLOW_WARNS
    def test_exif_whose_entries_all_claim_the_whole_file(self) -> None:
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000)
        exif += b"".join(struct.pack("<HHII", tag, 7, 60_000, 10) for tag in range(5000)) + bytes(4)
        jpeg = encoded(picture(), "JPEG")
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        without_jfif = jpeg[:2] + segment + jpeg[20:]  # Pillow then looks for the resolution in the EXIF
        assert peak_bytes(without_jfif) < 8_000_000

    def test_a_polyglot_is_only_the_image_it_begins_as(self) -> None:
        page = b"<script>alert(1)</script><?php system('id'); ?>PK\x03\x04"
        assert (decode(png(110) + page, MAX_PIXELS) == decode(png(110), MAX_PIXELS)).all()


def peak_bytes(data: bytes) -> int:
    """The most memory that decoding took, whatever it came to."""
    tracemalloc.start()
    with suppress(ServiceError):
        decode(data, MAX_PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@PILLOW_WARNS
class TestFuzz:
    """Every outcome is an image of the right form or a refusal with a text of the catalogue."""

    @staticmethod
    def outcome(data: bytes) -> None:
        with suppress(BadRequest, ContentTooLarge, UnsupportedMediaType):
            decoded = decode(data, 100_000)
            assert decoded.shape == (3, 32, 32)
            assert decoded.dtype == np.uint8

    @given(st.sampled_from(KINDS), st.randoms(use_true_random=False), st.integers(1, 12))
    def test_flipped_bytes(self, kind: str, chance: random.Random, flips: int) -> None:
        data = bytearray(encoded(NOISE, kind))
        for _ in range(flips):
            data[chance.randrange(len(data))] = chance.randrange(256)
        self.outcome(bytes(data))

    @given(st.sampled_from((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\0\0\0WEBPVP8X")), st.binary(max_size=300))
    def test_garbage_after_the_first_bytes(self, start: bytes, rest: bytes) -> None:
        self.outcome(start + rest)

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(b"IHDR PLTE IDAT tRNS zTXt iTXt iCCP acTL fcTL fdAT eXIf gAMA IEND".split()),
                st.binary(max_size=40),
            ),
            max_size=8,
        )
    )
    def test_png_chunks_in_any_order(self, chunks: list[tuple[bytes, bytes]]) -> None:
        self.outcome(png_of(32, 32, *(chunk(kind, data) for kind, data in chunks)))


class TestDecoder:
    @pytest.fixture
    def decoder(self) -> Iterator[Decoder]:
        decoder = Decoder(Settings(), Metrics())
        yield decoder
        decoder.close()

    def test_small_images_are_decoded_at_once_and_the_others_in_a_thread(
        self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads = []

        def spied(data: bytes, spec: InputSpec, max_pixels: int, *, scaled: bool = True) -> Pixels:
            decoded = decode_for(data, spec, max_pixels, scaled=scaled)
            threads.append(threading.current_thread().name)
            return decoded

        monkeypatch.setattr(decoder_module, "decode", spied)
        caller = threading.current_thread().name
        unpacking = encoded(picture(), icc_profile=bytes(1000))
        for data in (png(), png(size=(64, 65)), encoded(NOISE), unpacking):
            asyncio.run(decoder.rows([data], CIFAR10_INPUT))
        assert len(encoded(NOISE)) > decoder_module.SMALL_BYTES > len(unpacking)
        assert [name == caller for name in threads] == [True, False, False, False]

    def test_many_images_in_order(self, decoder: Decoder) -> None:
        decoded = asyncio.run(decoder.rows([png(red) for red in range(20)], CIFAR10_INPUT))
        assert decoded[:, 0, 0, 0].tolist() == list(range(20))

    def test_one_bad_image_among_many_refuses_them_all(self, decoder: Decoder) -> None:
        with pytest.raises(BadRequest):
            asyncio.run(decoder.rows([png(), png()[:50], png()], CIFAR10_INPUT))

    def test_after_the_time_the_client_is_told_and_the_rest_is_not_decoded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoder = Decoder(Settings(decode_timeout_s=0.05), Metrics())
        go, done = threading.Event(), []

        def slow(data: bytes, spec: InputSpec, max_pixels: int, *, scaled: bool = True) -> Pixels:
            go.wait(30)
            done.append(data)
            return decode(data, max_pixels)

        monkeypatch.setattr(decoder_module, "decode", slow)
        with pytest.raises(BadRequest, match="longer than"):
            asyncio.run(decoder.rows([png()] * 5, CIFAR10_INPUT))
        go.set()
        decoder.pool.shutdown(wait=True)
        assert len(done) == 1

    def test_the_event_loop_goes_on_meanwhile(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        go = threading.Event()

        def wait_and_decode(data: bytes, spec: InputSpec, max_pixels: int, *, scaled: bool = True) -> Pixels:
            assert go.wait(30)
            return decode(data, max_pixels)

        monkeypatch.setattr(decoder_module, "decode", wait_and_decode)

        async def both() -> Any:
            large = asyncio.ensure_future(decoder.rows([encoded(NOISE)], CIFAR10_INPUT))
            await asyncio.sleep(0)
            go.set()  # only reached if decoding does not hold the loop
            return await large

        assert asyncio.run(both()).shape == (1, 3, 32, 32)
