"""Pictures are decoded or refused with a countable reason; behaviors are padded on the right."""

import io

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from mim_ray.data.transforms import (
    BadImage,
    PictureFormat,
    check_image,
    clean_title,
    content_hash,
    decode_image,
    decode_images,
    pad_behaviors,
    pad_ragged,
)


def encoded(size=(8, 4), mode="RGB", colour=(255, 0, 0), format="PNG"):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_a_red_picture_stays_red(format, resize):
    pixels = decode_image(encoded((60, 40), format=format), PictureFormat(16, resize))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert pixels[0, 8, 8] > 240
    assert pixels[1, 8, 8] < 15
    assert (pixels[1, 0, 8] > 240) == (resize == "longest")  # the white bar above


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.9), ("bilinear", 1.0)])
@pytest.mark.parametrize("sides", [(50, 37), (37, 50), (20, 20), (9, 61)])
def test_pictures_are_prepared_as_timm_does(crop_mode, interpolation, crop_pct, sides):
    picture = np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    timms = create_transform(
        (3, 24, 24), interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, mean=(0.5, 0.4, 0.3)
    )
    timms.transforms.pop()  # the normalisation
    resize = {"center": "shortest", "border": "longest", "squash": "squash"}[crop_mode]
    ours = decode_image(stream.getvalue(), PictureFormat(24, resize, interpolation, crop_pct, (128, 102, 76)))
    expected = (timms(Image.fromarray(picture)) * 255).round().numpy()
    assert np.abs(ours - expected).max() <= 4  # of 255, on noise: Pillow keeps the cropped box in single precision


def test_an_extremely_long_picture_costs_no_more_than_its_middle():
    data = encoded((1, 30_000))
    assert decode_image(data, PictureFormat(224, "shortest")).shape == (3, 224, 224)
    assert decode_image(data, PictureFormat(224, "longest")).shape == (3, 224, 224)


def test_transparent_parts_become_white():
    assert decode_image(encoded(mode="RGBA", colour=(0, 0, 0, 0)), PictureFormat(4)).min() == 255
    assert decode_image(encoded(mode="L", colour=7), PictureFormat(4)).max() == 7


def test_bad_pictures_are_refused_with_a_reason():
    good = encoded((64, 64), format="JPEG")
    bmp = encoded(format="BMP")
    cases = [
        (dict(data=good, max_bytes=10), "image too large"),
        (dict(data=good, max_pixels=64 * 64 - 1), "image too large"),
        (dict(data=bmp), "image format"),
        (dict(data=b""), "image format"),
        (dict(data=b"hello" * 100), "image format"),
        (dict(data=good[:50]), "image corrupt"),
        (dict(data=encoded((64, 64))[:60]), "image corrupt"),
    ]
    for arguments, reason in cases:
        with pytest.raises(BadImage) as error:
            decode_image(picture=PictureFormat(8), **arguments)
        assert error.value.reason == reason
        with pytest.raises(BadImage) as error:
            check_image(**arguments)
        assert error.value.reason == reason


def test_a_batch_marks_what_has_no_picture():
    pixels, has_image = decode_images([encoded(), None, b"junk"], PictureFormat(4, "squash"))
    assert has_image.tolist() == [True, False, False]
    assert pixels.shape == (3, 3, 4, 4)
    assert not pixels[1:].any()


def test_content_hashes_tell_missing_from_empty_and_parts_apart():
    hashes = {
        content_hash(*content)
        for content in [
            (None, None),
            ("", None),
            (None, b""),
            ("ab", b"c"),
            ("a", b"bc"),
            ("abc", None),
            (None, b"abc"),
        ]
    }
    assert len(hashes) == 7
    assert content_hash("a", b"b") == content_hash("a", b"b")
    assert len(content_hash("a", b"b")) == 32


def test_titles_are_cut_and_blank_ones_are_missing():
    assert clean_title("  a \n b ") == "a b"
    assert clean_title(" \t") is None
    assert clean_title(None) is None
    assert clean_title("abcdef", 3) == "abc"


def test_the_newest_behaviors_are_kept_and_padded_on_the_right():
    indices, mask = pad_behaviors([np.array([1, 2, 3, 4]), np.array([], int), np.array([9])], 3)
    assert indices.tolist() == [[2, 3, 4], [-1, -1, -1], [9, -1, -1]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    ragged = pad_ragged(np.array([1, 2, 3, 4, 9]), np.array([0, 4, 4, 5]), 3)
    assert (ragged[0] == indices).all()
    assert (ragged[1] == mask).all()
    assert pad_behaviors([], 3)[0].shape == (0, 3)


def test_padding_equals_a_loop():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, rng.integers(0, 9)) for _ in range(50)]
    indices, mask = pad_behaviors(rows, 5, fill=0)
    for row, index, real in zip(rows, indices, mask, strict=True):
        kept = row.tolist()[-5:]
        assert index.tolist() == kept + [0] * (5 - len(kept))
        assert real.tolist() == [True] * len(kept) + [False] * (5 - len(kept))


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped():
    grey = Image.fromarray(np.full((8, 8), 100 << 8, np.uint16))
    stream = io.BytesIO()
    grey.save(stream, "PNG")
    assert (decode_image(stream.getvalue(), PictureFormat(4, "squash")) == 100).all()


def test_a_jpeg_with_thousands_of_scans_is_refused_before_it_is_decoded():
    stream = io.BytesIO()
    Image.new("L", (64, 64), 9).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    scan = data[data.rfind(b"\xff\xda") : -2]
    decode_image(data[:-2] + scan * 10 + data[-2:], PictureFormat(4))
    with pytest.raises(BadImage, match="image corrupt"):
        decode_image(data[:-2] + scan * 1_000 + data[-2:], PictureFormat(4))
