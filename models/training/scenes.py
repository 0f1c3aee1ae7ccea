"""Procedural, captioned 64x64 scenes: the data both demo models are trained on.

A scene is one, two or three equal shapes of one colour on a plain background of another colour, with one caption.
Shapes are polygons drawn at four times the size and box-filtered down, so their edges are anti-aliased.

About a tenth of the (colour, shape, background) triples, chosen by a hash, never appear in training; the fidelity
script asks only for those, so it measures composition and not memory.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw

RESOLUTION = 64
SUPERSAMPLE = 4

#: Well separated colours (RGB, 0..255); shapes and backgrounds both come from this palette.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (40, 170, 60),
    "blue": (30, 80, 230),
    "yellow": (255, 225, 25),
    "orange": (255, 135, 0),
    "purple": (140, 40, 180),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
PLURALS = {shape: f"{shape}s" for shape in SHAPES} | {"cross": "crosses"}
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "plain": ("",), "large": ("large", "big")}

#: Largest rotation away from upright, in degrees; a circle and a ring have none to show.
ROTATION = {"circle": 0.0, "ring": 0.0, "square": 10.0, "triangle": 12.0, "star": 18.0, "cross": 10.0, "heart": 12.0}

#: Bounding radius in pixels of the 64-pixel scene, by (count, size).
RADII: dict[tuple[int, str], tuple[float, float]] = {
    (1, "small"): (11.0, 13.0),
    (1, "plain"): (16.0, 18.5),
    (1, "large"): (23.0, 26.0),
    (2, "small"): (10.5, 12.0),
    (2, "plain"): (13.5, 14.75),
    (3, "small"): (10.0, 11.0),
    (3, "plain"): (12.0, 13.0),
}
COUNT_PROBABILITIES = {1: 0.62, 2: 0.22, 3: 0.16}
EVERY_WORD = (
    *COLOURS, *SHAPES, *PLURALS.values(), *COUNT_WORDS.values(),
    "small", "little", "large", "big", "a", "an", "on", "background", "picture", "of", ",",
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """One object: centroid and bounding radius in pixels, rotation in degrees."""

    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and the words for it."""

    background: str
    colour: str
    shape: str
    size: str
    count: int
    placements: tuple[Placement, ...]
    caption: str


def held_out(colour: str, shape: str, background: str) -> bool:
    """Whether this triple is kept out of training (a fixed tenth, by hash)."""
    digest = hashlib.sha256(f"{colour}|{shape}|{background}".encode()).digest()
    return digest[0] % 10 == 0


def triples(kept_out: bool) -> list[tuple[str, str, str]]:
    """All (colour, shape, background) triples of one split, in a fixed order."""
    return [
        (colour, shape, background)
        for colour in COLOURS
        for shape in SHAPES
        for background in COLOURS
        if colour != background and held_out(colour, shape, background) == kept_out
    ]


@cache
def contours(shape: str) -> tuple[tuple[np.ndarray, int], ...]:
    """Outlines of a unit shape: (float64 [N, 2] points with y down, fill 1 or 0), painted in order.

    The centroid of the area is at the origin; no point is farther than 1 from it.
    """
    turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    unit_circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "circle":
        return ((0.86 * unit_circle, 1),)
    if shape == "ring":
        return ((0.95 * unit_circle, 1), (0.55 * unit_circle, 0))
    if shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float) * 0.69
    elif shape == "triangle":
        angles = np.deg2rad([-90, 30, 150])
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif shape == "star":
        angles = np.deg2rad(-90 + 36 * np.arange(10))
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    elif shape == "cross":
        arm, half = 0.945, 0.32
        corner = [(-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half)]
        points = np.array(
            [*corner, (half, arm), (-half, arm), (-half, half), (-arm, half), (-arm, -half), (-half, -half)]
        )
    elif shape == "heart":
        wave = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([16 * np.sin(turn) ** 3, -wave], axis=1)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    points = points - _centroid(points)
    return ((points / max(1.0, np.linalg.norm(points, axis=1).max()), 1),)


def _centroid(points: np.ndarray) -> np.ndarray:
    """Centroid of a polygon's area (shoelace formula); points float64 [N, 2]."""
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    return ((points + following) * cross[:, None]).sum(axis=0) / (3 * cross.sum())


