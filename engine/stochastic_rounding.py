"""Rounding to 8 bits up or down by chance, so that small changes of a weight survive on average.

A weight that was 8 bits wide before lies on a code already. Rounded to nearest, it falls back to
that code after every change that is smaller than half a step, and the change is lost. Here it
goes to one of the two next codes, with the probabilities that make the mean right. The error of
a single weight is larger for that, by a factor of the square root of 2 where errors are spread
evenly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import FORMATS, by_group
from .quantize import Quantized
from .weight_scales import SMALLEST

# Of float32, which is cut to the mantissa of the format.
_MANTISSA_BITS = 23
# Weights that are worked on at once, with about four temporaries of float32.
_CHUNK = 2**22


@torch.no_grad()
def round_stochastically(
    quantized: Quantized, weight: Tensor, *, generator: torch.Generator
) -> None:
    """Replace the codes by those of ``weight``, rounded by chance; the scales stay.

    Args:
        quantized: of the weight, as `quantize` makes it: its scales put no weight beyond the
            largest code.
        generator: on the device of the weight.
    """
    num_rows = weight.shape[0]
    step = max(1, _CHUNK * num_rows // max(1, weight.numel()))
    for first in range(0, num_rows, step):
        few = quantized.rows(first, first + step)
        values = weight[first : first + step].float()
        scale = few.scale.float().clamp(min=SMALLEST[torch.float32])
        quotient = by_group(values, few.scale) / scale
        few.codes.copy_(_rounded(quotient.view(values.shape), few.format, generator))


def _rounded(values: Tensor, format: str, generator: torch.Generator) -> Tensor:
    """Float32 values of the format, each the next one below or above."""
    largest = FORMATS[format].largest
    if format == "int8":
        chance = torch.rand(values.shape, generator=generator, device=values.device)
        return values.add(chance).floor_().clamp_(-largest, largest)
    cut = _MANTISSA_BITS - FORMATS[format].mantissa_bits
    smallest_normal = 2.0 ** (1 - FORMATS[format].exponent_bias)
    magnitude = values.abs().clamp_(max=largest)
    # Among the subnormal codes the steps are equal, as they are from the smallest normal number
    # to twice that; so they are rounded there.
    shift = (magnitude < smallest_normal) * smallest_normal
    bits = magnitude.add_(shift).view(torch.int32)
    bits += torch.randint(
        2**cut, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    bits &= -(2**cut)
    return bits.view(torch.float32).sub_(shift).copysign_(values)
