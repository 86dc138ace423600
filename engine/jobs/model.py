"""The diffusion model as the settings want it: in its number type or in 8 bits, with LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import hardware, lora_merge, quantized_loading
from ..adapter_weights import AdapterWeights
from ..architectures.base import Architecture
from ..config import Config, QuantizationConfig
from ..errors import CheckpointError, ConfigError
from ..events import Message, Reporter
from ..key_table import fusions
from ..layer_names import LayerNames, row_of
from ..lora_pieces import NotExactError, split
from ..quantized_cache import cached_model
from ..quantized_loading import Adapters, QuantizationSettings, read_loras
from ..weights import open_checkpoint, pipeline_part


def quantization_of(config: Config) -> QuantizationSettings | None:
    """How weights get into 8 bits when the model is loaded; None if they do not."""
    return quantization_settings(config.quantization) if config.quantization.fp8_scaled else None


def quantization_settings(wanted: QuantizationConfig) -> QuantizationSettings:
    """The settings as the loader takes them."""
    return QuantizationSettings(
        format=wanted.quantize_format,
        mode=wanted.quantize_mode,
        block_size=wanted.quantize_block_size,
        scale_dtype=wanted.quantize_scale_dtype,
        search=wanted.quantize_search,
        compat=wanted.quantize_compat,
        exclude=tuple(wanted.quantize_exclude_patterns),
    )


def check(config: Config, *, trains: bool) -> None:
    """Whether the settings of 8 bits go together.

    Raises:
        ConfigError: they do not.
    """
    wanted = config.quantization
    alone = wanted.fp8_base if trains else wanted.fp8
    name = "fp8_base" if trains else "fp8"
    if alone and not wanted.fp8_scaled:
        raise ConfigError(
            f"{name} goes with fp8_scaled: a cast to 8 bits without scales is not offered, because "
            "its errors are larger; give both, or neither"
        )
    if trains and wanted.fp8_scaled and not wanted.fp8_base:
        raise ConfigError("fp8_scaled needs fp8_base for a training; give both, or neither")
    if wanted.quantized_cache and not wanted.fp8_scaled:
        raise ConfigError("quantized_cache is for fp8_scaled; give both, or neither")
    if settings := quantization_of(config):
        quantized_loading.check(settings)


def load_transformer(
    config: Config,
    architecture: Architecture,
    device: torch.device,
    report: Reporter,
    *,
    loras: Sequence[tuple[Path, float]] = (),
) -> nn.Module:
    """The model of ``dit``, frozen and in evaluation mode, with LoRAs merged before any rounding.

    Args:
        loras: files and their multipliers.

    Raises:
        EngineError: a file cannot be read, or does not fit.
    """
    assert config.model.dit is not None
    path, settings = config.model.dit, quantization_of(config)
    folder = config.quantization.quantized_cache
    names = architecture.layer_names

    def tell(sentence: str) -> None:
        report(Message(sentence))

    if settings and folder:
        path = cached_model(
            path, folder, names, settings, loras=loras, device=device, report=report
        )
        loras = ()
    adapters: list[Adapters] = []
    if loras:
        checkpoint = open_checkpoint(pipeline_part(path, "transformer"))
        adapters, told = read_loras(checkpoint, names, loras)
        for sentence in told:
            tell(sentence)
    # What is rounded to 8 bits is merged before. All else has the number type of the run by then,
    # which may be more exact than that of the file.
    before = adapters if settings else []
    transformer = architecture.load_transformer(
        path,
        dtype=hardware.DTYPES[config.training.mixed_precision],
        device=device,
        quantization=settings,
        loras=before,
        told=tell,
    )
    inner = {each.published: each.inner for each in fusions(names.table, transformer)}
    for layers, multiplier in [] if settings else adapters:
        ours = {name: _of_our_module(names, name, adapter) for name, adapter in layers.items()}
        lora_merge.merge_into(transformer, inner, ours, multiplier=multiplier)
    return transformer


def _of_our_module(names: LayerNames, published: str, adapter: AdapterWeights) -> AdapterWeights:
    """The adapter as diffusers orders the rows of its layer.

    Raises:
        CheckpointError: it cannot be ordered so exactly.
    """
    found = row_of(names, published)
    if found is None or not found[0].halves_swapped:
        return adapter
    try:
        [part] = split(adapter, found[0])
    except NotExactError as error:
        raise CheckpointError(
            f"{published} {error}, so it cannot be merged into diffusers' model; merge it with the "
            "tool lora merge first"
        ) from None
    return part or adapter
