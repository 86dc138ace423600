"""Tables and pictures of what happened to the layers of a LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .. import adapter_ranks
from ..adapter_weights import AdapterWeights, FullWeights
from ..figures import new_figure, picture_of

_BLOCK = re.compile(r"(?<=[._])\d+(?=[._])")
_MOST_SPANS = 3
_RANK, _BEFORE, _ERROR = "#1f4e8c", "#9db4d3", "#b05a2c"


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Args:
        before: its rank; None where there was none.
        rank: None if it is no product of factors now.
        squared_norm: of what it adds to the weight.
        squared_error: of what is written, rounded as it is.
    """

    name: str
    before: int | None
    rank: int | None
    squared_norm: float
    squared_error: float

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def compared(name: str, exact: AdapterWeights, stored: AdapterWeights) -> LayerResult:
    """What a layer was and what is written of it."""
    return LayerResult(
        name,
        before=None if isinstance(exact, FullWeights) else exact.rank,
        rank=None if isinstance(stored, FullWeights) else stored.rank,
        squared_norm=adapter_ranks.squared_change(exact),
        squared_error=adapter_ranks.squared_difference(exact, stored),
    )


def total_error(results: Iterable[LayerResult]) -> float:
    """Norm of all errors together, as a part of that of all changes."""
    results = list(results)
    norm = sum(result.squared_norm for result in results)
    return math.sqrt(sum(result.squared_error for result in results) / norm) if norm else 0.0


def table(results: Sequence[LayerResult]) -> str:
    """A line for each kind of layer, its blocks together, and one for all."""
    groups: dict[str, list[LayerResult]] = {}
    for result in sorted(results, key=_model_order):
        groups.setdefault(_BLOCK.sub("{}", result.name, count=1), []).append(result)
    with_before = any(result.before for result in results)
    blocks = [(_folded(kind, group), group) for kind, group in groups.items()]
    blocks += [("all", list(results))] if len(groups) > 1 else []
    lines: list[tuple[str, ...]] = [
        ("layers", "number", *(("rank before",) if with_before else ()), "rank", "error")
    ]
    for kind, group in blocks:
        before = (_span(result.before for result in group),) if with_before else ()
        error = percent(total_error(group))
        lines.append((kind, str(len(group)), *before, _span(r.rank for r in group), error))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def in_words(results: Sequence[LayerResult]) -> str:
    """The error in all, and the layer with the largest one; results must not be empty."""
    error = total_error(results)
    worst = max(results, key=lambda result: result.relative_error)
    return (
        f"error in all: {percent(error)} ({percent(1 - error**2)} of the squared norm are kept)\n"
        f"largest error of a layer: {percent(worst.relative_error)}, {worst.name}"
    )


def percent(part: float) -> str:
    """Three digits of a part of the whole; 0 where less than a millionth is left."""
    return "0 %" if part < 1e-6 else f"{100 * part:.3g} %"


def size(num_bytes: int) -> str:
    """A file size for people."""
    return (
        f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"
    )


def rank_chart(results: Sequence[LayerResult], *, name: str) -> Image.Image:
    """The rank of every layer of the file ``name``, before and after, and its error below."""
    results = sorted(results, key=_model_order)
    figure = new_figure()
    ranks, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    edges = np.arange(len(results) + 1) + 0.5
    if any(result.before for result in results):
        before = [result.before or 0 for result in results]
        ranks.stairs(before, edges, color=_BEFORE, fill=True, label="before")
    ranks.stairs([r.rank or 0 for r in results], edges, color=_RANK, fill=True, label="now")
    ranks.set_ylabel("rank")
    highest = max(max(result.before or 0, result.rank or 0) for result in results)
    ranks.set_ylim(0, 1.2 * highest or 1)  # leaves room for the legend
    ranks.set_title(f"{name}: the error in all is {percent(total_error(results))}")
    ranks.legend(frameon=False, loc="upper right", ncols=2)
    parts = [100 * result.relative_error for result in results]
    errors.stairs(parts, edges, color=_ERROR, fill=True)
    errors.set_ylabel("error in %")
    errors.set_ylim(0, 1.1 * max(parts, default=0) or 1)
    errors.set_xlabel("layer, by name")
    errors.set_xlim(edges[0], edges[-1])
    return picture_of(figure)


def _model_order(result: LayerResult) -> list[tuple[int, str]]:
    """By name, numbers by their value: files have block 10 before block 2."""
    parts = re.split(r"(\d+)", result.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _folded(kind: str, group: Sequence[LayerResult]) -> str:
    """``blocks.{}.q`` with the blocks that it stands for, such as ``blocks.0-18.q``."""
    if "{}" not in kind:
        return kind
    blocks = sorted(int(match[0]) for r in group if (match := _BLOCK.search(r.name)))
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    spans = [f"{first}-{last}" if first < last else str(first) for first, last in runs]
    if len(spans) > _MOST_SPANS:
        spans = [*spans[: _MOST_SPANS - 1], "...", spans[-1]]
    return kind.replace("{}", ",".join(spans), 1)


def _span(ranks: Iterable[int | None]) -> str:
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return "-"
    return f"{min(known)}-{max(known)}" if min(known) < max(known) else str(known[0])
