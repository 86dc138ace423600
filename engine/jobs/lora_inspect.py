"""Says what is in a LoRA file: how it is made, how it was trained, what each layer does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import lora_plots
from ..architectures.names import LAYER_NAMES
from ..errors import CheckpointError
from ..events import Progress, Reporter, silent
from ..layer_names import LayerNames, row_of
from ..lora_file import LoRAFile, read_lora
from ..lora_statistics import (
    NO_EFFECT,
    NOT_FINITE,
    SATURATED,
    ZERO_ALPHA,
    LayerStatistics,
    Total,
    grouped,
    layer_statistics,
    statistics_as_json,
    total,
)
from ..model_difference import ModelOnDisk, Parameter, open_model
from ..training_facts import printable, training_facts
from .lora_convert import describe
from .lora_inputs import families
from .lora_layer_report import percent
from .tool_result import ToolResult

_MOST_NAMES = 3
_PLURAL = {
    problem: problem.replace("has ", "have ", 1).replace("does ", "do ", 1)
    for problem in (NOT_FINITE, SATURATED, NO_EFFECT, ZERO_ALPHA)
}


def run(
    *,
    source: Path,
    architecture: str = "auto",
    dit: Path | None = None,
    verbose: bool = False,
    as_json: bool = False,
    report: Reporter = silent,
) -> ToolResult:
    """Inspect one file; the picture shows what every layer adds.

    Args:
        dit: the model that it is for: changes are also given as parts of its weights.
        verbose: a line for every layer, and all metadata.
        as_json: the report is JSON with everything in it, for scripts; there is no picture.

    Raises:
        EngineError: the file cannot be read, or does not fit the model.
    """
    model = None if dit is None else open_model(dit, LAYER_NAMES, architecture)
    asked = families(architecture) if model is None else [model.stored.names]
    shapes = None if model is None else model.stored.shapes()
    read = read_lora(source, asked, shapes=shapes, check_finite=False)
    layers = _measured(read, model, report)
    facts = training_facts(read.metadata)
    if as_json:
        return ToolResult(statistics_as_json(layers, _about(read, facts)))
    relative = model is not None
    sections = [
        [*describe(read), _alphas(layers), *_spread(layers)],
        [f"- {sentence}" for sentence in (*read.remarks, *_warnings(layers))],
        ["training", *_columns([(f"  {name}", text) for name, text in facts])] if facts else [],
        _table("block", layers, lambda layer: layer.place.block, relative),
        _table("kind of layer", layers, _kind, relative),
    ]
    if verbose:
        sections += [_layer_table(layers, relative), _all_metadata(read.metadata)]
    text = "\n\n".join("\n".join(filter(None, lines)) for lines in sections if lines)
    title = f"{source.name}: what every layer adds"
    return ToolResult(text, picture=lora_plots.layer_map(layers, title=title, relative=relative))


def _measured(read: LoRAFile, model: ModelOnDisk | None, report: Reporter) -> list[LayerStatistics]:
    """In the order of the model."""
    names = _in_order(read.names, list(read.layers))
    found: list[LayerStatistics] = []
    for done, name in enumerate(names):
        report(Progress("inspecting", done, len(names), "layer"))
        weight = None
        if model is not None and read.layers[name].shape is not None:
            weight = model.read(Parameter(name, "weight"))
            if not weight.isfinite().all():
                raise CheckpointError(
                    f"{model.path}: {name} has values that are NaN or infinite; get the file again"
                )
        found.append(layer_statistics(name, read.layers[name], weight))
    report(Progress("inspecting", len(names), len(names), "layer"))
    return found


def _in_order(names: LayerNames, layers: list[str]) -> list[str]:
    """Block by block, and in each as in the family's table."""
    rows = {row.published: position for position, row in enumerate(names.table)}
    first_of_list: dict[str, int] = {}
    for published, position in rows.items():
        first_of_list.setdefault(published.partition(".{}")[0], position)

    def key(name: str) -> tuple[int, list[int], int]:
        found = row_of(names, name)
        assert found is not None  # `read_lora` gives names of the table
        row, indices = found
        blocks = row.published.partition(".{}")[0]
        return first_of_list[blocks], [int(index) for index in indices], rows[row.published]

    return sorted(layers, key=key)


