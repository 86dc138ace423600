"""How the weights of a model on disk are quantized, whoever wrote the file.

A quantized weight is stored as codes beside one or more scales. This module finds out how, gives
the weight itself, and stores another weight in the same way. Known are:

- FP8 (e4m3, e5m2) and INT8 codes with one scale for the tensor, for each row or for each block of
  inputs of a row: ``.scale_weight`` (musubi-tuner; ComfyUI with a ``scaled_fp8`` marker) or
  ``.weight_scale`` (ComfyUI, with a ``.comfy_quant`` tensor or ``_quantization_metadata`` in the
  header)
- ComfyUI's ``mxfp8``, ``nvfp4`` and rotated INT8 (`microscaling`)
- tensors that were only cast to FP8

Shapes: O out features, I in features, N blocks of a row, K kernel of a convolution.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .microscaling import MXFP8_BLOCK, NVFP4_BLOCK
from .quantize import Quantized, all_finite
from .stored_weight import (
    FORMATS,
    StoredScale,
    StoredWeight,
    codes_of,
    decoded,
    decoded_rows,
    encoded,
    from_codes,
)
from .weights import Checkpoint

HEADER_FIELD = "_quantization_metadata"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_CONFIG = ".comfy_quant"
_SCALES = (".scale_weight", ".weight_scale")
# What else stands beside a quantized weight: scales of activations, the second scale of NVFP4.
_BESIDE = (*_SCALES, ".scale_input", ".input_scale", ".weight_scale_2", _CONFIG)
_MARKER = "scaled_fp8"
# Last parts of names in files of others, and who writes them.
_FOREIGN = {
    "qweight": "GPTQ, AWQ or Nunchaku",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_scale_inv": "scales for tiles of 128 x 128",
    "pre_quant_scale": "scales for the inputs",
}
_COMFYUI_INT8 = "int8_tensorwise"
# ComfyUI's names of what can be read; a layer of another program has none.
_COMFYUI = ("", "float8_e4m3fn", "float8_e5m2", _COMFYUI_INT8, "mxfp8", "nvfp4")
# Inputs of a block, and types that the codes may have.
_TILED = {
    "mxfp8": (MXFP8_BLOCK, (torch.float8_e4m3fn,)),
    "nvfp4": (NVFP4_BLOCK, (torch.uint8, torch.int8)),
}
_DEFAULT_ROTATION = 256


@dataclass(frozen=True)
class QuantizedLayout:
    """The quantized weights of a checkpoint, by key.

    ``companions`` are the keys of all tensors that only say how weights are stored.
    """

    weights: Mapping[str, StoredWeight]
    companions: frozenset[str]

    def is_quantized(self, key: str) -> bool:
        """Whether the tensor ``key`` holds codes (or values cast to FP8)."""
        return key in self.weights

    def in_words(self) -> str:
        """What most weights are stored as; nothing if none is quantized."""
        kinds = Counter(weight.in_words() for weight in self.weights.values())
        return "; ".join(f"{words} ({count} tensors)" for words, count in kinds.most_common())

    def shape(self, checkpoint: Checkpoint, key: str) -> tuple[int, ...]:
        """Of the weight itself, which may not be that of its codes."""
        return self.weights[key].shape if key in self.weights else checkpoint.shape(key)

    def read(self, checkpoint: Checkpoint, key: str, dtype: torch.dtype) -> Tensor:
        """The weight itself, on the CPU; also of tensors that are not quantized.

        Raises:
            CheckpointError: it is quantized in a way that cannot be read, or a code or scale is
                NaN or infinite.
        """
        weight = self.weights.get(key)
        if weight is None or weight.kind == "cast":
            return checkpoint.read(key, dtype)
        if _readable(weight).kind in ("nvfp4", "float"):
            return decoded(weight, checkpoint.read, dtype)
        return from_codes(weight, _finite_codes(weight, checkpoint), dtype)

    def decode(self, key: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight that `encode` gave these tensors for, as far as they can express it."""
        return decoded(self.weights[key], tensors.__getitem__, dtype)

    def decode_rows(
        self, key: str, tensors: Mapping[str, Tensor], num_values: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `decode` in float32, a few rows at a time where they can be had."""
        return decoded_rows(self.weights[key], tensors.__getitem__, num_values)

    def quantized(self, checkpoint: Checkpoint, key: str) -> Quantized | None:
        """Codes [O, I] and scales as they are; None where that is not all there is to it.

        A convolution's kernel is flattened into I. NVFP4 and rotated weights are None.

        Raises:
            CheckpointError: it is quantized in a way that cannot be read, or a code or scale is
                NaN or infinite.
        """
        weight = _readable(self.weights[key])
        if weight.kind in ("nvfp4", "float") or weight.rotation:
            return None
        return _finite_codes(weight, checkpoint)

    def encode(self, key: str, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales of another weight, by their keys, as those in the file are stored.

        The scales are found anew; that of a weight that was only cast stays 1.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        stored = self.weights[key]
        if stored.refusal:
            raise ValueError(stored.refusal)
        return encoded(stored, weight)


def layout_of(checkpoint: Checkpoint) -> QuantizedLayout:
    """Find how the weights of a checkpoint are stored; reads little more than the header.

    Raises:
        CheckpointError: they are quantized by a tool whose files cannot be read, or scales do not
            fit their weights.
    """
    configs = _comfyui_configs(checkpoint)
    weights: dict[str, StoredWeight] = {}
    for key, entry in checkpoint.entries.items():
        if key.endswith(_BESIDE) or _is_marker(key):
            continue
        if key.endswith(".qweight"):
            raise CheckpointError(
                f"{checkpoint.paths[0]}: the weights are quantized by {_FOREIGN['qweight']} "
                f"({key}), which cannot be read; use a bf16, fp16, fp32 or FP8 file"
            )
        layer = key.removesuffix(".weight") if key.endswith(".weight") else None
        weight = None
        if layer is not None:
            weight = _stored_weight(checkpoint, layer, configs.get(layer, {}))
        if weight is None and entry.dtype in _FP8:
            weight = StoredWeight(key, "cast", entry.dtype, entry.shape)
        if weight is not None:
            weights[key] = weight
    companions = {key for key in checkpoint.entries if key.endswith(_BESIDE) or _is_marker(key)}
    return QuantizedLayout(weights, frozenset(companions))


def header_without(metadata: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The header's fields for a file whose layers that begin with ``prefix`` are not quantized."""
    rest = dict(metadata)
    field = _json(rest.pop(HEADER_FIELD, "{}"))
    layers = field.get("layers", {})
    layers = layers if isinstance(layers, dict) else {}
    kept = {name: value for name, value in layers.items() if not name.startswith(prefix)}
    if kept:
        rest[HEADER_FIELD] = json.dumps({**field, "layers": kept})
    return rest


def _stored_weight(
    checkpoint: Checkpoint, layer: str, config: Mapping[str, Any]
) -> StoredWeight | None:
    """How the weight of a layer is stored; None if it has no scale."""
    key = f"{layer}.weight"
    entry = checkpoint.entries[key]
    scales = [f"{layer}{ending}" for ending in _SCALES if f"{layer}{ending}" in checkpoint.entries]
    name = str(config.get("format", ""))
    rotation = _rotation(config)
    found = _foreign(checkpoint, layer) or _unknown(entry.dtype, name, has_scale=bool(scales))
    if not found and rotation and not _can_rotate(rotation, entry.shape):
        found = f"with inputs rotated in groups of {rotation}"
    if found:
        refusal = (
            f"{entry.path}: {key} is stored {found}, which cannot be read; "
            "use a bf16, fp16, fp32 or FP8 file"
        )
        return StoredWeight(key, "refused", entry.dtype, entry.shape, refusal=refusal)
    if not scales:
        return None
    scale = _scale(checkpoint, scales[0])
    if name in _TILED:
        return _tiled_weight(checkpoint, layer, scale, name)
    kind = "scaled" if entry.dtype in FORMATS else "float"
    mode, block_size = _mode(checkpoint, key, scale)
    return StoredWeight(
        key, kind, entry.dtype, entry.shape, scale, mode, block_size, rotation=rotation
    )


def _tiled_weight(
    checkpoint: Checkpoint, layer: str, scale: StoredScale, kind: str
) -> StoredWeight:
    """A weight of ComfyUI whose scales lie in tiles of 128 x 4; there are as many as they need."""
    entry = checkpoint.entries[f"{layer}.weight"]
    second = f"{layer}.weight_scale_2"
    block_size, dtypes = _TILED[kind]
    num_rows, num_inputs = entry.shape if len(entry.shape) == 2 else (1, 1)
    tensor_scale = None
    if kind == "nvfp4":
        num_inputs *= 2
        tensor_scale = _scale(checkpoint, second) if second in checkpoint.entries else None
    expected = -(-num_rows // 128) * 128 * -(-num_inputs // (4 * block_size)) * 4
    fits = (
        entry.dtype in dtypes
        and num_inputs % block_size == 0
        and torch.Size(scale.shape).numel() == expected
        and scale.dtype.itemsize == 1
        and (kind != "nvfp4" or (tensor_scale and torch.Size(tensor_scale.shape).numel() == 1))
    )
    if not fits:
        raise CheckpointError(
            f"{entry.path}: {scale.key} has the shape {list(scale.shape)}, which does not fit "
            f"{kind} codes of {list(entry.shape)}; get the file again"
        )
    shape = (num_rows, num_inputs)
    return StoredWeight(
        f"{layer}.weight", kind, entry.dtype, shape, scale, tensor_scale=tensor_scale
    )


def _unknown(dtype: torch.dtype, name: str, *, has_scale: bool) -> str:
    """What it is about a weight that cannot be read; nothing if it can.

    Args:
        dtype: of the codes.
        name: that ComfyUI has for their format; nothing in other files.
    """
    if name not in _COMFYUI:
        return f"as {name}"
    if not has_scale:
        # ComfyUI takes FP8 without a scale for numbers of their own value.
        if dtype in _FP8 or (dtype.is_floating_point and not name):
            return ""
        return f"as {name or _in_words(dtype)} without scale"
    known = dtype in FORMATS or dtype.is_floating_point or name in _TILED
    return "" if known else f"as {_in_words(dtype)}"


def _foreign(checkpoint: Checkpoint, layer: str) -> str:
    """Whose way of quantizing a layer is that cannot be read; nothing if it can."""
    for ending, whose in _FOREIGN.items():
        for name in (f"{layer}.{ending}", f"{layer}.weight.{ending}"):
            if name in checkpoint.entries:
                return f"with {whose}"
    return ""


def _mode(checkpoint: Checkpoint, key: str, scale: StoredScale) -> tuple[str, int | None]:
    """What each scale is for, which its shape tells."""
    shape = checkpoint.shape(key)
    sizes = [size for size in scale.shape[1:] if size != 1]
    if torch.Size(scale.shape).numel() == 1:
        return "tensor", None
    if len(shape) > 1 and scale.shape[0] == shape[0] and not sizes:
        return "channel", None
    if len(shape) == 2 and scale.shape[0] == shape[0] and len(sizes) == 1:
        num_blocks = scale.shape[1]
        if sizes[0] == num_blocks and shape[1] % num_blocks == 0:
            return "block", shape[1] // num_blocks
    raise CheckpointError(
        f"{checkpoint.entries[key].path}: {scale.key} has the shape {list(scale.shape)}, which "
        f"does not fit the weight of {list(shape)}; get the file again"
    )


def _rotation(config: Mapping[str, Any]) -> int:
    """Inputs of a group that was rotated; 0 for none."""
    inner = config.get("params")
    params = {**(inner if isinstance(inner, dict) else {}), **config}
    if config.get("format") != _COMFYUI_INT8 or not params.get("convrot", False):
        return 0
    size = params.get("convrot_groupsize", _DEFAULT_ROTATION)
    return size if isinstance(size, int) else -1


def _can_rotate(size: int, shape: tuple[int, ...]) -> bool:
    """Whether there is such a rotation of the inputs of a weight."""
    return len(shape) == 2 and size in (4**n for n in range(1, 9)) and shape[1] % size == 0


def _finite_codes(weight: StoredWeight, checkpoint: Checkpoint) -> Quantized:
    found = codes_of(weight, checkpoint.read)
    if not all_finite(found):
        raise CheckpointError(
            f"{checkpoint.entries[weight.key].path}: {weight.key} or its scale holds NaN or "
            "infinity; get the file again"
        )
    return found


def _readable(weight: StoredWeight) -> StoredWeight:
    if weight.refusal:
        raise CheckpointError(weight.refusal)
    return weight


def _in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scale(checkpoint: Checkpoint, key: str) -> StoredScale:
    return StoredScale(key, checkpoint.shape(key), checkpoint.dtype(key))


def _is_marker(key: str) -> bool:
    return key.rpartition(".")[2] == _MARKER


def _comfyui_configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What ComfyUI's files say of each quantized layer."""
    layers = _json(checkpoint.metadata.get(HEADER_FIELD, "{}")).get("layers", {})
    configs = dict(layers) if isinstance(layers, dict) else {}
    for key, entry in checkpoint.entries.items():
        if key.endswith(_CONFIG):
            config = _json(bytes(checkpoint.read(key).flatten().view(torch.uint8).tolist()))
            if not config:
                raise CheckpointError(
                    f"{entry.path}: {key} is not readable JSON; get the file again"
                )
            configs[key.removesuffix(_CONFIG)] = config
    return {name: config for name, config in configs.items() if isinstance(config, dict)}


def _json(text: str | bytes) -> dict[str, Any]:
    """The object that a text is; empty if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
