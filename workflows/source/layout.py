"""Places on the canvas: rows of coloured areas, each with columns of nodes and notes.

Sizes are those that ComfyUI's frontend gives a node: a line of 20 pixels per socket and 24 per
widget. Folded advanced widgets take their lines as well. A node's title lies above its box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .graph import Handle, Node
from .node_types import Input, NodeType

TITLE = 30
_SLOT, _WIDGET, _FRAME = 20, 24, 20
_TEXT_WIDGET = 110  # lets four lines be seen without scrolling
_ADDED_WIDGETS = {"PreviewAny": 110}  # by the frontend, so not in the schema
_WIDTH = 300
_GAP = 60  # between nodes of a column, besides their titles; newer designs draw nodes larger
_COLUMN_GAP, _AREA_GAP = 40, 40
_PADDING, _HEAD = 20, 50  # of an area; its own title is in the head
_NOTE_LINE, _NOTE_FRAME, _CHARACTER = 16, 30, 6.0

# The frontend's own group colours, for what a user does.
PREPARE, TRAIN, LOOK, DRAW = "#3f789e", "#b58b2a", "#8A8", "#88A"


class Box(NamedTuple):
    """A rectangle, in pixels at a scale of 1; y goes down."""

    x: int
    y: int
    width: int
    height: int

    def overlaps(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def encloses(self, other: Box) -> bool:
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )

    @property
    def with_title(self) -> Box:
        return Box(self.x, self.y - TITLE, self.width, self.height + TITLE)


@dataclass(frozen=True)
class Note:
    """Markdown on the canvas; ``height`` fits the text."""

    title: str
    text: str
    width: int = 380

    @property
    def height(self) -> int:
        letters = (self.width - _NOTE_FRAME) / _CHARACTER
        lines = [max(1, math.ceil(len(line) / letters)) for line in self.text.splitlines()]
        return _round_up(_NOTE_FRAME + _NOTE_LINE * sum(lines))


@dataclass(frozen=True)
class Sized:
    """A node that is larger than its widgets need: ``extra`` pixels for pictures below them."""

    handle: Handle
    width: int = _WIDTH
    extra: int = 0


Item = Handle | Sized | Note


@dataclass(frozen=True)
class Area:
    title: str
    colour: str
    columns: Sequence[Sequence[Item]]


class Layout(NamedTuple):
    """Where everything is: nodes by number, notes, and areas."""

    nodes: dict[int, Box]
    notes: list[tuple[Note, Box]]
    areas: list[tuple[Area, Box]]


def arrange(rows: Sequence[Sequence[Area]], graph: Mapping[int, Node]) -> Layout:
    """Areas of a row side by side and equally high, rows below each other."""
    layout = Layout({}, [], [])
    top = 0
    for row in rows:
        left = 0
        boxes: list[Box] = []
        for area in row:
            boxes.append(_arrange_area(area, Box(left, top, 0, 0), graph, layout))
            left += boxes[-1].width + _AREA_GAP
        height = max(box.height for box in boxes)
        layout.areas.extend(
            (area, box._replace(height=height)) for area, box in zip(row, boxes, strict=True)
        )
        top += height + _AREA_GAP
    return layout


def _arrange_area(area: Area, corner: Box, graph: Mapping[int, Node], layout: Layout) -> Box:
    left, bottom = corner.x + _PADDING, corner.y
    for column in area.columns:
        top, column_width = corner.y + _HEAD, 0
        for item in column:
            width, height = _size(item, graph)
            box = Box(left, top + TITLE, width, height)
            if isinstance(item, Note):
                layout.notes.append((item, box))
            else:
                layout.nodes[_handle(item).number] = box
            top, column_width = box.y + height + _GAP, max(column_width, width)
        left, bottom = left + column_width + _COLUMN_GAP, max(bottom, top - _GAP)
    width = left - _COLUMN_GAP + _PADDING - corner.x
    return Box(corner.x, corner.y, width, bottom + _PADDING - corner.y)


def _size(item: Item, graph: Mapping[int, Node]) -> tuple[int, int]:
    if isinstance(item, Note):
        return item.width, item.height
    handle = _handle(item)
    extra = item.extra if isinstance(item, Sized) else 0
    width = item.width if isinstance(item, Sized) else _WIDTH
    return width, _round_up(node_height(handle.type, graph[handle.number]) + extra)


def node_height(kind: NodeType, node: Node) -> int:
    """What the sockets and widgets of a node need."""
    inputs = kind.inputs(node.inputs)
    sockets = sum(not one.is_widget for one in inputs)
    lines = max(sockets, len(kind.outputs), 1)
    widgets = sum(_widget_height(one) for one in inputs if one.is_widget)
    return lines * _SLOT + widgets + _FRAME + _ADDED_WIDGETS.get(kind.name, 0)


def _widget_height(one: Input) -> int:
    if one.options.get("multiline"):
        return _TEXT_WIDGET
    return _WIDGET * (2 if one.has_control else 1)


def _handle(item: Handle | Sized) -> Handle:
    return item.handle if isinstance(item, Sized) else item


def _round_up(size: float) -> int:
    return math.ceil(size / 10) * 10
