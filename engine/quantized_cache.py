"""A copy on disk of a model in 8 bits, so that the next start only reads it.

What a copy is made from decides its name: model, LoRAs, settings. It is an ordinary file in 8
bits, as `jobs.quantize` writes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .errors import CheckpointError, EngineError
from .events import Message, Progress, Reporter
from .layer_names import LayerNames
from .memory import size_in_words
from .quantization_report import summary
from .quantized_file import plan_file, write_file
from .quantized_loading import (
    QuantizationSettings,
    QuantizedSource,
    quantized_source,
    read_loras,
    remarks,
)
from .weights import fingerprint, open_checkpoint, pipeline_part

IDENTITY = "lora_loom.quantized_identity"
MADE_FROM = "lora_loom.quantized_from"
# Of the files; with another one, earlier copies are made anew.
_VERSION = 1
_FILE, _CONFIG = "model.safetensors", "config.json"
_MIB = 2**20


def cached_model(
    dit: Path,
    folder: Path,
    names: LayerNames,
    settings: QuantizationSettings,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    device: torch.device | str = "cpu",
    report: Reporter,
) -> Path:
    """A file with the model in 8 bits and the LoRAs in it, made if it is not there yet.

    A copy that is damaged is made again. Where the model is in 8 bits already and no LoRA is
    merged, it is itself what is given.

    Args:
        dit: a safetensors file, any part of a split set, or the folder of a diffusers model.
        folder: made if it is missing; copies in it are never removed.
        loras: files and their multipliers.
        device: where weights are rounded.

    Raises:
        ConfigError: the settings do not go together, or a pattern matches nothing.
        CheckpointError: a file cannot be read, or the LoRAs do not fit.
        EngineError: the folder cannot be written to, or has no room.
    """
    path = pipeline_part(dit, "transformer")
    checkpoint = open_checkpoint(path)
    source = quantized_source(checkpoint, names, settings)
    if not source.is_changed and not loras:
        report(Message(f"{dit.name} is in 8 bits already, so no copy of it is kept"))
        return dit
    identity = _identity(path, source, settings, loras)
    copy = folder / f"{dit.stem}-{identity}" / _FILE
    if copy.exists():
        if _is_whole(copy, identity):
            report(Message(f"reading the model in 8 bits from {copy}"))
            return copy
        report(Message(f"{copy} is damaged; it is made again", "warning"))
    adapters, told = read_loras(checkpoint, names, loras)
    for remark in told:
        report(Message(remark))
    if loras:
        source = quantized_source(checkpoint, names, settings, adapters)
    _write(copy, source, {IDENTITY: identity, **made_from(dit, settings, loras)}, device, report)
    config = path / _CONFIG
    if config.is_file():
        shutil.copyfile(config, copy.with_name(_CONFIG))
    return copy


def made_from(
    dit: Path, settings: QuantizationSettings, loras: Sequence[tuple[Path, float]]
) -> dict[str, str]:
    """A field for the header of the file that is made."""
    facts = {
        "file": dit.name,
        "settings": asdict(settings),
        "loras": [{"file": path.name, "multiplier": times} for path, times in loras],
    }
    return {MADE_FROM: json.dumps(facts)}


def _identity(
    path: Path,
    source: QuantizedSource,
    settings: QuantizationSettings,
    loras: Sequence[tuple[Path, float]],
) -> str:
    facts = {
        "version": _VERSION,
        "model": fingerprint(path),
        "loras": [(fingerprint(lora), times) for lora, times in loras],
        "settings": asdict(settings),
        "layers": sorted(source.eight_bit),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(copy: Path, identity: str) -> bool:
    try:
        return open_checkpoint(copy).metadata.get(IDENTITY) == identity
    except CheckpointError:
        return False


def _write(
    copy: Path,
    source: QuantizedSource,
    fields: dict[str, str],
    device: torch.device | str,
    report: Reporter,
) -> None:
    plan = plan_file(source, "blockwise", {**source.checkpoint.metadata, **fields})
    total_mib = -(-plan.num_bytes // _MIB)

    def on_written(num_bytes: int) -> None:
        report(Progress("quantizing", num_bytes // _MIB, total_mib, unit="MiB"))

    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(copy.parent).free
        if plan.num_bytes > free:
            raise EngineError(
                f"{copy.parent}: the model in 8 bits needs {size_in_words(plan.num_bytes)}, but "
                f"only {size_in_words(free)} are free; make room, or choose another "
                "quantized_cache"
            )
        layers = write_file(source, plan, copy, device=device, on_written=on_written)
    except OSError as error:
        raise EngineError(
            f"{copy}: the model in 8 bits cannot be written: {error.strerror}; choose another "
            "quantized_cache"
        ) from error
    for line in (*remarks(source), summary(layers)):
        report(Message(line))
