"""Which scale a group of weights gets before it is rounded to 8 bits.

Shapes: G groups and n weights in each, S scales that are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import FORMATS, Format, decode, encode, format_of
from .workspace import Workspace

# Smallest scales of the types that they are stored in: the smallest normal numbers, but of
# float16, whose range is short, the smallest of all.
SMALLEST: dict[torch.dtype, float] = {
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
}
# A scale that was rounded down by less makes no code larger than the largest.
_SLACK = 1 + 2**-8
# Scales that a search tries, in relation to the smallest that does not clip. The errors of a
# floating-point code repeat with every doubling, so one octave has them all; it is the one
# above, for below it the largest weights would be clipped.
_SEARCHED = tuple(1 + step / 8 for step in range(8))


class ScaleRule(NamedTuple):
    """How the scale of a group comes from the largest magnitude in it."""

    format: Format
    dtype: torch.dtype
    search: bool
    compat: bool


def group_scale(pieces: Sequence[Tensor], rule: ScaleRule, workspace: Workspace) -> Tensor:
    """[G, 1] in the type that is stored; a group is made of the rows [G, n] of all pieces."""
    largest_G1 = reduce(torch.maximum, (largest(piece, workspace) for piece in pieces))
    if rule.search:
        return _searched(pieces, _exact(largest_G1, rule), rule, workspace)
    return scale_of_largest(largest_G1, rule)


def scale_of_largest(largest_G1: Tensor, rule: ScaleRule) -> Tensor:
    """[G, 1] in the type that is stored, where nothing is searched for."""
    exact_G1 = _exact(largest_G1, rule)
    if rule.compat:
        return exact_G1.to(rule.dtype).clamp_(min=1e-8)
    return _stored(exact_G1, rule.dtype)


def encode_groups(
    values_Gn: Tensor, scale_G1: Tensor, codes_Gn: Tensor, workspace: Workspace
) -> None:
    """Fill ``codes_Gn`` with the values over their scale, rounded."""
    quotient_Gn = workspace.empty("quotient", values_Gn.shape, torch.float32, values_Gn.device)
    # Only `compat` has scales of 0, or that were rounded down so far that codes are exceeded.
    divisor_G1 = scale_G1.float().clamp(min=SMALLEST[torch.float32])
    if values_Gn.dtype == torch.float32:
        torch.div(values_Gn, divisor_G1, out=quotient_Gn)
    else:
        # At once, with operands of two types, PyTorch is slower.
        quotient_Gn.copy_(values_Gn).div_(divisor_G1)
    if scale_G1.dtype == torch.float16:
        largest = FORMATS[format_of(codes_Gn)].largest
        quotient_Gn.clamp_(-largest, largest)
        # Where the scale is 0 even -0 becomes 0, as what replaces NaN there.
        quotient_Gn.masked_fill_((scale_G1 == 0) & (values_Gn == 0), 0.0)
    encode(quotient_Gn, codes_Gn)


def largest(values_Gn: Tensor, workspace: Workspace) -> Tensor:
    """Largest magnitudes [G, 1] in float32; NaN where there is one.

    Without the sign, floating-point numbers are in the order of their bits, and PyTorch finds
    the largest integer five times as fast as the largest bfloat16. NaN is larger than infinity.
    """
    if values_Gn.dtype == torch.float64:
        values_Gn = values_Gn.float()
    integers = torch.int32 if values_Gn.element_size() > 2 else torch.int16
    bits_Gn = workspace.empty("bits", values_Gn.shape, integers, values_Gn.device)
    mask = 2 ** (8 * values_Gn.element_size() - 1) - 1
    torch.bitwise_and(values_Gn.view(bits_Gn.dtype), mask, out=bits_Gn)
    return bits_Gn.amax(1, keepdim=True).view(values_Gn.dtype).float()


def _exact(largest_G1: Tensor, rule: ScaleRule) -> Tensor:
    # By a number, a GPU multiplies with the reciprocal, which can give another result.
    return largest_G1 / torch.full_like(largest_G1, rule.format.largest)


def _stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to nearest, but up where the largest code would be exceeded too far.

    That is among the smallest of float16. No scale is 0, so that zeros can be divided by it.
    """
    scale = exact.clamp(min=SMALLEST[dtype]).to(dtype)
    if dtype == torch.float16:
        too_small = scale.float() * _SLACK < exact
        scale.view(torch.int16).add_(too_small.to(torch.int16))
    return scale


def _searched(
    pieces: Sequence[Tensor], exact_G1: Tensor, rule: ScaleRule, workspace: Workspace
) -> Tensor:
    scales_SG1 = torch.stack([_stored(exact_G1 * factor, rule.dtype) for factor in _SEARCHED])
    errors_SG1 = torch.zeros(scales_SG1.shape, dtype=torch.float64, device=exact_G1.device)
    for piece_Gn in pieces:
        values_Gn = piece_Gn.float()
        codes_Gn = torch.empty_like(values_Gn, dtype=rule.format.dtype)
        restored_Gn = torch.empty_like(values_Gn)
        for scale_G1, error_G1 in zip(scales_SG1, errors_SG1, strict=True):
            encode_groups(values_Gn, scale_G1, codes_Gn, workspace)
            decode(codes_Gn, scale_G1, restored_Gn, workspace)
            error_G1 += restored_Gn.sub_(values_Gn).square_().sum(1, keepdim=True)
    return scales_SG1.gather(0, errors_SG1.argmin(0, keepdim=True)).squeeze(0)
