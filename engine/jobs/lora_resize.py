"""Gives the layers of a LoRA lower ranks, each the best approximation of what it was."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import adapter_ranks
from ..adapter_weights import AdapterWeights, LoRAWeights, converted
from ..events import Progress, Reporter, Saved, silent
from ..lora_metadata import derived
from ..low_rank import RankChoice
from . import lora_outputs
from .lora_inputs import dtype_named, open_lora
from .lora_layer_report import LayerResult, compared, in_words, rank_chart, size, table
from .tool_result import ToolResult, check_not_an_input, check_output

_SEED = 0  # of sketches


def run(
    *,
    source: Path,
    output: Path,
    ranks: RankChoice,
    dtype: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    architecture: str = "auto",
    report: Reporter = silent,
) -> ToolResult:
    """Write a LoRA of lower ranks that does nearly the same; alpha is the rank of each layer.

    LoHa and LoKr become LoRA. Layers whose rank is as low already stay as they are, and so do
    differences of biases and norms. The picture shows the rank and the error of every layer.

    Args:
        dtype: "bf16", "fp16" or "fp32"; by default that of the source.
        format: how keys are spelled; by default as in the source.

    Raises:
        EngineError: a setting or file cannot be used, or a layer has a magnitude.
    """
    check_output(output, overwrite=overwrite)
    check_not_an_input(output, [source])
    opened = open_lora(source, architecture)
    number_type = dtype_named(dtype, opened.dtype)
    generator = torch.Generator().manual_seed(_SEED)
    results: list[LayerResult] = []
    resized: dict[str, AdapterWeights] = {}
    adapters = opened.adapters
    for name, adapter in adapters.items():
        report(Progress("resizing", len(results), len(adapters), "layer"))
        resized[name] = lower(adapter, ranks, dtype=number_type, generator=generator)
        results.append(compared(name, adapter, resized[name]))
    report(Progress("resizing", len(adapters), len(adapters), "layer"))
    remarks = lora_outputs.write(
        output,
        resized,
        opened.file.names,
        text_keys=opened.text_keys,
        format=format or opened.file.format,
        dtype=number_type,
        metadata=derived([opened.file.metadata], title=output.stem, operation="resized"),
    )
    report(Saved(str(output), "lora"))
    sizes = f"{size(source.stat().st_size)} -> {size(output.stat().st_size)}"
    lines = [*opened.file.remarks, *remarks, table(results), in_words(results), sizes]
    return ToolResult("\n".join(lines), output, rank_chart(results, name=output.name))


def lower(
    adapter: AdapterWeights,
    ranks: RankChoice,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> AdapterWeights:
    """The best approximation of the chosen rank, in the type it is stored in.

    The adapter itself where it is a LoRA of no higher rank, or for no matrix.
    """
    if not adapter_ranks.is_matrix(adapter):
        return converted(adapter, dtype)
    found = adapter_ranks.decomposed(adapter, limit=ranks.limit, generator=generator)
    rank = ranks.of(found)
    if isinstance(adapter, LoRAWeights) and rank >= adapter.rank:
        return converted(adapter, dtype)
    assert adapter.shape is not None
    return adapter_ranks.lora_of(
        found.truncated(rank), shape=adapter.shape, dtype=dtype, bias_diff=adapter.bias_diff
    )
