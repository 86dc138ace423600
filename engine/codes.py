"""The 8-bit number formats that weights are stored in, and the values of their codes.

FP8 as in Micikevicius et al. 2022 (arXiv:2209.05433). Shapes: R rows, C columns in N blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .workspace import Workspace


class Format(NamedTuple):
    """``largest`` is the largest finite value; INT8 has neither exponent nor mantissa."""

    dtype: torch.dtype
    largest: float
    exponent_bias: int = 0
    mantissa_bits: int = 0


FORMATS: dict[str, Format] = {
    "e4m3": Format(torch.float8_e4m3fn, 448.0, exponent_bias=7, mantissa_bits=3),
    "e5m2": Format(torch.float8_e5m2, 57344.0, exponent_bias=15, mantissa_bits=2),
    "int8": Format(torch.int8, 127.0),
}
# Of all seven bits of a code without its sign: from here on it is no finite number.
_FIRST_NOT_FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}
# Devices for which PyTorch's conversion is too slow.
_OWN_CONVERSION = ("cpu",)
# Of the exponent of float32 and bfloat16; and their mantissa bits, by type.
_BIAS = 127
_WIDER = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7)}


def format_of(codes: Tensor) -> str:
    """Which of `FORMATS` the codes are in.

    Raises:
        ValueError: none.
    """
    for name, format in FORMATS.items():
        if codes.dtype == format.dtype:
            return name
    raise ValueError(f"{codes.dtype} is none of {', '.join(FORMATS)}")


def encode(values: Tensor, codes: Tensor) -> None:
    """Fill ``codes`` with ``values`` rounded to nearest, even where halfway; spoils ``values``.

    Args:
        values: in float32, not beyond the largest of the format by more than 2^-8 of it, which
            every version of PyTorch rounds down.
    """
    if codes.dtype == torch.int8:
        values.round_()
    codes.copy_(values)


def decode(codes: Tensor, scale: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Fill ``out`` with ``code * scale``, computed in float32 and rounded once.

    Args:
        codes: [R, C] with ``scale`` [R, N, 1] for blocks or [R, 1]; of any shape with [].
        out: contiguous.
    """
    stored_in, scale = scale.dtype, scale.float()
    if out.device.type not in _OWN_CONVERSION:
        if codes.dtype == torch.int8:
            torch.mul(by_group(codes, scale), scale, out=by_group(out, scale))
        else:
            by_group(out.copy_(codes), scale).mul_(scale)
        return
    work = out
    # The product of two bfloat16 is rounded once in any case, and needs no second buffer.
    halves = codes.dtype != torch.int8 and out.dtype == stored_in == torch.bfloat16
    if out.dtype != torch.float32 and not halves:
        work = workspace.empty("decoded", out.shape, torch.float32, out.device)
    factor = _widen(codes, work) if scale.max() < 2**7 else _convert(codes, work)
    by_group(work, scale).mul_((scale * factor).to(work.dtype))
    if work is not out:
        out.copy_(work)


def are_finite(codes: Tensor) -> bool:
    """Whether none of the codes is NaN or infinite."""
    limit = _FIRST_NOT_FINITE.get(format_of(codes))
    if limit is None or not codes.numel():
        return True
    # Twenty times as fast as a comparison of each.
    return bool(codes.view(torch.int8).bitwise_and(0x7F).amax() < limit)


def by_group(values: Tensor, scale: Tensor) -> Tensor:
    """A view that the scale of its groups broadcasts to."""
    return values.unflatten(1, (scale.shape[1], -1)) if scale.dim() == 3 else values


def _convert(codes: Tensor, work: Tensor) -> float:
    work.copy_(codes)
    return 1.0


def _widen(codes: Tensor, work: Tensor) -> float:
    """Fill ``work`` with the values of finite codes; returns what they lack as a factor.

    PyTorch's conversion on a CPU does one code after the other. Here the bits are put where
    float32 or bfloat16 has them, which is exact, subnormals too: what is missing is the
    difference of the exponents' biases. Seven times as fast for E4M3. The factor must not make
    the scale infinite.
    """
    format = FORMATS[format_of(codes)]
    if codes.dtype == torch.int8:
        return _convert(codes, work)
    integers, mantissa_bits = _WIDER[work.dtype]
    shift = mantissa_bits - format.mantissa_bits
    # The sign bit fills everything above the code; all but one of them are cleared.
    mask = (0x7F << shift) - 2 ** (8 * work.element_size() - 1)
    work.view(integers).copy_(codes.view(torch.int8)).mul_(2**shift).bitwise_and_(mask)
    return 2.0 ** (_BIAS - format.exponent_bias)
