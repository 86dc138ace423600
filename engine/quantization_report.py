"""What keeping a model in 8 bits costs and saves, layer by layer, in words and as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from .figures import new_figure, picture_of
from .memory import size_in_words
from .quantize import Quantized
from .quantized_loading import EightBit, QuantizedSource
from .quantized_stream import Squares, Stored

_BLOCK = re.compile(r"\.(\d+)\.")
_COLUMN = 46
_SMALL = 8  # points of text
# For up to 20 kinds of layers in one list of blocks.
_COLORS = [f"C{index}" for index in range(10)] + [
    "#aec7e8",
    "#ffbb78",
    "#98df8a",
    "#ff9896",
    "#c5b0d5",
    "#c49c94",
    "#f7b6d2",
    "#404040",
    "#dbdb8d",
    "#9edae5",
]


@dataclass(frozen=True)
class LayerReport:
    """One stored weight in 8 bits.

    Args:
        name: of the layer as the file calls it, without a prefix.
        num_bytes: of codes and scales.
        bytes_before: of the weight that was rounded; of bfloat16 if it was in 8 bits before.
        squares: None if the errors were not measured or cannot be known.
    """

    name: str
    way: EightBit
    num_bytes: int
    bytes_before: int
    squares: Squares | None

    @property
    def error(self) -> float | None:
        """Root of the mean squared error over that of the weight's square."""
        return None if self.squares is None else _relative(self.squares)

    @property
    def kind(self) -> str:
        """The name without the index of its block."""
        return _BLOCK.sub(".", self.name, count=1)


def report_of(source: QuantizedSource, stored: Stored) -> LayerReport:
    """What became of a weight, which must have got into 8 bits."""
    assert isinstance(stored.value, Quantized)
    way = source.eight_bit[stored.key]
    before = way.dtype.itemsize
    if source.layout.is_quantized(stored.key):
        before = torch.bfloat16.itemsize
    name = stored.key.removeprefix(source.model.prefix).removesuffix(".weight")
    num_bytes = stored.value.num_bytes
    return LayerReport(name, way, num_bytes, before * math.prod(way.shape), stored.squares)


def total_error(layers: Sequence[LayerReport]) -> float | None:
    """Of all weights that were rounded, together; None if nothing was measured."""
    squares = [layer.squares for layer in layers if layer.squares is not None]
    if not squares:
        return None
    sums = (math.fsum(each) for each in zip(*squares, strict=True))
    return _relative(Squares(*sums))


def summary(layers: Sequence[LayerReport]) -> str:
    """How many layers were rounded, what that saves, and how large the error is."""
    new = [layer for layer in layers if not layer.way.taken]
    if not new:
        return "no layer was rounded to 8 bits"
    after = sum(layer.num_bytes for layer in new)
    before = sum(layer.bytes_before for layer in new)
    error = total_error(new)
    measured = "" if error is None else f", relative error {error:.3%}"
    return (
        f"{len(new)} layers were rounded to 8 bits: {size_in_words(after)} instead of "
        f"{size_in_words(before)}, {1 - after / before:.0%} less{measured}"
    )


def table(layers: Sequence[LayerReport]) -> str:
    """A line for every layer."""
    lines = [f"{'layer':{_COLUMN}} {'stored as':22} {'MiB':>9} {'saved':>6} {'error':>8}"]
    for layer in layers:
        way = layer.way
        unit = f"block {way.block_size}" if way.mode == "block" else way.mode
        stored = f"{way.format} {unit}{' (as it was)' if way.taken else ''}"
        error = "" if layer.error is None else f"{layer.error:.3%}"
        lines.append(
            f"{layer.name:{_COLUMN}} {stored:22} {layer.num_bytes / 2**20:9.2f} "
            f"{1 - layer.num_bytes / layer.bytes_before:6.0%} {error:>8}"
        )
    return "\n".join(lines)


def error_plot(layers: Sequence[LayerReport], *, title: str) -> Image.Image:
    """Relative errors of the layers along the blocks, kind by kind, and the size of each kind.

    Raises:
        ValueError: no errors were measured.
    """
    measured = [layer for layer in layers if layer.squares is not None]
    if not measured:
        raise ValueError("no errors to plot")
    kinds: dict[str, list[LayerReport]] = {}
    for layer in measured:
        kinds.setdefault(layer.kind, []).append(layer)
    lists: dict[str, dict[str, list[LayerReport]]] = {}
    for kind, members in kinds.items():
        lists.setdefault(kind.partition(".")[0], {})[kind] = members
    figure = new_figure(11, 3.4 * len(lists) + 0.8, dpi=100)
    errors = [100 * (layer.error or 0.0) for layer in measured]
    rows = figure.subplots(len(lists), 2, squeeze=False, width_ratios=(2.2, 1))
    for (name, members), (curves, shares) in zip(lists.items(), rows, strict=True):
        _draw_errors(curves, members, max(errors), name)
        _draw_shares(shares, members)
    figure.suptitle(title)
    return picture_of(figure)


def _draw_errors(
    axes: Any, kinds: Mapping[str, Sequence[LayerReport]], highest: float, name: str
) -> None:
    for color, layers in zip(cycle(_COLORS), kinds.values(), strict=False):
        blocks = [_block(layer.name) for layer in layers]
        errors = [100 * (layer.error or 0.0) for layer in layers]
        axes.plot(blocks, errors, color=color, marker="o", markersize=3, linewidth=1.2)
    axes.set_ylim(0, 1.1 * highest or 1)
    axes.set_ylabel("relative error of the weight in %", fontsize=_SMALL)
    axes.set_xlabel(f"index in {name}", fontsize=_SMALL)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=_SMALL)


def _draw_shares(axes: Any, kinds: Mapping[str, Sequence[LayerReport]]) -> None:
    """Bars: the bytes of each kind, with the name that the colour of the curves stands for."""
    places = np.arange(len(kinds))
    sizes = [sum(layer.num_bytes for layer in layers) / 2**20 for layers in kinds.values()]
    axes.barh(places, sizes, color=list(islice(cycle(_COLORS), len(kinds))))
    axes.set_yticks(places, [kind.partition(".")[2] or kind for kind in kinds], fontsize=_SMALL)
    axes.invert_yaxis()
    axes.set_xlabel("MiB in 8 bits", fontsize=_SMALL)
    axes.tick_params(axis="x", labelsize=_SMALL)


def _block(name: str) -> int:
    match = _BLOCK.search(name)
    return int(match[1]) if match else 0


def _relative(squares: Squares) -> float:
    return math.sqrt(squares.error / squares.weight) if squares.weight else 0.0
