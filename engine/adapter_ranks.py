"""Adapters of one layer as matrices of low rank: their sum, their best approximation, its error.

A convolution's weight counts as the matrix [O, J], J = I times the kernel.

Shapes: O out features, I in features, J columns, R rank, K kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
    as_lora,
    converted,
    delta,
)
from .low_rank import (
    Decomposition,
    LowRank,
    decompose,
    decompose_kronecker,
    decompose_product,
    product_squared_norm,
    squared_error,
    squared_norm,
)

# A sketch of the whole matrix is cheaper than a product of a larger rank than this.
_LARGE_RANK = 256
_EXACT_BELOW = 256

Weighted = tuple[AdapterWeights, float]


def is_matrix(adapter: AdapterWeights) -> bool:
    """Whether it changes a weight that has rows and columns, not only a bias or a scale."""
    return adapter.shape is not None and len(adapter.shape) > 1


def factors(adapter: LoRAWeights, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``up`` [O, R] with the scale in it, and ``down`` [R, J]."""
    return adapter.up.to(dtype) * adapter.scale, adapter.down.to(dtype).flatten(1)


def decomposed(
    adapter: AdapterWeights, *, limit: int | None, generator: torch.Generator
) -> Decomposition:
    """The singular values of what an adapter without a magnitude adds to a weight.

    Complete for a LoRA, and for others where that is cheap or ``limit`` is None; otherwise the
    ``limit`` largest.

    Args:
        generator: for a sketch; see `low_rank.decompose`.
    """
    if isinstance(adapter, LoRAWeights):
        return decompose_product(*factors(adapter))
    if isinstance(adapter, LoKrWeights):
        parts = [_decomposed_factor(part) for part in (adapter.w1, adapter.w2)]
        found = decompose_kronecker(*parts, limit=limit)
        return replace(
            found,
            left_OR=found.left_OR * math.copysign(1.0, adapter.scale),
            singular_R=found.singular_R * abs(adapter.scale),
            rest=found.rest * adapter.scale**2,
        )
    matrix_rank = min(adapter.shape[0], math.prod(adapter.shape[1:])) if adapter.shape else 0
    cheap = min(matrix_rank, _LARGE_RANK) if limit else matrix_rank
    if isinstance(adapter, LoHaWeights) and adapter.rank**2 <= cheap:
        lora = as_lora(converted(adapter, torch.float32))
        if lora is not None:
            return decompose_product(*factors(lora))
    matrix_OJ = delta(adapter).flatten(1)
    rank = min(limit or matrix_rank, matrix_rank)
    return decompose(matrix_OJ, rank=rank, generator=generator, exact_below=_EXACT_BELOW)


def lora_of(
    found: LowRank, *, shape: Sequence[int], dtype: torch.dtype, bias_diff: Tensor | None = None
) -> LoRAWeights:
    """A LoRA of a weight of this shape, whose alpha is its rank, in the type it is stored in."""
    down = found.down_RI.unflatten(1, tuple(shape[1:])).to(dtype).contiguous()
    up = found.up_OR.to(dtype).contiguous()
    bias_diff = None if bias_diff is None else bias_diff.to(dtype)
    return LoRAWeights(down, up, alpha=float(down.shape[0]), bias_diff=bias_diff)


def combined(parts: Sequence[Weighted]) -> AdapterWeights:
    """One adapter that adds what all together add, each times its weight; exact.

    LoRAs are set side by side, so that the rank is the sum of theirs, with the numbers of ``down``
    and, where the weights allow it, of ``up`` as they are. Kinds that would need a higher rank
    than the weight itself has become a full difference.

    Raises:
        ValueError: nothing is given, or a part has a magnitude.
    """
    bias_diff = _sum([(part.bias_diff, weight) for part, weight in parts])
    parts = [(part, weight) for part, weight in parts if part.shape is not None]
    if not parts:
        return FullWeights(None, bias_diff)
    if any(not isinstance(part, FullWeights) and part.magnitude is not None for part, _ in parts):
        raise ValueError("a magnitude cannot be added up")
    shape = parts[0][0].shape
    assert shape is not None
    loras = [(_as_lora(part), weight) for part, weight in parts]
    known = [(lora, weight) for lora, weight in loras if lora is not None]
    largest = min(shape[0], math.prod(shape[1:]))
    total = sum(lora.rank for lora, _ in known)
    if len(known) == len(parts) and total <= largest:
        return replace(_side_by_side(known), bias_diff=bias_diff)
    if all(isinstance(part, LoRAWeights) for part, _ in parts):
        found = decompose_product(*factors(_side_by_side(known)))
        return lora_of(
            found.truncated(largest), shape=shape, dtype=torch.float32, bias_diff=bias_diff
        )
    whole = torch.zeros(shape)
    for part, weight in parts:
        whole.add_(delta(part), alpha=weight)
    return FullWeights(whole, bias_diff)


