"""Writes a model in 8 bits, for this package and its peers or for ComfyUI's own loader."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import hardware
from ..architectures.names import LAYER_NAMES
from ..checkpoint_layers import stored_model
from ..errors import ConfigError
from ..events import Message, Progress, Reporter
from ..memory import size_in_words
from ..quantization_report import (
    LayerReport,
    error_plot,
    report_of,
    summary,
    table,
    total_error,
)
from ..quantized_cache import made_from
from ..quantized_file import LAYOUTS, FilePlan, plan_file, write_file
from ..quantized_layout import layout_of
from ..quantized_loading import (
    QuantizationSettings,
    QuantizedSource,
    quantized_source,
    read_loras,
    remarks,
)
from ..quantized_stream import stored_tensors
from ..weights import Checkpoint, open_checkpoint, pipeline_part
from .tool_result import ToolResult, check_not_an_input, check_output, check_room

_MIB = 2**20
_MOST_LISTED = 8
# Of the model as it was before.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def run(
    *,
    dit: Path,
    output: Path,
    settings: QuantizationSettings,
    loras: Sequence[tuple[Path, float]] = (),
    layout: str = "blockwise",
    architecture: str = "auto",
    overwrite: bool = False,
    report: Reporter,
) -> ToolResult:
    """Write a model whose layers are in 8 bits, under the names that its tensors have.

    Memory holds a few layers at a time. LoRAs are merged before weights are rounded.

    Args:
        dit: a safetensors file, any part of a split set, or the folder of a diffusers model.
        output: one safetensors file.
        loras: files and their multipliers.
        layout: "blockwise" for this package and musubi-tuner; "comfyui" for ComfyUI's own loader,
            with one scale for each layer whatever the settings say.
        architecture: a family's name, or "auto".
        overwrite: an existing file may be replaced.

    Raises:
        EngineError: a file cannot be read or written, or settings do not go together.
    """
    check_output(output, overwrite=overwrite)
    _check_options(loras, layout)
    checkpoint = open_checkpoint(pipeline_part(dit, "transformer"))
    check_not_an_input(output, [*checkpoint.paths, *(path for path, _ in loras)])
    names = stored_model(checkpoint, layout_of(checkpoint), LAYER_NAMES, architecture).names
    adapters, told = read_loras(checkpoint, names, loras)
    only_tensor_mode = layout == "comfyui"
    if only_tensor_mode:
        settings = replace(settings, mode="tensor")
    source = quantized_source(
        checkpoint, names, settings, adapters, only_tensor_mode=only_tensor_mode
    )
    plan = plan_file(source, layout, _metadata(checkpoint, dit, settings, loras))
    check_room(output, plan.num_bytes)
    device = hardware.find_device("auto")
    begin = time.perf_counter()
    layers = _write(source, plan, output, device, report)
    seconds = time.perf_counter() - begin
    told += remarks(source)
    for remark in told:
        report(Message(remark))
    lines = [f"{checkpoint.paths[0]}: {names.family}", *told, summary(layers)]
    if only_tensor_mode:
        in_blocks = replace(settings, mode="block", scale_dtype="fp32", compat=False)
        other = quantized_source(checkpoint, names, in_blocks, adapters)
        lines += _compared(layers, source, other, device)
    size = sum(entry.num_bytes for entry in checkpoint.entries.values())
    lines.append(
        f"Wrote {output}: {size_in_words(plan.num_bytes)} instead of {size_in_words(size)}, in "
        f"{seconds:.1f} s ({size / _MIB / seconds:.0f} MiB/s)"
    )
    measured = [layer for layer in layers if layer.error is not None]
    picture = error_plot(layers, title=output.stem) if measured else None
    worst = sorted(measured, key=lambda layer: -(layer.error or 0.0))[:_MOST_LISTED]
    if worst:
        lines += ["Largest errors:", table(worst)]
    return ToolResult("\n".join(lines), output, picture)


def _check_options(loras: Sequence[tuple[Path, float]], layout: str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: {layout!r} is unknown; choose {' or '.join(LAYOUTS)}")
    for path, multiplier in loras:
        if not math.isfinite(multiplier):
            raise ConfigError(f"{path}: the multiplier is {multiplier}; give a number")


def _metadata(
    checkpoint: Checkpoint,
    dit: Path,
    settings: QuantizationSettings,
    loras: Sequence[tuple[Path, float]],
) -> dict[str, str]:
    rest = {name: value for name, value in checkpoint.metadata.items() if name not in _STALE}
    return {**rest, **made_from(dit, settings, loras)}


def _write(
    source: QuantizedSource, plan: FilePlan, output: Path, device: torch.device, report: Reporter
) -> list[LayerReport]:
    total_mib = -(-plan.num_bytes // _MIB)

    def on_written(num_bytes: int) -> None:
        report(Progress("quantizing", num_bytes // _MIB, total_mib, unit="MiB"))

    return write_file(source, plan, output, device=device, measure=True, on_written=on_written)


def _compared(
    layers: Sequence[LayerReport],
    source: QuantizedSource,
    other: QuantizedSource,
    device: torch.device,
) -> list[str]:
    """A sentence on what a scale for each layer costs, if layers were rounded.

    Args:
        other: the same model, in blocks.
    """
    keys = [key for key, way in source.eight_bit.items() if not way.taken]
    blocks = [
        report_of(other, stored)
        for stored in stored_tensors(other, keys, dtype=None, device=device, measure=True)
    ]
    ours, theirs = total_error(layers), total_error(blocks)
    if ours is None or theirs is None:
        return []
    return [
        "with one scale for each layer, as ComfyUI's own loader needs it, the relative error is "
        f"{ours:.3%}; with scales for blocks of inputs it would be {theirs:.3%}"
    ]
