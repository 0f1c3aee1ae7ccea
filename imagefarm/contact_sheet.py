"""Lays pictures out on one sheet, with their captions."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_PAPER, _CARD, _INK, _QUIET = "#14171c", "#1e232b", "#eef1f5", "#8d97a5"
_MARGIN = 40
_GAP = 16
_PAD = 10
_CAPTION_LINES = 3
_CAPTION_SIZE, _HEADING_SIZE, _NOTE_SIZE, _TITLE_SIZE = 15, 26, 16, 36
_LINE = 19
#: height of a section's heading and note
_HEAD = _HEADING_SIZE + _NOTE_SIZE + 34


@dataclass(frozen=True)
class Picture:
    """An encoded picture and what is written under it."""

    data: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """The pictures of one model under a heading."""

    heading: str
    note: str
    pictures: Sequence[Picture]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def contact_sheet(title: str, sections: Sequence[Section], *, columns: int = 7, side: int = 192) -> Image.Image:
    """One image with all sections. Each picture fills a square of `side` pixels; small ones are enlarged.

    Image.save writes it: `contact_sheet("Demo", [section]).save("sheet.png")`.
    """
    title_font = _font(_TITLE_SIZE)
    columns = max(1, min(columns, max((len(section.pictures) for section in sections), default=1)))
    width = columns * (side + 2 * _PAD + _GAP) - _GAP
    width = 2 * _MARGIN + max(width, math.ceil(title_font.getlength(title)))
    blocks = [_Block(section, columns, side) for section in sections]
    top = _MARGIN + _TITLE_SIZE + 28
    sheet = Image.new("RGB", (width, top + sum(block.height for block in blocks) + _MARGIN // 2), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=title_font)
    for block in blocks:
        block.draw(sheet, pen, top)
        top += block.height
    return sheet


class _Block:
    """A section with its place on the sheet worked out: cards are as high as its longest caption needs."""

    def __init__(self, section: Section, columns: int, side: int) -> None:
        self._section = section
        self._columns = columns
        self._side = side
        self._font = _font(_CAPTION_SIZE)
        self._captions = [list(_wrap(picture.caption, side, self._font)) for picture in section.pictures]
        lines = max(map(len, self._captions), default=0)
        self._card = (side + 2 * _PAD, side + 2 * _PAD + lines * _LINE + (_PAD // 2 if lines else 0))
        rows = math.ceil(len(section.pictures) / columns)
        self.height = _HEAD + rows * (self._card[1] + _GAP) + _GAP

    def draw(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        pen.text((_MARGIN, top), self._section.heading, fill=_INK, font=_font(_HEADING_SIZE))
        pen.text((_MARGIN, top + _HEADING_SIZE + 12), self._section.note, fill=_QUIET, font=_font(_NOTE_SIZE))
        for number, (picture, caption) in enumerate(zip(self._section.pictures, self._captions, strict=True)):
            row, column = divmod(number, self._columns)
            x = _MARGIN + column * (self._card[0] + _GAP)
            y = top + _HEAD + row * (self._card[1] + _GAP)
            box = (x, y, x + self._card[0] - 1, y + self._card[1] - 1)
            pen.rounded_rectangle(box, radius=8, fill=_CARD)
            fitted = _fit(picture.data, self._side)
            sheet.paste(fitted, (x + (self._card[0] - fitted.width) // 2, y + _PAD + (self._side - fitted.height) // 2))
            for at, line in enumerate(caption):
                below = y + self._side + 2 * _PAD + at * _LINE - 3
                pen.text((x + _PAD, below), line, fill=_QUIET, font=self._font)


def _fit(data: bytes, side: int) -> Image.Image:
    """The picture with its longer edge `side` pixels long."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Iterator[str]:
    """The caption in at most three lines, with an ellipsis where it is longer."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _CAPTION_LINES:
        lines = [*lines[: _CAPTION_LINES - 1], f"{lines[_CAPTION_LINES - 1]} …"]
    for line in filter(None, lines):
        while font.getlength(line) > width:
            line = line.removesuffix("…")[:-1] + "…"
        yield line


def save(sheet: Image.Image, path: Path) -> None:
    """Write the sheet as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
