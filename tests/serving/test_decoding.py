"""Pictures of strangers: what each kind becomes, and what ends the decoder but not the service."""

from __future__ import annotations

import base64
import io
import os
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from mim_ray.config.scenario import Data, Serving
from mim_ray.data.transforms import BadImage, PictureFormat, decode_image
from mim_ray.errors import UnavailableError
from mim_ray.serving.decoding import ImageDecoder, TimeLeft
from mim_ray.serving.limits import guarded
from mim_ray.serving.messages import NewItem
from mim_ray.serving.pictures import Pictures

MAX_BYTES, MAX_PIXELS = 1_000_000, 20_000_000
SMALL = PictureFormat(8, "squash")
WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture(scope="module")
def decoder():
    decoder = ImageDecoder(MAX_BYTES, MAX_PIXELS)
    yield decoder
    decoder.close()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def palette() -> Image.Image:
    """All pixels have the first colour, which is black."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    return image


def animated(kind: str) -> bytes:
    return encoded(Image.new("RGB", (8, 8), RED), kind, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])


def with_zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("run.html", "<script>alert(1)</script>")
    return data + stream.getvalue()


def turned() -> bytes:
    """Left half red, right half white; EXIF says that it is to be turned by 180 degrees."""
    image = Image.new("RGB", (64, 64), WHITE)
    image.paste(RED, (0, 0, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(image, "JPEG", exif=exif, quality=95)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def gif_frame(side: int) -> bytes:
    """The screen is 1 x 1, the frame is not."""
    screen = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\x00\x00" + bytes(3) + b"\xff" * 3
    return screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00;"


def many_scans(side: int, num_scans: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, is there again and again."""
    data = encoded(Image.new("L", (side, side), 100), "JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * num_scans + b"\xff\xd9"


def several(data: bytes) -> bytes:
    """The JPEG `data` with a blue one behind it and an index of both: Pillow calls it MPO, as it does photos of many phones."""
    pair = encoded(
        Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    start = pair.index(b"\xff\xe2")  # the index, APP2
    index = pair[start : start + 2 + int.from_bytes(pair[start + 2 : start + 4])]
    made = data[:2] + index + data[2:] + pair[pair.index(b"\xff\xd9\xff\xd8") + 2 :]
    assert Image.open(io.BytesIO(made)).format == "MPO"
    return made


GOOD = {
    "JPEG": (encoded(Image.new("RGB", (8, 8), RED), "JPEG"), RED),
    "PNG": (encoded(Image.new("RGB", (8, 8), RED), "PNG"), RED),
    "WebP": (encoded(Image.new("RGB", (8, 8), RED), "WEBP", lossless=True), RED),
    "GIF": (encoded(Image.new("RGB", (8, 8), RED), "GIF"), RED),
    "first frame of a GIF": (animated("GIF"), RED),
    "first frame of a PNG": (animated("PNG"), RED),
    "first frame of a WebP": (animated("WEBP"), RED),
    "first picture of several in a JPEG": (several(encoded(Image.new("RGB", (8, 8), RED), "JPEG")), RED),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED),
    "16 bits of grey": (encoded(Image.fromarray(np.full((8, 8), 100 << 8, np.uint16)), "PNG"), (100,) * 3),
    "palette, transparent": (encoded(palette(), "PNG", transparency=0), WHITE),
    "GIF, transparent": (encoded(palette(), "GIF", transparency=0), WHITE),
    "black and white": (encoded(Image.new("1", (8, 8), 1), "PNG"), WHITE),
    "JPEG with a ZIP behind it": (with_zip(encoded(Image.new("RGB", (8, 8), RED), "JPEG")), RED),
    "PNG with HTML behind it": (encoded(Image.new("RGB", (8, 8), RED), "PNG") + b"<script>alert(1)</script>", RED),
    "turned by EXIF": (turned(), WHITE),
}
BAD = {
    "nothing": (b"", "image format"),
    "HTML": (b"<html><script>alert(1)</script>", "image format"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "image format"),
    "ZIP": (with_zip(b""), "image format"),
    "HTML that begins like a GIF": (b"GIF89a/*<script>*/=1;//", "image corrupt"),
    "BMP": (encoded(Image.new("RGB", (8, 8)), "BMP"), "image format"),
    "TIFF": (encoded(Image.new("RGB", (8, 8)), "TIFF"), "image format"),
    "ICO": (encoded(Image.new("RGB", (16, 16)), "ICO"), "image format"),
    "PDF": (encoded(Image.new("RGB", (8, 8)), "PDF"), "image format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "image format"),
    "cut JPEG": (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:-200], "image corrupt"),
    "cut PNG": (encoded(Image.effect_noise((64, 64), 90), "PNG")[:-200], "image corrupt"),
    "cut WebP": (encoded(Image.effect_noise((64, 64), 90), "WEBP")[:-200], "image corrupt"),
    "cut GIF": (encoded(Image.effect_noise((64, 64), 90), "GIF")[:-200], "image corrupt"),
    "PNG header only": (b"\x89PNG\r\n\x1a\n", "image corrupt"),
    "JPEG header only": (b"\xff\xd8\xff", "image corrupt"),
    "too many bytes": (b"\xff\xd8\xff" + bytes(MAX_BYTES), "image too large"),
    "too many pixels": (png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(1000)))), "image too large"),
    "GIF frame larger than the screen": (gif_frame(9_000), "image too large"),
    "GIF frame far larger": (gif_frame(60_000), "image too large"),
    "no width": (png(0, 8, chunk(b"IDAT", zlib.compress(b""))), "image corrupt"),
    "text that unpacks to 200 MB": (
        png(
            8,
            8,
            chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)),
            chunk(b"IDAT", zlib.compress(bytes(72))),
        ),
        "image corrupt",
    ),
    "too many scans": (many_scans(64, 1_000), "image corrupt"),
    "too many scans in the first of several": (several(many_scans(64, 1_000)), "image corrupt"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_picture_becomes_the_pixels_that_extraction_would_see(decoder, name):
    data, colour = GOOD[name]
    pixels = decoder.decode(data, SMALL, TimeLeft(60.0))
    np.testing.assert_allclose(pixels[:, 1, 1], colour, atol=3)
    np.testing.assert_array_equal(pixels, decode_image(data, SMALL))


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_usable_picture_is_refused_with_a_reason(decoder, name):
    data, reason = BAD[name]
    with pytest.raises(BadImage) as refused:
        decoder.decode(data, SMALL, TimeLeft(60.0))
    assert refused.value.reason == reason, refused.value.detail
    assert len(refused.value.detail) < 200
    good, _ = GOOD["PNG"]
    assert decoder.decode(good, SMALL, TimeLeft(60.0)).shape == (3, 8, 8)


def test_a_jpeg_of_several_pictures_costs_and_becomes_what_its_first_alone_does(decoder):
    alone = encoded(
        Image.effect_noise((800, 600), 90).convert("RGB"), "JPEG"
    )  # pixels tell at what scale it was decoded
    pixels = decoder.decode(several(alone), SMALL, TimeLeft(60.0))
    np.testing.assert_array_equal(pixels, decode_image(alone, SMALL))


def test_a_picture_that_takes_too_long_ends_its_process_and_nothing_else(decoder):
    good, _ = GOOD["PNG"]
    decoder.decode(good, SMALL, TimeLeft(60.0))
    first = decoder._process.pid
    left = TimeLeft(0.3)
    with pytest.raises(BadImage, match="image too slow"):
        decoder.decode(many_scans(4_000, 450), SMALL, left)
    assert left.seconds <= 0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert decoder.decode(good, SMALL, TimeLeft(60.0)).shape == (3, 8, 8)
    assert decoder._process.pid != first


def test_time_is_counted_over_the_pictures_of_a_request(decoder):
    left = TimeLeft(60.0)
    for _ in range(2):
        before = left.seconds
        decoder.decode(many_scans(1_000, 20), SMALL, left)
        assert left.seconds < before


def test_who_waits_too_long_for_the_pictures_of_others_is_told_to_come_back(decoder):
    good, _ = GOOD["PNG"]
    mine, others = TimeLeft(0.1), TimeLeft(60.0)
    with decoder._turn(others), pytest.raises(UnavailableError, match="Send this one again"):
        decoder.decode(good, SMALL, mine)
    assert mine.waiting_s <= 0
    assert mine.seconds == 0.1, "it was not its own picture that was slow"
    assert decoder.decode(good, SMALL, TimeLeft(60.0)).shape == (3, 8, 8)


def test_waiting_is_counted_over_the_pictures_of_a_request(decoder):
    good, _ = GOOD["PNG"]
    mine = TimeLeft(60.0)
    for _ in range(2):
        before, asked = mine.waiting_s, threading.Thread(target=decoder.decode, args=(good, SMALL, mine))
        with decoder._turn(TimeLeft(60.0)):
            asked.start()
            asked.join(0.05)
        asked.join()
        assert mine.waiting_s < before


def test_while_the_pictures_of_others_are_decoded_an_app_answers_503_and_when_to_come_back():
    limits, serving = Data(max_image_bytes=MAX_BYTES), Serving(decode_timeout_s=0.1)
    pictures, app = Pictures(SMALL, limits, serving), FastAPI()

    @app.post("/picture")
    def picture() -> list[int]:
        _, pixels = pictures.get(
            NewItem(item_id="i", image=base64.b64encode(GOOD["PNG"][0])), 0, pictures.time_limits()
        )
        return list(pixels.shape)

    client = TestClient(guarded(app, serving), raise_server_exceptions=False)
    decoder = ImageDecoder.shared(MAX_BYTES, limits.max_image_pixels)
    with decoder._turn(TimeLeft(60.0)):
        busy = client.post("/picture")
    assert (busy.status_code, busy.headers["retry-after"], set(busy.json())) == (503, "1", {"error"})


def test_a_decoder_that_dies_is_replaced(decoder):
    good, _ = GOOD["PNG"]
    decoder.decode(good, SMALL, TimeLeft(60.0))
    decoder._process.kill()
    decoder._process.wait()
    assert decoder.decode(good, SMALL, TimeLeft(60.0)).shape == (3, 8, 8)


def test_the_largest_picture_that_is_allowed_fits_into_the_decoders_memory(decoder):
    side = int(MAX_PIXELS**0.5)
    data = encoded(Image.new("RGBA", (side, side), (0, 0, 0, 0)), "PNG", compress_level=1)
    assert (decoder.decode(data, SMALL, TimeLeft(60.0)) == 255).all()


def test_the_decoder_sees_no_secrets(decoder, monkeypatch):
    monkeypatch.setenv("MIM_RAY_API_KEYS", "hidden")
    fresh = ImageDecoder(MAX_BYTES, MAX_PIXELS)
    fresh.decode(GOOD["PNG"][0], SMALL, TimeLeft(60.0))
    with open(f"/proc/{fresh._process.pid}/environ", "rb") as environ:
        names = {entry.partition(b"=")[0] for entry in environ.read().split(b"\0")} - {b""}
    fresh.close()
    assert names <= {b"PATH", b"PYTHONPATH", b"OMP_NUM_THREADS", b"LC_CTYPE"}


def test_a_decoder_that_is_started_is_the_one_that_decodes_and_one_that_does_not_start_is_tried_again(monkeypatch):
    fresh = ImageDecoder(MAX_BYTES, MAX_PIXELS)
    with monkeypatch.context() as quick:
        quick.setattr("mim_ray.serving.decoding.START_TIMEOUT_S", 0.0)
        with pytest.raises(UnavailableError, match="did not start"):
            fresh.start()
    fresh.start()
    pid = fresh._process.pid
    fresh.decode(GOOD["PNG"][0], SMALL, TimeLeft(60.0))
    assert fresh._process.pid == pid
    fresh.close()
