"""Says what is in a picture of drawn shapes by looking at its pixels alone.

Needs only NumPy and Pillow. The background is the commonest palette colour along the border, objects are the connected
regions that differ from it, and the shape of each is the one whose outline overlaps it most (soft intersection over
union). Each outline is drawn at the region's centroid with its area and its best rotation, then moved to where it fits
best. Nothing that overlaps too little is given a name.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

try:
    from scenes import PALETTE, ROTATION, SHAPES, Placement, contours, coverage
except ImportError:  # imported as part of a package
    from .scenes import PALETTE, ROTATION, SHAPES, Placement, contours, coverage

UNKNOWN = "unknown"
MIXED = "mixed"
#: A region that overlaps no outline at least this much has no shape.
LEAST_OVERLAP = 0.80
#: Steps by which an outline is moved toward its best place: x and y in pixels, size in shares, rotation in degrees.
STEPS = (np.array([0.5, 0.5, 0.05, 3.0]), np.array([0.25, 0.25, 0.025, 1.0]))
#: Regions smaller than this share of the picture are specks, not objects.
LEAST_AREA = 0.004
_NAMES = tuple(PALETTE)
_COLOURS = np.array([PALETTE[name] for name in _NAMES], dtype=np.float32)


@dataclass(frozen=True)
class Verdict:
    """What the pixels show; overlap is the worst object's match with its outline (0..1)."""

    background: str
    colour: str
    shape: str
    count: int
    overlap: float


def judge(image: Image.Image) -> Verdict:
    """Background, shape colour, shape and count of a square RGB picture of at least 24 pixels a side."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - _COLOURS, axis=3).argmin(axis=2)
    border = np.concatenate(
        [nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel(), nearest[:, -2:].ravel()]
    )
    background = int(np.bincount(border, minlength=len(_NAMES)).argmax())
    away = np.linalg.norm(pixels - _COLOURS[background], axis=2)
    seen = nearest[(nearest != background) & (away > 60)]
    if seen.size == 0:
        return Verdict(_NAMES[background], UNKNOWN, UNKNOWN, 0, 0.0)
    colour = int(np.bincount(seen, minlength=len(_NAMES)).argmax())
    # Coverage is measured between the two colours that are really there, not the palette's.
    ground = np.median(pixels[nearest == background], axis=0)
    paint = np.median(pixels[(nearest == colour) & (away > 60)], axis=0)
    alpha = np.clip(np.linalg.norm(pixels - ground, axis=2) / np.linalg.norm(paint - ground), 0.0, 1.0)
    found = [region for region in regions(alpha > 0.5) if region.sum() >= LEAST_AREA * region.size]
    if not found:
        return Verdict(_NAMES[background], _NAMES[colour], UNKNOWN, 0, 0.0)
    named = [name_shape(np.where(_grow(region), alpha, 0.0)) for region in found]
    names = Counter(name for name, _ in named)
    shape = next(iter(names)) if len(names) == 1 else MIXED
    return Verdict(_NAMES[background], _NAMES[colour], shape, len(found), min(overlap for _, overlap in named))


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions (eight neighbours) of a bool [H, W] mask, each a bool [H, W] mask."""
    waiting = mask.copy()
    found = []
    while waiting.any():
        row, column = divmod(int(waiting.argmax()), mask.shape[1])
        region = np.zeros_like(mask)
        stack = [(row, column)]
        waiting[row, column] = False
        while stack:
            row, column = stack.pop()
            region[row, column] = True
            top, left = max(row - 1, 0), max(column - 1, 0)
            for down, right in np.argwhere(waiting[top : row + 2, left : column + 2]):
                waiting[top + down, left + right] = False
                stack.append((top + int(down), left + int(right)))
        found.append(region)
    return found


def name_shape(alpha: np.ndarray) -> tuple[str, float]:
    """Name and overlap (0..1) of the one object whose pixel coverage is alpha, float [H, W] in 0..1."""
    area = float(alpha.sum())
    rows, columns = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + 0.5
    x, y = float((alpha * columns).sum() / area), float((alpha * rows).sum() / area)
    best, name = 0.0, UNKNOWN
    for shape in SHAPES:
        radius = math.sqrt(area / _unit_area(shape))
        tries = [Placement(x, y, radius, turn) for turn in _rotations(shape)]
        overlap = _refined(alpha, shape, max(tries, key=lambda place: _overlap(alpha, shape, place)))
        if overlap > best:
            best, name = overlap, shape
    return (name, best) if best >= LEAST_OVERLAP else (UNKNOWN, best)


def _refined(alpha: np.ndarray, shape: str, place: Placement) -> float:
    """Overlap of the best outline near `place`: one figure after the other is moved while that helps."""
    best = _overlap(alpha, shape, place)
    for step in STEPS:
        better = True
        while better:
            better = False
            for change in itertools.chain.from_iterable((delta, -delta) for delta in step * np.eye(4)):
                moved = _moved(place, change)
                if (overlap := _overlap(alpha, shape, moved)) > best + 1e-4:
                    best, place, better = overlap, moved, True
    return best


def _moved(place: Placement, change: np.ndarray) -> Placement:
    x, y, scale, turn = change
    return Placement(place.x + x, place.y + y, place.radius * (1 + scale), place.rotation + turn)


def _overlap(alpha: np.ndarray, shape: str, placement: Placement) -> float:
    """Soft intersection over union (0..1) of the coverage alpha, float [H, W], and a drawn outline."""
    outline = coverage(shape, (placement,), alpha.shape[0])
    return float(np.minimum(alpha, outline).sum() / np.maximum(alpha, outline).sum())


def _grow(region: np.ndarray) -> np.ndarray:
    """The region and the ring of neighbours that holds its anti-aliased edge; bool [H, W]."""
    padded = np.pad(region, 1)
    height, width = region.shape
    shifts = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return np.logical_or.reduce(shifts)


@cache
def _unit_area(shape: str) -> float:
    """Area of the unit shape (shoelace formula over its outlines)."""
    total = 0.0
    for points, fill in contours(shape):
        following = np.roll(points, -1, axis=0)
        size = abs((points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum()) / 2
        total += size if fill else -size
    return total


@cache
def _rotations(shape: str) -> tuple[float, ...]:
    """The rotations to try, in degrees; a little beyond those that are drawn."""
    limit = ROTATION[shape]
    return (0.0,) if limit == 0 else tuple(np.linspace(-limit - 3, limit + 3, 2 * int((limit + 3) / 5) + 3))
