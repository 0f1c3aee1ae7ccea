"""`imagefarm demo` as a newcomer runs it: a whole farm, and pictures that show what the prompts ask for."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.training.judge import judge
from models.training.scenes import PALETTE, SHAPES
from shared.settings import PROJECT_ROOT

pytestmark = pytest.mark.timeout(300)

GAN_CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
PROMPTS = [
    row["prompt"] for row in csv.DictReader((PROJECT_ROOT / "examples" / "prompts.csv").read_text("utf-8").splitlines())
]


@dataclass(frozen=True)
class Seen:
    """A picture of the demo, and the prompt that it carries."""

    prompt: str
    image: Image.Image


@dataclass(frozen=True)
class Demo:
    """What one run of the demo left behind."""

    text: str
    sheet: Path
    pictures: dict[str, Seen]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once, in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "imagefarm", "demo"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pictures = {}
    for path in folder.glob("imagefarm-demo/images/*/*.png"):
        with Image.open(path) as image:
            prompt = json.loads(image.text["imagefarm"])["prompt"]
            pictures[prompt] = Seen(prompt, image.convert("RGB"))
    return Demo(done.stdout, folder / "imagefarm-demo" / "contact-sheet.png", pictures)


def asked(prompt: str) -> tuple[str, str, str, int]:
    """Background, colour, shape and count that a prompt of the demo names."""
    words = re.findall(r"\w+", prompt.removeprefix("a picture of "))
    colours = [word for word in words if word in PALETTE]
    shape = next(name for name in SHAPES for word in words if word.startswith(name))
    return colours[1], colours[0], shape, COUNTS[words[0]]


def test_the_demo_ends_with_a_sheet_of_all_pictures(demo: Demo) -> None:
    assert len(PROMPTS) >= 24
    assert set(demo.pictures) >= set(PROMPTS)
    assert len(demo.pictures) == len(PROMPTS) + len(SHAPES)
    assert demo.text.strip().endswith("contact-sheet.png")
    with Image.open(demo.sheet) as sheet:
        assert min(sheet.size) > 800
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 100


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_picture_shows_what_its_prompt_asks_for(demo: Demo, prompt: str) -> None:
    background, colour, shape, count = asked(prompt)
    verdict = judge(demo.pictures[prompt].image)
    assert (verdict.background, verdict.colour, verdict.count) == (background, colour, count)
    if shape != "star":
        assert verdict.shape == shape
    else:
        # small points come out rounder than the judge's outline; another shape they are never taken for
        assert verdict.shape in {"star", "unknown", "mixed"}


@pytest.mark.parametrize(("index", "shape"), list(enumerate(GAN_CLASSES)))
def test_the_gan_draws_the_class_that_is_asked_for(demo: Demo, index: int, shape: str) -> None:
    image = demo.pictures[f"class {index}: {shape}"].image
    assert image.size == (32, 32)
    assert judge(in_two_colours(image)).shape == shape


def in_two_colours(image: Image.Image) -> Image.Image:
    """The object in white on black: the GAN's colours are free, the judge knows those of the palette."""
    pixels = np.asarray(image, np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=2)
    grey = (distance / distance.max() * 255).astype(np.uint8)
    return Image.fromarray(grey).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")
