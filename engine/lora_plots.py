"""Pictures of LoRA files: what each checkpoint counts in a mean, what each layer adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .figures import new_figure, picture_of
from .lora_statistics import LayerStatistics, grouped, total

_LIGHT, _DARK, _ABSENT = "#9db4d3", "#1f4e8c", "#ececec"
_MOST_NAMES = 30  # of checkpoints that fit below their bars
_MOST_BINS = 48
_ROW_INCHES = 0.24
_SMALL = 8  # points of text


def checkpoint_weights(
    weights: Sequence[float], labels: Sequence[str], *, title: str, axis: str
) -> Image.Image:
    """The part of the mean that each checkpoint has, from the oldest to the newest.

    Args:
        axis: what the labels are.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    places = np.arange(len(weights))
    axes.bar(places, [100 * weight for weight in weights], color=_DARK, width=0.8)
    axes.set_ylabel("part of the mean in %")
    axes.set_title(title)
    shown = places[:: -(-len(weights) // _MOST_NAMES)]
    names = [labels[place] for place in shown]
    long = max(map(len, names)) > 5
    axes.set_xticks(
        shown,
        [name if len(name) <= 24 else f"...{name[-21:]}" for name in names],
        rotation=45 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor",
        fontsize=_SMALL,
    )
    axes.set_xlabel(axis)
    axes.grid(alpha=0.25, axis="y")
    return picture_of(figure, grid=False)


def layer_map(layers: Sequence[LayerStatistics], *, title: str, relative: bool) -> Image.Image:
    """What every layer adds: by block as bars, by block and kind as a map; effective ranks below.

    Args:
        layers: kinds stand from top to bottom in the order of their first layers.
        relative: norms are parts of those of the weights; only layers whose weight is known count.

    Raises:
        ValueError: there are no layers.
    """
    if not layers:
        raise ValueError("no layers to plot")
    lists = grouped(layers, lambda layer: layer.place.blocks)
    kinds = {name: list(grouped(each, lambda x: x.place.kind)) for name, each in lists.items()}
    ranks = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
    map_inches = _ROW_INCHES * max(4, *map(len, kinds.values()))
    heights = [1.4, map_inches] + ([1.4] if ranks else [])
    figure = new_figure(11, 1.1 + sum(heights) + 0.35 * len(heights))
    grid = figure.add_gridspec(
        len(heights), len(lists), height_ratios=heights, width_ratios=_widths(lists)
    )
    highest = max(filter(np.isfinite, (_value(layer, relative) for layer in layers)), default=0)
    bars: Any = None
    image: Any = None
    for column, (name, members) in enumerate(lists.items()):
        bars = figure.add_subplot(grid[0, column], sharey=bars)
        blocks = _bars(bars, members, relative)
        bars.set_title(name or "outside of blocks", fontsize=_SMALL + 1)
        axes = figure.add_subplot(grid[1, column])
        image = _map(axes, members, kinds[name], blocks, relative)
        image.set_clim(0, highest or 1)
        if column == 0:
            bars.set_ylabel(_label(relative), fontsize=_SMALL)
        else:
            bars.tick_params(labelleft=False)
    figure.suptitle(title)
    scale = figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=40, pad=0.01)
    scale.set_label(_label(relative), fontsize=_SMALL)
    scale.ax.tick_params(labelsize=_SMALL)
    if ranks:
        _histogram(figure.add_subplot(grid[2, :]), ranks)
    return picture_of(figure, grid=False)


def _widths(lists: dict[str, list[LayerStatistics]]) -> list[int]:
    numbers = [len({layer.place.number for layer in members}) for members in lists.values()]
    # A list of one block would be too narrow for its name.
    return [max(number, sum(numbers) // 10) for number in numbers]


def _bars(axes: Any, layers: Sequence[LayerStatistics], relative: bool) -> list[int]:
    blocks = grouped(sorted(layers, key=lambda x: x.place.number), lambda x: str(x.place.number))
    totals = [total(members) for members in blocks.values()]
    heights = [(each.relative_norm if relative else each.norm) or 0.0 for each in totals]
    axes.bar(range(len(blocks)), heights, color=_DARK, width=0.8)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_xticks([])
    axes.tick_params(labelsize=_SMALL)
    axes.grid(alpha=0.25, axis="y")
    return [int(block) for block in blocks]


def _map(
    axes: Any,
    layers: Sequence[LayerStatistics],
    kinds: Sequence[str],
    blocks: Sequence[int],
    relative: bool,
) -> Any:
    values = np.full((len(kinds), len(blocks)), np.nan)
    for layer in layers:
        row, column = kinds.index(layer.place.kind), blocks.index(layer.place.number)
        values[row, column] = _value(layer, relative)
    axes.set_facecolor(_ABSENT)
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=_SMALL)
    places = range(0, len(blocks), 5 if len(blocks) > 12 else 1)
    if blocks != [-1]:
        axes.set_xticks(places, [str(blocks[place]) for place in places], fontsize=_SMALL)
        axes.set_xlabel("block", fontsize=_SMALL)
    else:
        axes.set_xticks([])
    return image


def _histogram(axes: Any, ranks: Sequence[float]) -> None:
    most = max(1.0, *ranks)
    edges = np.linspace(0, most, min(_MOST_BINS, 4 * int(np.ceil(most))) + 1)
    axes.hist(ranks, bins=edges, color=_LIGHT, edgecolor="white", linewidth=0.5)
    median = float(np.median(ranks))
    axes.axvline(median, color=_DARK, linewidth=2, label=f"half of all are below {median:.3g}")
    axes.set_xlabel("effective rank (participation ratio of the singular values)", fontsize=_SMALL)
    axes.set_ylabel("layers", fontsize=_SMALL)
    axes.set_xlim(0, most)
    axes.tick_params(labelsize=_SMALL)
    axes.legend(frameon=False, fontsize=_SMALL)
    axes.grid(alpha=0.25)


def _value(layer: LayerStatistics, relative: bool) -> float:
    value = layer.relative_norm if relative else layer.norm
    return np.nan if value is None else value


def _label(relative: bool) -> str:
    return "change / weight (norms)" if relative else "norm of the change"
