"""Merges LoRAs into a model file, for those who want one file or no LoRA loader."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..architectures.names import LAYER_NAMES
from ..checkpoint_layers import StoredModel, stored_model
from ..checkpoint_merge import CheckpointMerge, plan_merge, write_merged
from ..errors import ConfigError
from ..events import Message, Progress, Reporter
from ..lora_file import LoRAFile, read_lora
from ..lora_merge import MergeTally, check_layers
from ..memory import size_in_words
from ..quantized_layout import layout_of
from ..weights import Checkpoint, open_checkpoint, pipeline_part
from .tool_result import ToolResult, check_not_an_input, check_output, check_room

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rounding error in parts of the change, from which on it is worth a warning.
_MUCH_ROUNDING = 0.5
_MIB = 2**20
# Of the model as it was before.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_MERGED_FROM = "merged_from"


def run(
    *,
    dit: Path,
    loras: Sequence[tuple[Path, float]],
    output: Path,
    dtype: str | None = None,
    architecture: str = "auto",
    overwrite: bool = False,
    report: Reporter,
) -> ToolResult:
    """Write a model with LoRAs merged in; what they do not touch is copied byte for byte.

    Memory holds one layer at a time. A LoRA that comes later finds what earlier ones have made,
    which only matters where one has magnitudes (DoRA).

    Args:
        dit: a safetensors file, any part of a split set, or the folder of a diffusers model.
        loras: files and their multipliers.
        output: one safetensors file.
        dtype: "bf16", "fp16" or "fp32" for all floating-point tensors of the diffusion model;
            None keeps the type of each, and the way it is quantized.
        architecture: a family's name, or "auto".
        overwrite: an existing file may be replaced.

    Raises:
        EngineError: a file cannot be read or written, or they do not fit each other.
    """
    check_output(output, overwrite=overwrite)
    _check_options(loras, dtype)
    checkpoint = open_checkpoint(pipeline_part(dit, "transformer"))
    check_not_an_input(output, [*checkpoint.paths, *(path for path, _ in loras)])
    layout = layout_of(checkpoint)
    model = stored_model(checkpoint, layout, LAYER_NAMES, architecture)
    shapes = model.shapes()
    files = [(read_lora(path, [model.names], shapes=shapes), times) for path, times in loras]
    for file, _ in files:
        check_layers(file.layers, model.layers, str(file.path))
    merge = plan_merge(
        checkpoint,
        layout,
        model,
        [(file.layers, multiplier) for file, multiplier in files],
        dtype=None if dtype is None else DTYPES[dtype],
        metadata=_metadata(checkpoint.metadata, files),
    )
    check_room(output, merge.num_bytes)
    begin = time.perf_counter()
    total_mib = -(-merge.num_bytes // _MIB)

    def on_written(num_bytes: int) -> None:
        report(Progress("merging", num_bytes // _MIB, total_mib, unit="MiB"))

    tally = write_merged(merge, output, on_written=on_written)
    seconds = time.perf_counter() - begin
    remarks = _remarks(files, tally, merge)
    for remark in remarks:
        report(Message(remark, "warning"))
    lines = [*_in_words(checkpoint, model, merge, files), *remarks]
    lines.append(
        f"Wrote {output}: {size_in_words(merge.num_bytes)} in {seconds:.1f} s "
        f"({merge.num_bytes / _MIB / seconds:.0f} MiB/s)"
    )
    return ToolResult("\n".join(lines), output)


def _check_options(loras: Sequence[tuple[Path, float]], dtype: str | None) -> None:
    if not loras:
        raise ConfigError("loras: there is nothing to merge; give at least one LoRA file")
    for path, multiplier in loras:
        if not math.isfinite(multiplier):
            raise ConfigError(f"{path}: the multiplier is {multiplier}; give a number")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is unknown; choose {', '.join(DTYPES)}")


def _metadata(model: Mapping[str, str], files: Sequence[tuple[LoRAFile, float]]) -> dict[str, str]:
    """The model's, with what was merged: ``merged_from`` as JSON, for people in modelspec."""
    rest = {name: value for name, value in model.items() if name not in _STALE}
    merged = [{"file": file.path.name, "multiplier": times} for file, times in files]
    try:
        earlier = json.loads(rest.get(_MERGED_FROM, "[]"))
    except ValueError:
        earlier = []
    earlier = earlier if isinstance(earlier, list) else []
    names = ", ".join(file.path.stem for file, _ in files)
    before = rest.get("modelspec.merged_from")
    return {
        **rest,
        _MERGED_FROM: json.dumps([*earlier, *merged]),
        "modelspec.merged_from": f"{before}, {names}" if before else names,
    }


def _remarks(
    files: Sequence[tuple[LoRAFile, float]], tally: MergeTally, merge: CheckpointMerge
) -> list[str]:
    found = [f"{file.path.name}: {remark}" for file, _ in files for remark in file.remarks]
    found += [
        f"{file.path.name}: {len(file.other)} tensors for text encoders were not merged"
        for file, _ in files
        if file.other
    ]
    rounding = tally.rounding()
    if rounding > _MUCH_ROUNDING:
        found.append(
            f"rounding to {_type_in_words(merge)} adds an error {rounding:.2g} times as large as "
            "the change; for a result nearer to the model with its LoRA merge into a more precise "
            "file, or keep the LoRA apart"
        )
    return found


def _in_words(
    checkpoint: Checkpoint,
    model: StoredModel,
    merge: CheckpointMerge,
    files: Sequence[tuple[LoRAFile, float]],
) -> list[str]:
    quantized = merge.layout.in_words()
    stored = quantized or str(checkpoint.main_dtype(checkpoint.keys())).removeprefix("torch.")
    lines = [f"{checkpoint.paths[0]}: {model.names.family}, {stored}"]
    for file, multiplier in files:
        kinds = Counter(
            type(adapter).__name__.removesuffix("Weights") for adapter in file.layers.values()
        )
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines.append(f"{file.path} x {multiplier:g}: {listed}")
    changed = len(merge.targets)
    lines.append(
        f"{changed} of {len(merge.tensors)} tensors changed, in {len(merge.adapters)} layers"
    )
    return lines


def _type_in_words(merge: CheckpointMerge) -> str:
    dtypes = Counter[torch.dtype]()
    for key in merge.targets:
        dtypes[merge.tensors[key].dtype] += merge.tensors[key].num_bytes
    return str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
