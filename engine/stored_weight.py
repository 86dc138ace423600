"""One weight as it lies in a file: how to get it from its codes and scales, and how to make those.

Shapes: O out features, I in features, N blocks of a row, K kernel of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .microscaling import (
    MXFP8_BLOCK,
    NVFP4,
    from_nvfp4,
    mxfp8,
    nvfp4,
    powers_of_two,
    rotated,
    tiled,
    untiled,
)
from .quantize import Quantized, dequantize, quantize

FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}

_NAN = 0x7F  # in e4m3 and in e5m2


@dataclass(frozen=True)
class StoredScale:
    """The tensor ``key``, of which another one is to be like in shape and type."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredWeight:
    """How one weight lies in a file.

    Args:
        kind: "cast", "scaled", "mxfp8", "nvfp4", "float" (an ordinary type beside a scale) or
            "refused".
        dtype: of the codes.
        shape: of the weight itself, [O, I, *K].
        scale: None for "cast".
        mode: of a "scaled" weight, as in `quantize`.
        block_size: inputs of one block.
        tensor_scale: the second one of "nvfp4".
        rotation: inputs of a group that was rotated; 0 for none.
        refusal: why it cannot be read; nothing if it can.
    """

    key: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: StoredScale | None = None
    mode: str = "tensor"
    block_size: int | None = None
    tensor_scale: StoredScale | None = None
    rotation: int = 0
    refusal: str = ""

    def scales(self) -> tuple[str, ...]:
        """Keys of its scales."""
        return tuple(each.key for each in (self.scale, self.tensor_scale) if each is not None)

    def in_words(self) -> str:
        """Such as "float8_e4m3fn, a scale for every 64 inputs"."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.kind != "scaled":
            return dtype if self.kind == "cast" else self.kind
        scales = {"tensor": "one scale", "channel": "a scale for every row"}
        words = scales.get(self.mode, f"a scale for every {self.block_size} inputs")
        return f"{dtype}{', rotated' if self.rotation else ''}, {words}"


def decoded(weight: StoredWeight, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The weight itself, [O, I, *K]; ``read`` gives the stored tensor of a key."""
    if weight.kind == "cast":
        return read(weight.key).to(dtype)
    if weight.kind == "nvfp4":
        assert weight.scale is not None and weight.tensor_scale is not None
        codes = read(weight.key).view(torch.uint8)
        scale = read(weight.tensor_scale.key).reshape(())
        return from_nvfp4(NVFP4(codes, read(weight.scale.key), scale)).to(dtype)
    if weight.kind == "float":
        assert weight.scale is not None
        scale = read(weight.scale.key).float()
        return _by_group(read(weight.key).float(), scale, weight).view(weight.shape).to(dtype)
    return from_codes(weight, codes_of(weight, read), dtype)