def _about(read: LoRAFile, facts: Sequence[tuple[str, str]]) -> dict[str, object]:
    return {
        "path": str(read.path),
        "format": read.format,
        "family": read.names.family,
        "training": dict(facts),
        "metadata": read.metadata,
        "other_keys": sorted(read.other),
        "remarks": list(read.remarks),
    }


# In words


def _alphas(layers: Sequence[LayerStatistics]) -> str:
    counts = Counter(f"{layer.alpha:g}" for layer in layers if layer.alpha is not None)
    if not counts:
        return ""
    listed = ", ".join(f"{alpha} ({number})" for alpha, number in counts.most_common(4))
    more = f" and {len(counts) - 4} other values" if len(counts) > 4 else ""
    return f"alpha {next(iter(counts)) if len(counts) == 1 else listed}{more}"


def _spread(layers: Sequence[LayerStatistics]) -> list[str]:
    """What singular values say, all layers together."""
    all_ = total(layers)
    lines = [f"norm of all changes {all_.norm:.4g}"]
    if all_.relative_norm is not None:
        lines[0] += f", {percent(all_.relative_norm)} of the norm of the weights they are for"
    if all_.effective_rank is not None and all_.energy_rank is not None:
        lines.append(
            f"effective rank {all_.effective_rank:.3g} and {all_.energy_rank:.3g} singular values "
            "for 99 % of a layer's change, on average"
        )
    if unknown := sum(_is_large(layer) for layer in layers):
        lines.append(f"singular values of {unknown} large layers were not computed")
    return lines


def _is_large(layer: LayerStatistics) -> bool:
    matrix = layer.shape is not None and len(layer.shape) > 1
    return matrix and layer.largest is None and NOT_FINITE not in layer.problems


def _warnings(layers: Sequence[LayerStatistics]) -> list[str]:
    by_problem: dict[str, list[str]] = {}
    for layer in layers:
        for problem in layer.problems:
            by_problem.setdefault(problem, []).append(layer.name)
    return [
        f"warning: {_named(names)} {problem if len(names) == 1 else _PLURAL[problem]}"
        for problem, names in by_problem.items()
    ]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _kind(layer: LayerStatistics) -> str:
    place = layer.place
    return f"{place.blocks}.*.{place.kind}" if place.blocks else place.kind


def _table(
    heading: str,
    layers: Sequence[LayerStatistics],
    key: Callable[[LayerStatistics], str],
    relative: bool,
) -> list[str]:
    rows = [_cells(heading, None, relative)]
    groups = grouped(layers, key)
    rows += [_cells(name, total(members), relative) for name, members in groups.items()]
    return _columns(rows)


def _cells(name: str, of: Total | None, relative: bool) -> tuple[str, ...]:
    if of is None:
        last = ("of weight",) if relative else ()
        return (name, "layers", "norm", "largest", "eff. rank", "99 % rank", *last)
    last = ("-" if of.relative_norm is None else percent(of.relative_norm),) if relative else ()
    numbers = (of.norm, of.largest, of.effective_rank, of.energy_rank)
    return (name, str(of.num_layers), *map(_number, numbers), *last)


def _layer_table(layers: Sequence[LayerStatistics], relative: bool) -> list[str]:
    rows = [("layer", "kind", "shape", "rank", "alpha", *_cells("", None, relative)[2:], "type")]
    for layer in layers:
        shape = " x ".join(map(str, layer.shape)) if layer.shape else "bias"
        numbers = _cells("", total([layer]), relative)[2:]
        rank = "-" if layer.rank is None else str(layer.rank)
        alpha = _number(layer.alpha)
        rows.append((layer.name, layer.kind, shape, rank, alpha, *numbers, layer.dtype))
    return _columns(rows)


def _all_metadata(metadata: Mapping[str, str]) -> list[str]:
    if not metadata:
        return []
    return ["metadata", *(f"  {printable(key)} = {printable(metadata[key])}" for key in metadata)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}".removesuffix(".")


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned: the first column to the left, and the second too if there are only two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 2 if len(widths) == 2 else 1
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