def coverage(shape: str, placements: tuple[Placement, ...], resolution: int = RESOLUTION) -> np.ndarray:
    """Share of each pixel that the objects cover: float32 [resolution, resolution], 0..1."""
    side = resolution * SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    for placement in placements:
        angle = math.radians(placement.rotation)
        spin = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        for points, fill in contours(shape):
            moved = (points @ spin * placement.radius + (placement.x, placement.y)) * SUPERSAMPLE - 0.5
            pen.polygon([tuple(point) for point in moved], fill=255 * fill)
    return np.asarray(mask.reduce(SUPERSAMPLE), dtype=np.float32) / 255.0


def draw(scene: Scene, resolution: int = RESOLUTION) -> np.ndarray:
    """The picture of a scene: uint8 [resolution, resolution, 3]; placements are scaled from the 64-pixel scene."""
    scale = resolution / RESOLUTION
    placements = tuple(Placement(p.x * scale, p.y * scale, p.radius * scale, p.rotation) for p in scene.placements)
    alpha = coverage(scene.shape, placements, resolution)[:, :, None]
    background = np.array(PALETTE[scene.background], dtype=np.float32)
    colour = np.array(PALETTE[scene.colour], dtype=np.float32)
    return np.rint(background + alpha * (colour - background)).astype(np.uint8)


def _place(rng: np.random.Generator, shape: str, size: str, count: int) -> tuple[Placement, ...]:
    """Positions with jitter: inside the picture, never touching."""
    radius = rng.uniform(*RADII[count, size])
    centre = RESOLUTION / 2
    if count == 1:
        room = min(10.0, centre - radius - 2.0)
        spots = [(rng.uniform(-room, room), rng.uniform(-room, room))]
    else:
        # Two sit across a line through the middle, three on the corners of a triangle.
        reach = (
            rng.uniform(radius + 1.5, centre - radius - 1.0) if count == 2 else centre - radius - rng.uniform(1.0, 2.5)
        )
        start = rng.choice([0.0, 90.0]) if count == 2 else rng.choice([-90.0, 90.0])
        start += rng.uniform(-15, 15) if count == 2 else rng.uniform(-10, 10)
        angles = [math.radians(start + turn * 360 / count) for turn in range(count)]
        spots = [(reach * math.cos(angle), reach * math.sin(angle)) for angle in angles]
    limit = ROTATION[shape]
    return tuple(Placement(centre + x, centre + y, radius, rng.uniform(-limit, limit)) for x, y in spots)


def captions(colour: str, shape: str, background: str, size: str, count: int) -> list[str]:
    """All wordings for what is in a scene; the first is the canonical one."""
    wordings = []
    for word in SIZE_WORDS[size]:
        noun = shape if count == 1 else PLURALS[shape]
        phrase = f"{word} {colour} {noun}".strip()
        article = "an" if phrase[0] in "aeiou" else "a"
        counted = f"{article} {phrase}" if count == 1 else f"{COUNT_WORDS[count]} {phrase}"
        ground = "an" if background[0] in "aeiou" else "a"
        bare = phrase if count == 1 else counted
        wordings += [
            f"{counted} on {ground} {background} background",
            f"{bare}, {background} background",
            f"{COUNT_WORDS[count]} {phrase} on {background}",
            f"a picture of {counted} on {ground} {background} background",
        ]
    return wordings


def compose(rng: np.random.Generator, triple: tuple[str, str, str], count: int, size: str) -> Scene:
    """A scene of this triple, count and size with random positions and a random wording."""
    colour, shape, background = triple
    wordings = captions(colour, shape, background, size, count)
    weights = np.array([3.0, 2.0, 1.0, 1.0] * (len(wordings) // 4))
    caption = wordings[rng.choice(len(wordings), p=weights / weights.sum())]
    return Scene(background, colour, shape, size, count, _place(rng, shape, size, count), caption)


def sizes(count: int) -> tuple[str, ...]:
    """The sizes there are for this count."""
    return tuple(size for number, size in RADII if number == count)


@lru_cache(maxsize=2)
def _split(kept_out: bool) -> tuple[tuple[str, str, str], ...]:
    return tuple(triples(kept_out))


def sample(rng: np.random.Generator, kept_out: bool = False, count: int | None = None) -> Scene:
    """A random scene of the training split (or, with kept_out, of the held-out one)."""
    split = _split(kept_out)
    if count is None:
        count = int(rng.choice(list(COUNT_PROBABILITIES), p=list(COUNT_PROBABILITIES.values())))
    size = str(rng.choice(sizes(count)))
    return compose(rng, split[rng.integers(len(split))], count, size)
