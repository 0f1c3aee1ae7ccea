"""The contact sheet: every picture is where it belongs, enlarged, whatever the captions are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from imagefarm.contact_sheet import Picture, Section, contact_sheet, save


def picture(color: tuple[int, int, int], size: tuple[int, int] = (64, 64), caption: str = "a caption") -> Picture:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return Picture(buffer.getvalue(), caption)


def area(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    """Pixels of exactly this color."""
    return sum(count for count, found in sheet.getcolors(sheet.width * sheet.height) if found == color)


def test_every_picture_is_there_enlarged_and_none_overlaps() -> None:
    colors = [(200, 10 * n, 30) for n in range(20)]
    sheet = contact_sheet("Demo", [Section("a", "note", [picture(color) for color in colors])])
    for color in colors:
        assert area(sheet, color) == 192 * 192


def test_sections_stand_below_each_other() -> None:
    first, second = (200, 0, 0), (0, 200, 0)
    one = contact_sheet("Demo", [Section("a", "n", [picture(first)])])
    both = contact_sheet("Demo", [Section("a", "n", [picture(first)]), Section("b", "n", [picture(second, (32, 32))])])
    assert both.height > one.height
    assert area(both, first) == area(both, second) == 192 * 192


def test_pictures_that_are_not_square_keep_their_shape() -> None:
    sheet = contact_sheet(
        "Demo", [Section("a", "n", [picture((200, 0, 0), (100, 50)), picture((0, 0, 200), (400, 800))])]
    )
    assert area(sheet, (200, 0, 0)) == 192 * 96
    assert area(sheet, (0, 0, 200)) == 96 * 192


def test_columns_follow_the_number_of_pictures() -> None:
    three = contact_sheet("D", [Section("a", "", [picture((9, 9, 9))] * 3)])
    seven = contact_sheet("D", [Section("a", "", [picture((9, 9, 9))] * 9)])
    assert three.width < seven.width
    assert seven.height > three.height


@pytest.mark.parametrize("caption", ["", "word " * 200, "w" * 500, "großer Stern ★ 星 🎨", "two\nlines\tand\x07more"])
def test_odd_captions_do_not_break_the_layout(caption: str) -> None:
    plain = contact_sheet("D", [Section("a", "", [picture((200, 0, 0))])])
    odd = contact_sheet("D", [Section("a", "", [picture((200, 0, 0), caption=caption)])])
    assert odd.width == plain.width
    assert abs(odd.height - plain.height) < 60
    assert area(odd, (200, 0, 0)) == 192 * 192


def test_empty_sections_and_grayscale_pictures(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("LA", (8, 8), (128, 0)).save(buffer, "PNG")
    sheet = contact_sheet(
        "D", [Section("none", "0 images", []), Section("gray", "", [Picture(buffer.getvalue(), "x")])]
    )
    save(sheet, tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as saved:
        assert saved.size == sheet.size