def from_codes(weight: StoredWeight, codes: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight itself, [O, I, *K], from what `codes_of` gave."""
    if not weight.rotation:
        return dequantize(codes, dtype).view(weight.shape)
    return rotated(dequantize(codes, torch.float32), weight.rotation).to(dtype)


def decoded_rows(
    weight: StoredWeight, read: Callable[[str], Tensor], num_values: int
) -> Iterator[tuple[slice, Tensor]]:
    """The weight in float32, about ``num_values`` at a time, and which rows they are."""
    num_rows = weight.shape[0] if weight.shape else 1
    if weight.kind in ("nvfp4", "float") or weight.rotation or len(weight.shape) < 2:
        yield slice(0, num_rows), decoded(weight, read, torch.float32)
        return
    found = codes_of(weight, read)
    step = max(1, num_values // found.codes.shape[1])
    for first in range(0, num_rows, step):
        part = found.rows(first, min(first + step, num_rows))
        # PyTorch's conversion keeps NaN, which `dequantize` does not look for.
        values = part.codes.float() if weight.kind == "cast" else dequantize(part)
        yield slice(first, first + len(values)), values.view(-1, *weight.shape[1:])


def codes_of(weight: StoredWeight, read: Callable[[str], Tensor]) -> Quantized:
    """Codes [O, I] and scales as they are; not for "nvfp4" and "float".

    None of what `quantize` gives is NaN; that of a file may be.
    """
    codes = read(weight.key)
    codes = codes.flatten(1) if codes.dim() > 1 else codes.unsqueeze(0)
    if weight.scale is None:
        return Quantized(codes, torch.ones(()), "tensor", None)
    scale = read(weight.scale.key)
    if weight.kind == "mxfp8":
        num_rows, num_inputs = weight.shape
        exponents = untiled(scale.view(torch.uint8), num_rows, num_inputs // MXFP8_BLOCK)
        return Quantized(codes, powers_of_two(exponents).unsqueeze(-1), "block", MXFP8_BLOCK)
    shapes = {"tensor": (), "channel": (-1, 1), "block": (codes.shape[0], -1, 1)}
    return Quantized(codes, scale.reshape(shapes[weight.mode]), weight.mode, weight.block_size)


def encoded(stored: StoredWeight, weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales of another weight, by their keys, in the way of ``stored``.

    Of a weight that is only cast, a value larger than FP8 has becomes NaN.

    Raises:
        ValueError: a value is NaN or infinite, or it has another shape.
    """
    if tuple(weight.shape) != stored.shape:
        raise ValueError(f"{stored.key} is {stored.shape}, not {tuple(weight.shape)}")
    if stored.kind == "cast":
        codes = weight.to(stored.dtype)
        limit = torch.finfo(stored.dtype).max
        if weight.numel() and max(-weight.min(), weight.max()) > limit:
            # PyTorch 2.13 has clipped them.
            codes.view(torch.uint8).masked_fill_(weight.abs() > limit, _NAN)
        return {stored.key: codes}
    assert stored.scale is not None
    flat_OI = weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(0)
    if stored.kind == "nvfp4":
        return _encode_nvfp4(stored, flat_OI)
    if stored.kind == "mxfp8":
        codes, exponents = mxfp8(flat_OI)
        scale = tiled(exponents).view(stored.scale.dtype)
    elif stored.kind == "float":
        codes = flat_OI
        scale = torch.ones(stored.scale.shape, dtype=stored.scale.dtype)
    else:
        codes, scale = _quantize_as(stored, flat_OI)
    return {
        stored.key: codes.view(stored.shape).to(stored.dtype),
        stored.scale.key: scale.view(stored.scale.shape),
    }


def _by_group(values: Tensor, scale: Tensor, weight: StoredWeight) -> Tensor:
    """Values of an ordinary type that have scales all the same."""
    if weight.mode == "tensor":
        return values * scale.reshape(())
    groups = values.reshape(scale.shape[0], -1, weight.block_size or values[0].numel())
    return groups * scale.view(scale.shape[0], -1, 1)


def _encode_nvfp4(stored: StoredWeight, weight_OI: Tensor) -> dict[str, Tensor]:
    assert stored.scale is not None and stored.tensor_scale is not None
    codes, block_scale, scale = nvfp4(weight_OI)
    return {
        stored.key: codes.view(stored.dtype),
        stored.scale.key: block_scale.view(stored.scale.dtype).view(stored.scale.shape),
        stored.tensor_scale.key: scale.to(stored.tensor_scale.dtype).view(
            stored.tensor_scale.shape
        ),
    }


def _quantize_as(stored: StoredWeight, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    assert stored.scale is not None
    if stored.rotation:
        weight_OI = rotated(weight_OI, stored.rotation)
    found = quantize(
        weight_OI,
        format=FORMATS[stored.dtype],
        mode=stored.mode,
        block_size=stored.block_size or 64,
        scale_dtype=stored.scale.dtype,
    )
    return found.codes, found.scale
