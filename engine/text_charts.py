"""Charts as text, for a terminal; in ASCII, which every one of them can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_NARROWEST_BAR = 10
_GAP = "  "


class Row(NamedTuple):
    """A line of a chart: what stands in its columns, and the length of its bar."""

    cells: tuple[str, ...]
    value: float


def bar_chart(headings: Sequence[str], rows: Sequence[Row], *, width: int) -> str:
    """A table with a bar behind each row; the longest one ends at ``width`` characters.

    A value above 0 that is too small for a "#" gets a ".". Values are not negative.
    """
    columns = list(zip(headings, *(row.cells for row in rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    room = max(_NARROWEST_BAR, width - sum(widths) - len(_GAP) * len(widths))
    largest = max((row.value for row in rows), default=0.0)

    def line(cells: Sequence[str], bar: str) -> str:
        padded = [cell.rjust(size) for cell, size in zip(cells, widths, strict=True)]
        return _GAP.join([*padded, bar]).rstrip()

    lines = [line(headings, "")]
    lines += [line(row.cells, _bar(row.value, largest, room)) for row in rows]
    return "\n".join(lines)


def _bar(value: float, largest: float, room: int) -> str:
    length = round(value / largest * room) if largest else 0
    return "#" * length or ("." if value else "")
