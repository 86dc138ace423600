"""What becomes of the tensors of a model on disk that is to be kept in 8 bits.

LoRAs are merged before a weight is rounded. What a file has in 8 bits already is taken as it is.
`quantized_stream` reads the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .adapter_weights import AdapterWeights
from .checkpoint_layers import StoredModel, stored_model
from .checkpoint_merge import CheckpointMerge, plan_merge
from .errors import CheckpointError, ConfigError
from .layer_names import LayerNames
from .lora_file import read_lora
from .lora_merge import check_layers
from .quantize import Quantized, empty, mode_for
from .quantized_layers import layers_to_quantize, linears_of_blocks
from .quantized_layout import QuantizedLayout, layout_of
from .stored_weight import FORMATS, StoredWeight
from .weight_scales import SMALLEST
from .weights import Checkpoint

SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "weight": None}
# What a LoRA file has, and how many times it is added.
Adapters = tuple[Mapping[str, AdapterWeights], float]
# Weights that are read and rounded at once.
_PIECE = 2**18
# Whole weights that may be in memory besides the results, while one scale for all is looked for.
_MOST_WHOLE = 2


@dataclass(frozen=True)
class QuantizationSettings:
    """How weights are rounded; see `quantize.quantize`.

    Args:
        format: "e4m3", "e5m2" or "int8".
        mode: what has a scale of its own, "block", "channel" or "tensor". A weight whose inputs
            cannot be divided into blocks gets one for each row.
        block_size: inputs in a block.
        scale_dtype: "fp32", "bf16" or "weight" for that of the weight.
        exclude: patterns of whole published names of layers that stay as they are.
    """

    format: str = "e4m3"
    mode: str = "block"
    block_size: int = 64
    scale_dtype: str = "fp32"
    search: bool = False
    compat: bool = False
    exclude: tuple[str, ...] = ()


def check(settings: QuantizationSettings) -> None:
    """Whether the settings go together.

    Raises:
        ConfigError: they do not.
    """
    if settings.compat and settings.format == "int8":
        raise ConfigError("quantize_compat: musubi-tuner has no int8; remove one of the two")
    if settings.compat and settings.search:
        raise ConfigError(
            "quantize_compat: musubi-tuner does not look for scales; remove it or quantize_search"
        )


@dataclass(frozen=True)
class EightBit:
    """How one stored weight [O, I] gets into 8 bits.

    Args:
        layer: its published name.
        dtype: of the weight before; of codes if they are ``taken`` from the file as they are.
        asked: the mode that was to be used, if that is not possible.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    mode: str
    block_size: int
    scale_dtype: torch.dtype
    taken: bool = False
    asked: str = ""

    def empty(self, device: torch.device | str) -> Quantized:
        """What it will be, without values."""
        return empty(
            self.shape,
            format=self.format,
            mode=self.mode,
            block_size=self.block_size,
            scale_dtype=self.scale_dtype,
            device=device,
        )


@dataclass(frozen=True)
class QuantizedSource:
    """A model on disk and what becomes of its tensors; made by `quantized_source`.

    Args:
        eight_bit: those that get into 8 bits, by key.
        merge: the LoRAs that are added; None for none.
    """

    checkpoint: Checkpoint
    layout: QuantizedLayout
    model: StoredModel
    settings: QuantizationSettings | None
    eight_bit: Mapping[str, EightBit]
    merge: CheckpointMerge | None

    def headers(self) -> Checkpoint:
        """The tensors of the model with the shapes of the weights themselves; not to be read."""
        return unquantized_headers(self.checkpoint, self.layout)

    def tensors(self) -> list[str]:
        """All tensors but those that only say how others are stored, in the order of the file."""
        beside = self.layout.companions
        return [key for key in self.checkpoint.in_file_order() if key not in beside]

    def plain_dtype(self, key: str) -> torch.dtype:
        """The type of a tensor that does not get into 8 bits, where no other is asked for."""
        if not self.layout.is_quantized(key) or not key.startswith(self.model.prefix):
            return self.checkpoint.dtype(key)
        plain = [each for each in self.tensors() if not self.layout.is_quantized(each)]
        main = self.checkpoint.main_dtype(plain)
        return main if plain else torch.bfloat16

    @property
    def is_changed(self) -> bool:
        """Whether anything is rounded or merged, other than read as it is."""
        return bool(self.merge) or any(not each.taken for each in self.eight_bit.values())


def unquantized_headers(checkpoint: Checkpoint, layout: QuantizedLayout) -> Checkpoint:
    """What the checkpoint would be if nothing in it were quantized; not to be read."""
    entries = {
        key: replace(entry, shape=layout.shape(checkpoint, key))
        for key, entry in checkpoint.entries.items()
        if key not in layout.companions
    }
    return replace(checkpoint, entries=entries)


def read_loras(
    checkpoint: Checkpoint, names: LayerNames, loras: Iterable[tuple[Path, float]]
) -> tuple[list[Adapters], list[str]]:
    """LoRA files for `quantized_source`, and sentences on them.

    Args:
        loras: files and their multipliers.

    Raises:
        CheckpointError: a file is no LoRA, or one for another model.
    """
    found: list[Adapters] = []
    told: list[str] = []
    layout = layout_of(checkpoint)
    shapes = stored_model(checkpoint, layout, {names.family: names}, names.family).shapes()
    for path, multiplier in loras:
        file = read_lora(path, [names], shapes=shapes)
        check_layers(file.layers, shapes, str(path))
        found.append((file.layers, multiplier))
        told.append(f"{path.name} is merged at {multiplier:g}, layers: {len(file.layers)}")
        told += [f"{path.name}: {remark}" for remark in file.remarks]
    return found, told


