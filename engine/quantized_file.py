"""Writing a model in 8 bits to a file, tensor by tensor, under the names that it has already.

There are two layouts:

- "blockwise", which musubi-tuner and this package read: codes, and ``.scale_weight`` beside them
  in the shape of the groups
- "comfyui", which ComfyUI reads by itself: codes, one float32 ``.weight_scale``, and in
  ``.comfy_quant`` what they are. ``full_precision_matrix_mult`` has it compute in the type of the
  inputs, which it would round to 8 bits, too, otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .quantization_report import LayerReport, report_of
from .quantize import Quantized
from .quantized_layout import HEADER_FIELD, header_without
from .quantized_loading import EightBit, QuantizedSource
from .quantized_stream import stored_tensors
from .tensor_stream import TensorPlan, file_size, in_aligned_order, tensor_stream

LAYOUTS = ("blockwise", "comfyui")
# ComfyUI's names of the formats.
_COMFYUI: dict[str, dict[str, Any]] = {
    "e4m3": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    "e5m2": {"format": "float8_e5m2", "full_precision_matrix_mult": True},
    "int8": {"format": "int8_tensorwise"},
}


@dataclass(frozen=True)
class FilePlan:
    """What a file will hold; made by `plan_file`."""

    layout: str
    tensors: Mapping[str, TensorPlan]
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return file_size(self.tensors, self.metadata)


def plan_file(source: QuantizedSource, layout: str, metadata: Mapping[str, str]) -> FilePlan:
    """Find out what the file will hold.

    Args:
        source: with ``only_tensor_mode`` for "comfyui".
        layout: one of `LAYOUTS`.
        metadata: of the source and more; what it says of quantized layers is left out.

    Raises:
        ConfigError: there is no such layout.
        ValueError: a layer has more scales than the layout can express.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: {layout!r} is unknown; choose {' or '.join(LAYOUTS)}")
    plan: dict[str, TensorPlan] = {}
    for key in _keys(source):
        way = source.eight_bit.get(key)
        if way is None:
            shape = source.layout.shape(source.checkpoint, key)
            own = key.startswith(source.model.prefix)
            shape = shape if own else source.checkpoint.shape(key)
            plan[key] = TensorPlan(source.plain_dtype(key), shape)
        else:
            parts = _file_tensors(key, way, way.empty("meta"), layout)
            plan |= {
                name: TensorPlan(each.dtype, tuple(each.shape)) for name, each in parts.items()
            }
    rest = header_without(metadata, source.model.prefix)
    if layout == "blockwise":
        rest |= _marked(rest, [key.removesuffix(".weight") for key in source.eight_bit])
    return FilePlan(layout, in_aligned_order(plan), rest)


@torch.no_grad()
def write_file(
    source: QuantizedSource,
    plan: FilePlan,
    output: Path,
    *,
    device: torch.device | str = "cpu",
    measure: bool = False,
    on_written: Callable[[int], None] = lambda num_bytes: None,
) -> list[LayerReport]:
    """Write the file, which is whole or absent; gives what became of the layers in 8 bits.

    Args:
        device: where weights are rounded.
        measure: find the rounding errors.
        on_written: called with the number of bytes written so far.

    Raises:
        NotFiniteError: a weight has a value that is NaN or infinite.
    """
    reports: list[LayerReport] = []
    num_written = 0
    tensors = stored_tensors(source, _keys(source), dtype=None, device=device, measure=measure)
    with tensor_stream(output, plan.tensors, plan.metadata) as write, closing(tensors):
        for stored in tensors:
            parts: dict[str, Tensor]
            if isinstance(stored.value, Quantized):
                way = source.eight_bit[stored.key]
                parts = _file_tensors(stored.key, way, stored.value, plan.layout)
                reports.append(report_of(source, stored))
            else:
                parts = {stored.key: stored.value}
            for name, tensor in parts.items():
                write(name, tensor)
                num_written += plan.tensors[name].num_bytes
            on_written(num_written)
    return reports


def _marked(metadata: Mapping[str, str], layers: Sequence[str]) -> dict[str, str]:
    """The header with the layers as ComfyUI names quantized ones, but with no format it knows.

    Its loader refuses such a file in words; without them it would take the codes for weights.
    """
    field = json.loads(metadata.get(HEADER_FIELD, "{}"))
    known = field.get("layers", {})
    marked = {layer: {"scales": "scale_weight"} for layer in layers}
    return {HEADER_FIELD: json.dumps({**field, "layers": known | marked})}


def _keys(source: QuantizedSource) -> Iterator[str]:
    """What is written; of other models in the file also how they are quantized."""
    prefix = source.model.prefix
    for key in source.checkpoint.in_file_order():
        if key not in source.layout.companions or not key.startswith(prefix):
            yield key


def _file_tensors(key: str, way: EightBit, quantized: Quantized, layout: str) -> dict[str, Tensor]:
    """What is written for a weight in 8 bits; on the meta device without values."""
    layer = key.removesuffix(".weight")
    if layout == "blockwise":
        return {key: quantized.codes, f"{layer}.scale_weight": quantized.scale}
    if quantized.mode != "tensor":
        raise ValueError(f"{key} has a scale for each {quantized.mode}")
    words = json.dumps(_COMFYUI[way.format]).encode()
    config = torch.tensor(list(words), dtype=torch.uint8)
    return {
        key: quantized.codes,
        f"{layer}.weight_scale": quantized.scale.float(),
        f"{layer}.comfy_quant": config,
    }
