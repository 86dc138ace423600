"""The picture of the demo: what the model drew before and after, beside what it should draw."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..media import save_png

_TILE, _GAP, _LEFT, _TOP, _CAPTION = 224, 14, 150, 96, 76  # pixels
_PAPER, _INK, _FAINT = (250, 249, 246), (38, 36, 46), (120, 116, 128)


def save_grid(
    path: Path, title: str, captions: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]
) -> None:
    """Write a PNG with one labelled row per entry of ``rows`` and one column per caption.

    Raises:
        ValueError: a row has another number of pictures than there are captions.
    """
    width = _LEFT + len(captions) * (_TILE + _GAP) + _GAP
    height = _TOP + _CAPTION + len(rows) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, middle, small = (ImageFont.load_default(size) for size in (30, 20, 16))
    draw.text((_GAP * 2, _TOP // 2), title, fill=_INK, font=large, anchor="lm")
    for column, caption in enumerate(captions):
        centre = _left(column) + _TILE // 2
        text = textwrap.fill(caption, width=28)
        bottom = _TOP + _CAPTION - 12
        draw.multiline_text(
            (centre, bottom), text, fill=_FAINT, font=small, anchor="md", align="center"
        )
    for row, (label, images) in enumerate(rows.items()):
        top = _TOP + _CAPTION + row * (_TILE + _GAP)
        name = textwrap.fill(label, width=12)
        place = (_LEFT - 18, top + _TILE // 2)
        draw.multiline_text(place, name, fill=_INK, font=middle, anchor="rm", align="right")
        for column, (image, _) in enumerate(zip(images, captions, strict=True)):
            tile = image.resize((_TILE, _TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (_left(column), top))
    save_png(path, sheet)


def _left(column: int) -> int:
    return _LEFT + column * (_TILE + _GAP)
