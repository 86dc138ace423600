"""Writes a LoRA in another spelling or number type, with what that changed in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import adapter_weights, lora_metadata
from ..adapter_weights import AdapterWeights, FullWeights, LoHaWeights, LoKrWeights, LoRAWeights
from ..lora_file import LoRAFile, read_lora, write_lora
from .lora_inputs import dtype_named, families
from .tool_result import ToolResult, check_output

_KINDS: dict[type[AdapterWeights], str] = {
    LoRAWeights: "LoRA",
    LoHaWeights: "LoHa",
    LoKrWeights: "LoKr",
    FullWeights: "full difference",
}


def run(
    *,
    source: Path,
    output: Path,
    format: str,
    dtype: str | None = None,
    architecture: str = "auto",
    overwrite: bool = False,
) -> ToolResult:
    """Convert one file.

    Args:
        format: "comfyui", "kohya" or "diffusers".
        dtype: "bf16", "fp16" or "fp32"; None keeps that of most numbers in the file.
        architecture: the family; "auto" finds out.

    Raises:
        EngineError: the file cannot be read, or not be written like that.
    """
    check_output(output, overwrite=overwrite)
    read = read_lora(source, families(architecture))
    stored = main_dtype(read.layers.values())
    chosen = dtype_named(dtype, stored)
    operation = f"converted from {read.format} to {format}"
    remarks = write_lora(
        output,
        read.layers,
        read.names,
        format=format,
        dtype=chosen,
        metadata=lora_metadata.derived([read.metadata], title=output.stem, operation=operation),
        other=read.other,
    )
    lines = [
        *describe(read),
        f"written as {format} in {_name(chosen)}: {output} ({_size(output)})",
        *(f"- {remark}" for remark in (*read.remarks, *remarks)),
    ]
    if torch.promote_types(stored, chosen) != chosen:
        lines.append(f"- numbers were rounded from {_name(stored)} to {_name(chosen)}")
    return ToolResult("\n".join(lines), output)


def describe(read: LoRAFile) -> list[str]:
    """What a file holds, for people."""
    kinds = Counter(_KINDS[type(each)] for each in read.layers.values())
    low_rank = [each for each in read.layers.values() if not isinstance(each, FullWeights)]
    ranks = Counter(each.rank or 0 for each in low_rank)
    scales = sorted({round(each.scale, 6) for each in low_rank})
    numbers = sum(adapter_weights.num_values(each) for each in read.layers.values())
    stored = _name(main_dtype(read.layers.values()))
    lines = [
        f"{read.path} ({_size(read.path)}): {read.format} format for {read.names.family}",
        f"{_listed(kinds)} layers, {numbers:,} numbers in {stored}",
    ]
    if ranks:
        listed = _listed({f"rank {rank}" if rank else "no rank": n for rank, n in ranks.items()})
        span = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        lines.append(f"{listed}; scale (alpha / rank) {span}")
    magnitudes = sum(each.magnitude is not None for each in low_rank)
    if magnitudes:
        lines.append(f"{magnitudes} layers with a magnitude (DoRA)")
    return lines


def main_dtype(adapters: Iterable[AdapterWeights]) -> torch.dtype:
    """The number type of most numbers."""
    counts: Counter[torch.dtype] = Counter()
    for adapter in adapters:
        for tensor in adapter_weights.tensors(adapter).values():
            counts[tensor.dtype] += tensor.numel()
    found = counts.most_common(1)[0][0]
    return torch.float32 if found == torch.float64 else found


def _listed(counts: dict[str, int] | Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{number} {name}" for name, number in ordered[:4])
    more = sum(number for _, number in ordered[4:])
    return f"{shown} and {more} of {len(ordered) - 4} others" if more else shown


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(path: Path) -> str:
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
