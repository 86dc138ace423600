"""Makes one LoRA of several, each with a weight: exactly, or of a lower rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import adapter_ranks
from ..adapter_weights import AdapterWeights, converted
from ..errors import CheckpointError, ConfigError
from ..events import Progress, Reporter, Saved, silent
from ..lora_metadata import derived
from ..low_rank import RankChoice
from . import lora_outputs
from .lora_inputs import Opened, dtype_named, open_lora, widest
from .lora_layer_report import LayerResult, compared, in_words, size, table
from .lora_resize import lower
from .tool_result import ToolResult, check_not_an_input, check_output

_SEED = 0  # of sketches


def run(
    *,
    sources: Sequence[tuple[Path, float]],
    output: Path,
    ranks: RankChoice | None = None,
    dtype: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    architecture: str = "auto",
    report: Reporter = silent,
) -> ToolResult:
    """Write a LoRA that does what all sources do together, each times its weight.

    Files may differ in spelling, kind, rank, alpha and in the layers that they have.

    Args:
        sources: path and weight of each; a negative weight takes away what it does.
        ranks: None keeps everything, so that ranks add up; otherwise each layer becomes the best
            approximation of the chosen rank.
        dtype: "bf16", "fp16" or "fp32"; by default the narrowest that holds all the numbers.
        format: how keys are spelled; by default as in the first source.

    Raises:
        EngineError: a setting or file cannot be used, a layer has a magnitude, or the files are
            not for the same model.
    """
    check_output(output, overwrite=overwrite)
    check_not_an_input(output, [path for path, _ in sources])
    _check_weights(sources)
    opened = [open_lora(path, architecture) for path, _ in sources]
    layers = _by_layer(opened, [weight for _, weight in sources])
    number_type = dtype_named(dtype, widest(a for file in opened for a in file.adapters.values()))
    generator = torch.Generator().manual_seed(_SEED)
    results: list[LayerResult] = []
    made: dict[str, AdapterWeights] = {}
    for name, parts in layers.items():
        report(Progress("combining", len(results), len(layers), "layer"))
        exact = adapter_ranks.combined(parts)
        if ranks:
            made[name] = lower(exact, ranks, dtype=number_type, generator=generator)
        else:
            made[name] = converted(exact, number_type)
        results.append(compared(name, exact, made[name]))
    report(Progress("combining", len(layers), len(layers), "layer"))
    listed = ", ".join(f"{weight:g} x {path.name}" for path, weight in sources)
    metadata = derived(
        [file.file.metadata for file in opened], title=output.stem, operation=f"combined: {listed}"
    )
    first = opened[0].file
    text_keys = {stem: keys for file in reversed(opened) for stem, keys in file.text_keys.items()}
    remarks = lora_outputs.write(
        output,
        made,
        first.names,
        text_keys=text_keys,
        format=format or first.format,
        dtype=number_type,
        metadata=metadata,
    )
    report(Saved(str(output), "lora"))
    lines = [_described(file, weight) for file, (_, weight) in zip(opened, sources, strict=True)]
    lines += [remark for file in opened for remark in file.file.remarks] + remarks
    lines += [table(results), in_words(results), size(output.stat().st_size)]
    return ToolResult("\n".join(lines), output)


def _check_weights(sources: Sequence[tuple[Path, float]]) -> None:
    if not sources:
        raise ConfigError("no LoRA is given; name at least one file")
    for path, weight in sources:
        if not math.isfinite(weight) or weight == 0:
            raise ConfigError(
                f"{path}: a weight of {weight} makes no sense; leave the file out, or give it a "
                "weight such as 1 or -0.5"
            )


def _by_layer(
    opened: Sequence[Opened], weights: Sequence[float]
) -> dict[str, list[adapter_ranks.Weighted]]:
    """What each layer gets of every file that has it.

    Raises:
        CheckpointError: the files are not for the same model.
    """
    first = opened[0].file
    layers: dict[str, list[adapter_ranks.Weighted]] = {}
    shapes: dict[str, tuple[tuple[int, ...], Path]] = {}
    for file, weight in zip(opened, weights, strict=True):
        path = file.file.path
        if file.file.names.family != first.names.family:
            raise CheckpointError(
                f"{path}: the LoRA is for {file.file.names.family}, but {first.path} is for "
                f"{first.names.family}; only LoRAs of one model can be combined"
            )
        for name, adapter in file.adapters.items():
            if adapter.shape is not None:
                shape, other = shapes.setdefault(name, (adapter.shape, path))
                if shape != adapter.shape:
                    raise CheckpointError(
                        f"{path}: {name} is for a weight of {list(adapter.shape)}, but in {other} "
                        f"it is for one of {list(shape)}; the LoRAs are for models of other sizes"
                    )
            layers.setdefault(name, []).append((adapter, weight))
    return layers


def _described(opened: Opened, weight: float) -> str:
    count = len(opened.adapters)
    return f"{weight:g} x {opened.file.path.name}: {count} layers, rank up to {opened.rank}"
