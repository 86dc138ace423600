"""Weights in 8 bits: FP8 (E4M3 or E5M2) or INT8 codes, and a scale for each group of weights.

A weight is ``code * scale``. A group is a block of consecutive input features of one row, a whole
row or the whole tensor. FP8 as in Micikevicius et al. 2022 (arXiv:2209.05433).

Shapes: O out features, I in features, N blocks in a row, K block size (I = N * K), G groups and
n weights in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import weight_scales
from .codes import FORMATS, are_finite, by_group, decode, format_of
from .weight_scales import ScaleRule, encode_groups, group_scale, largest, scale_of_largest
from .workspace import Workspace

MODES = ("block", "channel", "tensor")
# Weights that are worked on at once: what they need stays in the cache of one core, and under
# 32 MiB on a GPU, where few large kernels are better.
_CHUNK_CPU = 2**18
_CHUNK_GPU = 2**21


@dataclass(frozen=True)
class Quantized:
    """A weight in 8 bits; ``codes`` have its shape.

    ``scale`` is [O, N, 1] in mode "block", [O, 1] in "channel", [] in "tensor". ``block_size``
    is None but in mode "block".
    """

    codes: Tensor
    scale: Tensor
    mode: str
    block_size: int | None = None

    @property
    def format(self) -> str:
        """One of `FORMATS`."""
        return format_of(self.codes)

    @property
    def num_bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def rows(self, first: int, end: int) -> Quantized:
        """Views of rows ``first`` to ``end``."""
        scale = self.scale if self.mode == "tensor" else self.scale[first:end]
        return replace(self, codes=self.codes[first:end], scale=scale)

    def columns(self, first: int, end: int) -> Quantized:
        """Views of input features ``first`` to ``end``, which must not cut a block.

        Raises:
            ValueError: they do.
        """
        scale = self.scale
        if self.block_size is not None:
            if first % self.block_size or end % self.block_size:
                raise ValueError(f"columns {first} to {end} cut a block of {self.block_size}")
            scale = scale[:, first // self.block_size : end // self.block_size]
        return replace(self, codes=self.codes[:, first:end], scale=scale)


def mode_for(shape: Sequence[int], mode: str, block_size: int = 64) -> str:
    """The mode that a weight of ``shape`` gets when ``mode`` is asked for.

    Blocks that do not divide the rows become whole rows; what has no rows gets one scale.

    Raises:
        ValueError: there is no such mode or block size.
    """
    if mode not in MODES or block_size < 1:
        raise ValueError(f"mode={mode!r}, block_size={block_size}: modes are {', '.join(MODES)}")
    if len(shape) != 2:
        return "tensor"
    if mode == "block" and shape[1] % block_size:
        return "channel"
    return mode


def empty(
    shape: Sequence[int],
    *,
    format: str = "e4m3",
    mode: str = "block",
    block_size: int = 64,
    scale_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Quantized:
    """What `quantize` would give, without values; to be filled from a file."""
    mode = mode_for(shape, mode, block_size)
    scale_shape: tuple[int, ...] = ()
    if mode != "tensor":
        scale_shape = (shape[0], shape[1] // block_size, 1) if mode == "block" else (shape[0], 1)
    return Quantized(
        torch.empty(tuple(shape), dtype=FORMATS[format].dtype, device=device),
        torch.empty(scale_shape, dtype=scale_dtype, device=device),
        mode,
        block_size if mode == "block" else None,
    )


@torch.no_grad()
def quantize(
    weight_OI: Tensor,
    *,
    format: str = "e4m3",
    mode: str = "block",
    block_size: int = 64,
    scale_dtype: torch.dtype | None = None,
    search: bool = False,
    compat: bool = False,
) -> Quantized:
    """Round a weight to 8 bits; the mode is that of `mode_for`.

    Each scale puts the largest magnitude of its group on the largest code. It is the *stored*
    scale that codes are rounded with, so its own rounding costs next to nothing: relative errors
    of normal weights in blocks of 64 are 2.504 % (E4M3) with scales in float32, 2.505 % in
    bfloat16, and 2.509 % if they were rounded up so that nothing exceeds the largest code. The
    error of a weight is at most 1/16 of it (E5M2: 1/8; INT8: half its scale) or half a subnormal
    step. A group of zeros stays exactly zero.

    Args:
        weight_OI: of any floating-point type; weights that are not matrices may have any shape.
        scale_dtype: float32 (the same as None), bfloat16 or float16.
        search: take the scale of the smallest squared error among eight. Relative errors become
            about an eighth smaller in blocks of FP8, next to nothing otherwise; it takes twelve
            times as long.
        compat: compute scales as musubi-tuner does, in the weight's own type, which they are
            stored in, and not below 1e-8. In float16 groups of small weights are lost.

    Raises:
        ValueError: there are NaN or infinities among the weights, or the options do not go
            together.
    """
    if not weight_OI.is_floating_point() or weight_OI.element_size() < 2 or not weight_OI.dim():
        raise ValueError(f"a {weight_OI.dim()}-D weight of {weight_OI.dtype} cannot be quantized")
    if compat and (search or scale_dtype is not None or format == "int8"):
        raise ValueError("compat leaves the scales no choice, and has no int8")
    scale_dtype = scale_dtype or (weight_OI.dtype if compat else torch.float32)
    if scale_dtype not in weight_scales.SMALLEST:
        raise ValueError(f"scales cannot be stored in {scale_dtype}")
    result = empty(
        weight_OI.shape,
        format=format,
        mode=mode,
        block_size=block_size,
        scale_dtype=scale_dtype,
        device=weight_OI.device,
    )
    quantize_into(result, weight_OI, search=search, compat=compat)
    return result


@torch.no_grad()
def quantize_into(
    result: Quantized,
    weight_OI: Tensor,
    *,
    search: bool = False,
    compat: bool = False,
    workspace: Workspace | None = None,
) -> None:
    """Fill what `empty` made for a weight of this shape, or some of its rows; see `quantize`.

    Args:
        result: its fields say format and mode; with ``compat`` its scales are of the weight's type.
        workspace: for whoever calls this often on a CPU.

    Raises:
        ValueError: there are NaN or infinities among the weights.
    """
    if weight_OI.is_meta or not weight_OI.numel():
        return
    rule = ScaleRule(FORMATS[result.format], result.scale.dtype, search=search, compat=compat)
    workspace = workspace or Workspace()
    if result.mode == "tensor":
        parts = list(_row_slices(weight_OI))
        scale_G1 = group_scale([weight_OI[part].reshape(1, -1) for part in parts], rule, workspace)
        result.scale.copy_(scale_G1.view(()))
        for part in parts:
            codes_Gn = result.codes[part].view(1, -1)
            encode_groups(weight_OI[part].reshape(1, -1), scale_G1, codes_Gn, workspace)
    else:
        group_size = result.block_size or weight_OI.shape[1]
        parts = [(weight_OI[part].reshape(-1, group_size), part) for part in _row_slices(weight_OI)]
        if search:
            scales = [group_scale([values_Gn], rule, workspace) for values_Gn, _ in parts]
            scale_G1 = torch.cat(scales)
        else:
            # All at once: most of the time of such small tensors is that of the calls.
            largest_G1 = torch.cat([largest(values_Gn, workspace) for values_Gn, _ in parts])
            scale_G1 = scale_of_largest(largest_G1, rule)
        result.scale.copy_(scale_G1.view(result.scale.shape))
        for values_Gn, part in parts:
            codes_Gn = result.codes[part].view(-1, group_size)
            encode_groups(values_Gn, result.scale[part].view(-1, 1), codes_Gn, workspace)
    # NaN and infinity among the weights are still there in the scales.
    if not result.scale.isfinite().all():
        raise ValueError("the weight has values that are NaN or infinite")


def dequantize(
    quantized: Quantized,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The weight, ``code * scale`` computed in float32 and rounded to ``dtype`` once.

    Args:
        out: contiguous, of the shape of the codes and of type ``dtype``; the result is put there.
        workspace: for whoever calls this often on a CPU; the result is not in it.
    """
    codes = quantized.codes
    if torch.compiler.is_compiling():
        # The compiler makes one pass of it, and must not see views of other types.
        weight = by_group(codes.float(), quantized.scale) * quantized.scale
        return weight.view(codes.shape).to(dtype)
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    workspace = workspace or Workspace()
    if out.device.type != "cpu":
        # It takes no memory beside the result, and the fewer kernels the better.
        decode(codes, quantized.scale, out, workspace)
        return out
    for part in _row_slices(codes):
        few = quantized.rows(part.start, part.stop)
        decode(few.codes, few.scale, out[part], workspace)
    return out


@torch.no_grad()
def relative_error(weight_OI: Tensor, quantized: Quantized) -> float:
    """Root of the mean squared error over that of the weight's square; 0 for a weight of zeros."""
    error = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
    total = torch.zeros_like(error)
    for part in _row_slices(weight_OI):
        values = weight_OI[part].float()
        restored = dequantize(quantized.rows(part.start, part.stop)).to(values.device)
        error += (restored - values).square().sum(dtype=torch.float64)
        total += values.square().sum(dtype=torch.float64)
    return math.sqrt(float(error / total)) if total else 0.0


def all_finite(quantized: Quantized) -> bool:
    """Whether no weight is NaN or infinite; `quantize` makes none, a file may have some."""
    few = (quantized.codes[part] for part in _row_slices(quantized.codes))
    return bool(quantized.scale.isfinite().all()) and all(map(are_finite, few))


def _row_slices(tensor: Tensor) -> Iterator[slice]:
    chunk = _CHUNK_CPU if tensor.device.type == "cpu" else _CHUNK_GPU
    num_rows = tensor.shape[0]
    step = max(1, chunk * num_rows // max(1, tensor.numel()))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
