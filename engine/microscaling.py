"""Weights in blocks of 32 or 16 with tiny scales, and weights that were rotated first.

- MXFP8: e4m3 with one power of two for each 32 inputs (OCP Microscaling Formats 1.0, section 5)
- NVFP4: 4 bits (e2m1), one e4m3 scale for each 16 inputs, and one float32 scale for all
- ConvRot: groups of inputs multiplied by an orthogonal matrix before INT8

ComfyUI publishes files of all three. The scales lie in tiles of 128 x 4, as the tensor cores read
them (https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout).

Shapes: O out features, I in features, N blocks of a row, G inputs of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MXFP8_BLOCK, NVFP4_BLOCK = 32, 16
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_E8M0_BIAS = 127
_TILE_ROWS, _TILE_COLUMNS = 128, 4
# What the 4 bits of a code mean; the highest is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class NVFP4(NamedTuple):
    """``codes`` [O, I / 2] of uint8, the first input in the high bits.

    ``block_scale`` is e4m3 in tiles, ``scale`` a float32 number.
    """

    codes: Tensor
    block_scale: Tensor
    scale: Tensor


def tiled(scale_ON: Tensor) -> Tensor:
    """Scales as the tensor cores read them, padded with zeros to whole tiles."""
    num_rows, num_columns = scale_ON.shape
    bytes_ON = scale_ON.contiguous().view(torch.uint8)
    padding = (0, -num_columns % _TILE_COLUMNS, 0, -num_rows % _TILE_ROWS)
    padded = F.pad(bytes_ON, padding)
    # A tile is 128 rows = 4 groups of 32; a row of the tile holds one row of each group.
    tiles = padded.view(-1, 4, 32, padded.shape[1] // _TILE_COLUMNS, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(scale_ON.dtype)


def untiled(tiled_scale: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The inverse of `tiled`: scales [O, N]."""
    row_tiles = -(-num_rows // _TILE_ROWS)
    column_tiles = -(-num_columns // _TILE_COLUMNS)
    tiles = tiled_scale.contiguous().view(torch.uint8)
    tiles = tiles.view(row_tiles, column_tiles, 32, 4, _TILE_COLUMNS)
    rows = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * _TILE_ROWS, -1)
    return rows[:num_rows, :num_columns].contiguous().view(tiled_scale.dtype)


def powers_of_two(exponents: Tensor) -> Tensor:
    """What E8M0 codes (uint8) mean, as float32; 255 is NaN."""
    ones = torch.ones_like(exponents, dtype=torch.float32)
    values = torch.ldexp(ones, exponents.int() - _E8M0_BIAS)
    return values.masked_fill_(exponents == 255, torch.nan)


def mxfp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [O, I] and E8M0 scales [O, I / 32] as uint8.

    The scale is the smallest power of two that keeps the largest value of the block within e4m3;
    a block of zeros has the code 0.
    """
    blocks = weight_OI.float().unflatten(1, (-1, MXFP8_BLOCK))
    amax = blocks.abs().amax(dim=-1)
    mantissa, exponent = torch.frexp(amax / _E4M3_MAX)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponents = (exponent + _E8M0_BIAS).clamp_(0, 254)
    exponents = torch.where(amax == 0, 0, exponents).to(torch.uint8)
    codes = blocks / powers_of_two(exponents).unsqueeze(-1)
    return codes.clamp_(-_E4M3_MAX, _E4M3_MAX).flatten(1).to(torch.float8_e4m3fn), exponents


def nvfp4(weight_OI: Tensor) -> NVFP4:
    """A weight in 4 bits; I is a multiple of 16."""
    weight_OI = weight_OI.float()
    blocks = weight_OI.unflatten(1, (-1, NVFP4_BLOCK))
    amax = blocks.abs().amax(dim=-1)
    scale = amax.amax() / (_E4M3_MAX * _E2M1_MAX)
    relative = amax / _E2M1_MAX / scale.clamp(min=torch.finfo(torch.float32).tiny)
    block_scale = relative.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    unit = (block_scale.float() * scale).unsqueeze(-1)
    values = torch.where(unit == 0, 0, blocks / torch.where(unit == 0, 1, unit)).flatten(1)
    codes = _e2m1_codes(values)
    packed = (codes[:, ::2] << 4) | codes[:, 1::2]
    return NVFP4(packed, tiled(block_scale), scale)


def from_nvfp4(stored: NVFP4) -> Tensor:
    """The weight [O, I] in float32."""
    num_rows, num_inputs = stored.codes.shape[0], 2 * stored.codes.shape[1]
    codes = torch.stack([stored.codes >> 4, stored.codes & 15], dim=-1).flatten(1)
    levels = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    block_scale = stored.block_scale.view(torch.float8_e4m3fn)
    unit = untiled(block_scale, num_rows, num_inputs // NVFP4_BLOCK).float() * stored.scale.float()
    blocks = levels[codes.int()].unflatten(1, (-1, NVFP4_BLOCK))
    return blocks.mul_(unit.unsqueeze(-1)).flatten(1)


def rotated(weight_OI: Tensor, group_size: int) -> Tensor:
    """Every group of inputs times the regular Hadamard matrix of ConvRot, in float32.

    The matrix is symmetric and orthogonal, so that this is its own inverse.
    """
    matrix = _regular_hadamard(group_size, weight_OI.device)
    return (weight_OI.float().unflatten(1, (-1, group_size)) @ matrix).flatten(1)


def _regular_hadamard(size: int, device: torch.device) -> Tensor:
    """Kronecker powers of the one of size 4 whose rows all have the same sum.

    Raises:
        ValueError: ``size`` is no power of 4.
    """
    four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, four)
    if matrix.shape[0] != size:
        raise ValueError(f"{size} is no power of 4")
    return matrix / size**0.5


def _e2m1_codes(values: Tensor) -> Tensor:
    """4-bit codes of the nearest levels, ties to the level with an even code."""
    levels = torch.tensor(_E2M1, device=values.device)
    middles = (levels[:-1] + levels[1:]) / 2
    magnitude = values.abs()
    # A value in the middle goes up where the code above is even.
    below = torch.bucketize(magnitude, middles, right=False)
    above = torch.bucketize(magnitude, middles, right=True)
    codes = torch.where(below % 2 == 0, below, above).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)
