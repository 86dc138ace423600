"""One picture that shows what is in a dataset: thumbnails with name, size and caption."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .manifest import Sample
from .media import load_image

_TILE, _GAP, _TEXT = 232, 12, 58  # pixels; _TEXT is the height of the lines below a thumbnail
_PAPER, _INK, _FAINT = (250, 249, 246), (38, 36, 46), (120, 116, 128)
_LETTERS, _MAX_COLUMNS = 36, 6


def contact_sheet(samples: Sequence[Sample], *, limit: int = 24) -> Image.Image:
    """Up to ``limit`` samples, evenly spread, in a grid that is about as wide as high.

    Raises:
        DataError: an image cannot be read.
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples to show")
    count = min(limit, len(samples))
    shown = [samples[index * len(samples) // count] for index in range(count)]
    columns = min(_MAX_COLUMNS, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    width, height = _TILE + _GAP, _TILE + _TEXT + _GAP
    sheet = Image.new("RGB", (_GAP + columns * width, _GAP + rows * height), _PAPER)
    for index, sample in enumerate(shown):
        row, column = divmod(index, columns)
        _paste(sheet, sample, _GAP + column * width, _GAP + row * height)
    return sheet


def _paste(sheet: Image.Image, sample: Sample, left: int, top: int) -> None:
    picture = ImageOps.contain(load_image(sample.image), (_TILE, _TILE), Image.Resampling.BICUBIC)
    inset = ((_TILE - picture.width) // 2, _TILE - picture.height)
    sheet.paste(picture, (left + inset[0], top + inset[1]))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    name = textwrap.shorten(sample.image.name, 24, placeholder="...")
    heading = f"{name}  {sample.size[0]}x{sample.size[1]}"
    draw.text((left, top + _TILE + 4), heading, fill=_INK, font=font)
    lines = textwrap.wrap(sample.caption, _LETTERS, max_lines=2, placeholder=" ...")
    draw.multiline_text((left, top + _TILE + 20), "\n".join(lines), fill=_FAINT, font=font)