def squared_change(adapter: AdapterWeights) -> float:
    """Squared norm of what it adds to the weight; 0 if that is only a bias."""
    if adapter.shape is None:
        return 0.0
    if isinstance(adapter, LoRAWeights):
        return product_squared_norm(*factors(adapter))
    whole = delta(adapter)
    return squared_norm(whole.flatten(1) if whole.dim() > 1 else whole[None])


def squared_difference(exact: AdapterWeights, stored: AdapterWeights) -> float:
    """Squared norm of the difference of what two adapters add to the weight."""
    if exact.shape is None:
        return 0.0
    if isinstance(exact, LoRAWeights) and isinstance(stored, LoRAWeights):
        return _squared_difference(*factors(exact), *factors(stored))
    whole = delta(exact)
    if isinstance(stored, LoRAWeights):
        return squared_error(whole.flatten(1), *factors(stored, torch.float32))
    difference = whole - delta(stored)
    return squared_norm(difference.flatten(1) if difference.dim() > 1 else difference[None])


def _squared_difference(
    up_OR: Tensor, down_RJ: Tensor, stored_OR: Tensor, stored_RJ: Tensor
) -> float:
    if down_RJ.shape != stored_RJ.shape:
        ups, downs = torch.cat([up_OR, -stored_OR], dim=1), torch.cat([down_RJ, stored_RJ])
        return product_squared_norm(ups, downs)
    # As (up - stored) down + stored (down - stored), which cancels nothing.
    up_change, down_change = up_OR - stored_OR, down_RJ - stored_RJ
    if not down_change.any():
        return product_squared_norm(up_change, down_RJ) if up_change.any() else 0.0
    return product_squared_norm(
        torch.cat([up_change, stored_OR], dim=1), torch.cat([down_RJ, down_change])
    )


def _decomposed_factor(part: Tensor | tuple[Tensor, Tensor]) -> Decomposition:
    if isinstance(part, tuple):
        return decompose_product(part[0], part[1].flatten(1))
    left, singular, right = torch.linalg.svd(
        part.to("cpu", torch.float64).flatten(1), full_matrices=False
    )
    return Decomposition(left, singular, right)


def _as_lora(adapter: AdapterWeights) -> LoRAWeights | None:
    # Products of half-precision numbers are exact in float32.
    return as_lora(
        adapter if isinstance(adapter, LoRAWeights) else converted(adapter, torch.float32)
    )


def _side_by_side(parts: Sequence[tuple[LoRAWeights, float]]) -> LoRAWeights:
    scales = [weight * lora.scale for lora, weight in parts]
    # The largest stays out of the numbers, which then need no rounding if there is no other.
    common = max(map(abs, scales)) or 1.0
    dtype = torch.float32
    for lora, _ in parts:
        dtype = torch.promote_types(dtype, lora.up.dtype)
    ups = [
        lora.up.to(dtype) * (scale / common) for (lora, _), scale in zip(parts, scales, strict=True)
    ]
    down = torch.cat([lora.down.to(dtype) for lora, _ in parts])
    return LoRAWeights(down, torch.cat(ups, dim=1), alpha=common * down.shape[0])


def _sum(parts: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    given = [tensor.float() * weight for tensor, weight in parts if tensor is not None]
    return torch.stack(given).sum(dim=0) if given else None