def quantized_source(
    checkpoint: Checkpoint,
    names: LayerNames,
    settings: QuantizationSettings | None,
    loras: Sequence[Adapters] = (),
    *,
    only_tensor_mode: bool = False,
) -> QuantizedSource:
    """Find out what becomes of the tensors of a model; reads nothing but headers.

    Args:
        settings: None leaves weights that are not quantized as they are.
        loras: whose shapes are those of the model.
        only_tensor_mode: codes of the file are only taken where they have a single scale.

    Raises:
        ConfigError: the settings do not go together, or patterns match nothing.
        CheckpointError: it is no model of the family, a weight cannot be read, or a LoRA is for
            another model.
    """
    layout = layout_of(checkpoint)
    for weight in layout.weights.values():
        if weight.refusal:
            raise CheckpointError(weight.refusal)
    model = stored_model(checkpoint, layout, {names.family: names}, names.family)
    merge = None
    if loras:
        for layers, _ in loras:
            check_layers(layers, model.layers)
        metadata = checkpoint.metadata
        merge = plan_merge(checkpoint, layout, model, loras, dtype=None, metadata=metadata)
    source = QuantizedSource(checkpoint, layout, model, settings, {}, merge)
    shapes, chosen = model.shapes(), set[str]()
    if settings is not None:
        check(settings)
        chosen = set(layers_to_quantize(shapes, names, exclude=settings.exclude))
    eight_bit: dict[str, EightBit] = {}
    for name in linears_of_blocks(shapes, names):
        for piece in model.layers[name].weight:
            way = _way(source, name, piece.key, name in chosen, only_tensor_mode)
            if way is not None:
                eight_bit[piece.key] = way
    return replace(source, eight_bit=eight_bit)


def remarks(source: QuantizedSource) -> list[str]:
    """Sentences on what the user may want to know before the tensors are read."""
    layout, prefix = source.layout, source.model.prefix
    found: list[str] = []
    kept = [way for way in source.eight_bit.values() if way.taken]
    if kept:
        found.append(
            f"{len(kept)} layers are in 8 bits in the file and are used as they are: "
            f"{layout.in_words()}"
        )
    casts = [
        key
        for key, each in layout.weights.items()
        if each.kind == "cast" and key.startswith(prefix)
    ]
    if casts:
        found.append(
            f"{len(casts)} tensors of the file were only cast to FP8, without scales: their errors "
            "are 3 % and more, and what was below 0.001 is gone; a bf16 or fp16 file is better"
        )
    restored = [key for key in layout.weights if key not in source.eight_bit]
    if restored := [key for key in restored if key not in casts and key.startswith(prefix)]:
        found.append(
            f"{len(restored)} quantized tensors of the file, such as {restored[0]}, are restored, "
            "because they cannot be computed with as they are"
        )
    return [*found, *fallbacks(list(source.eight_bit.values()))]


def fallbacks(ways: Sequence[EightBit]) -> list[str]:
    """A sentence for every kind of layer that could not be rounded in the mode asked for."""
    found: dict[tuple[str, str], list[EightBit]] = {}
    for way in ways:
        if way.asked:
            kind = re.sub(r"\.\d+\.", ".*.", way.layer, count=1)
            found.setdefault((kind, way.mode), []).append(way)
    units = {"channel": "a scale for each row", "tensor": "one scale"}
    return [
        f"{kind} ({len(each)}): {each[0].shape[1]} inputs cannot be divided into blocks of "
        f"{each[0].block_size}, so it has {units[mode]}"
        for (kind, mode), each in found.items()
    ]


def _way(
    source: QuantizedSource, layer: str, key: str, is_chosen: bool, only_tensor_mode: bool
) -> EightBit | None:
    """How a weight gets into 8 bits; None if it does not."""
    settings, layout = source.settings, source.layout
    shape = layout.shape(source.checkpoint, key)
    dtype = source.checkpoint.dtype(key)
    is_merged = source.merge is not None and key in source.merge.targets
    if layout.is_quantized(key):
        stored = layout.weights[key]
        own = _own_way(layer, stored)
        if own is not None and not is_merged and not (only_tensor_mode and own.mode != "tensor"):
            return own
        if not (settings and (is_chosen or only_tensor_mode)):
            return replace(own, taken=False) if own is not None else None
        # What it is computed in before it is rounded again.
        dtype = torch.float32
    elif not is_chosen:
        return None
    assert settings is not None
    wide = torch.float32 if dtype not in SMALLEST else dtype
    own_type = settings.compat or settings.scale_dtype == "weight"
    mode = mode_for(shape, settings.mode, settings.block_size)
    return EightBit(
        layer,
        shape,
        dtype,
        settings.format,
        mode,
        settings.block_size,
        wide if own_type else SCALE_DTYPES[settings.scale_dtype] or wide,
        asked=settings.mode if mode != settings.mode else "",
    )


def _own_way(layer: str, stored: StoredWeight) -> EightBit | None:
    """As a file has a weight; None if codes and scales are not all there is to it."""
    if stored.kind not in ("cast", "scaled", "mxfp8") or stored.rotation:
        return None
    format = FORMATS[stored.dtype]
    mode, block_size, scale_dtype = stored.mode, stored.block_size or 64, torch.float32
    if stored.kind == "mxfp8":
        mode, block_size = "block", 32
    elif stored.kind == "scaled" and stored.scale is not None and stored.scale.dtype in SMALLEST:
        scale_dtype = stored.scale.dtype
    return EightBit(
        layer, stored.shape, stored.dtype, format, mode, block_size, scale_dtype, taken=True
    )
