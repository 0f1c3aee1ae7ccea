"""Stored bytes: deterministic, lossless where promised, readable by the field's tools, with a thumbnail when large."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
from PIL import Image

from shared.specs import RenderSpec
from shared.specs.stable_diffusion import Spec
from worker.backends.fake import draw
from worker.encode import Encoded, encode


def spec(**fields: object) -> RenderSpec:
    return Spec.model_validate(
        {"prompt": "a red circle", "negative_prompt": "blue", "seed": 7, "num_inference_steps": 20, **fields}
    )


def encoded(image: Image.Image, **fields: object) -> Encoded:
    return encode(image, spec(**fields), model="demo", revision="r1")


def test_png_keeps_every_pixel_and_says_how_it_was_made() -> None:
    image = draw(1, 64, 48)
    file = encoded(image)
    read = Image.open(io.BytesIO(file.data))
    assert (read.format, read.tobytes()) == ("PNG", image.tobytes())
    first, negative, facts = read.text["parameters"].split("\n")
    assert (first, negative) == ("a red circle", "Negative prompt: blue")
    assert dict(part.split(": ") for part in facts.split(", ")) == {
        "Steps": "20",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "64x48",
        "Model": "demo",
    }
    own = json.loads(read.text["imagefarm"])
    assert (own["model"], own["revision"], own["num_inference_steps"]) == ("demo", "r1", 20)


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_equal_pictures_and_parameters_give_equal_bytes(output_format: str) -> None:
    one, two = (encoded(draw(1, 64, 64), output_format=output_format) for _ in range(2))
    assert one == two
    assert one.sha256 == hashlib.sha256(one.data).digest()
    assert encoded(draw(1, 64, 64), output_format=output_format, seed=8).sha256 != one.sha256


@pytest.mark.parametrize(("output_format", "kind"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_lossy_formats_stay_close_and_carry_the_parameters_in_exif(output_format: str, kind: str) -> None:
    image = draw(3, 64, 64)
    file = encoded(image, output_format=output_format, prompt="ein roter Kreis 🔴")
    read = Image.open(io.BytesIO(file.data))
    assert read.format == kind
    assert file.content_type == f"image/{output_format}"
    difference = max(
        abs(a - b) for a, b in zip(image.convert("RGB").tobytes(), read.convert("RGB").tobytes(), strict=True)
    )
    assert difference < 40
    comment = read.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be").startswith("ein roter Kreis 🔴\nNegative prompt: blue\n")


def test_metadata_can_be_left_out() -> None:
    for output_format in ("png", "webp", "jpeg"):
        file = encoded(draw(1, 64, 64), output_format=output_format, output_metadata="none", prompt="secret")
        assert b"secret" not in file.data
        assert "secret".encode("utf-16-be") not in file.data


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_every_mode_an_engine_gives_can_be_stored(mode: str, output_format: str) -> None:
    file = encoded(draw(1, 32, 32).convert(mode), output_format=output_format)
    assert Image.open(io.BytesIO(file.data)).size == (32, 32)


def test_large_pictures_get_a_thumbnail_and_small_ones_need_none() -> None:
    assert encoded(draw(1, 256, 256)).thumbnail is None
    small = encoded(draw(1, 1024, 512)).thumbnail
    assert small is not None
    assert Image.open(io.BytesIO(small)).size == (256, 128)
