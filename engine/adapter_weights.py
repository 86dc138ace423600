"""What an adapter of one layer is made of, as it stands in a LoRA file, and what it adds.

An adapter changes the weight ``W`` of one layer by ``delta W``:

- LoRA (Hu et al. 2021, arXiv:2106.09685): ``alpha / R * up down``
- LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): ``alpha / R * (w1_a w1_b) o (w2_a w2_b)``
- LoKr (Yeh et al. 2023, arXiv:2309.14859): ``alpha / R * w1 x w2``, x the Kronecker product
- a full difference

and with a magnitude (DoRA, Liu et al. 2024, arXiv:2402.09353) the sum is scaled to it.

Shapes: O out features, I in features, R rank, K kernel of a convolution (nothing for a linear
layer), so that a weight is [O, I, *K]. ``bias_diff`` [O] is what is added to the bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRAWeights:
    """``down`` [R, I, *K], ``up`` [O, R].

    ``magnitude`` is [1, I] (the norm of each column, over O and K) or [O, 1] (of each row).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias_diff: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is for."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class LoHaWeights:
    """``w1_a`` and ``w2_a`` [O, R], ``w1_b`` and ``w2_b`` [R, I, *K]; the ranks are the same."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias_diff: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is for."""
        return (self.w1_a.shape[0], *self.w1_b.shape[1:])


@dataclass(frozen=True)
class LoKrWeights:
    """``w1`` [L, M] and ``w2`` [O / L, I / M, *K], each whole or as a product of two.

    A product is a pair (a [., R], b [R, ...]). ``scale`` is 1 where both are whole, whatever
    alpha is.
    """

    w1: Tensor | tuple[Tensor, Tensor]
    w2: Tensor | tuple[Tensor, Tensor]
    alpha: float
    magnitude: Tensor | None = None
    bias_diff: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """None where nothing is factorised."""
        for part in (self.w2, self.w1):
            if isinstance(part, tuple):
                return part[1].shape[0]
        return None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is for."""
        (out_l, in_m), (out_k, in_n, *kernel) = _shape(self.w1), _shape(self.w2)
        return (out_l * out_k, in_m * in_n, *kernel)


@dataclass(frozen=True)
class FullWeights:
    """``diff`` has the shape of the weight, ``bias_diff`` that of the bias; one may be missing."""

    diff: Tensor | None
    bias_diff: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the weight that it is for; None if it only changes the bias."""
        return None if self.diff is None else tuple(self.diff.shape)


AdapterWeights = LoRAWeights | LoHaWeights | LoKrWeights | FullWeights


def delta(adapter: AdapterWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    """``delta W`` [O, I, *K], without the magnitude; computed in ``dtype``.

    Raises:
        ValueError: the adapter is for a bias only.
    """
    if isinstance(adapter, FullWeights):
        if adapter.diff is None:
            raise ValueError("it changes the bias only")
        return adapter.diff.to(dtype)
    if isinstance(adapter, LoRAWeights):
        return _product(adapter.up, adapter.down, dtype).mul_(adapter.scale)
    if isinstance(adapter, LoHaWeights):
        first = _product(adapter.w1_a, adapter.w1_b, dtype)
        return first.mul_(_product(adapter.w2_a, adapter.w2_b, dtype)).mul_(adapter.scale)
    w1, w2 = _whole(adapter.w1, dtype), _whole(adapter.w2, dtype)
    w1 = w1.view(*w1.shape, *(1 for _ in w2.shape[2:]))
    return torch.kron(w1, w2).mul_(adapter.scale)


def merged(weight: Tensor, adapter: AdapterWeights, *, multiplier: float = 1.0) -> Tensor:
    """The weight [O, I, *K] with ``multiplier`` times the adapter, in float32 or better.

    With a magnitude, the way from ``weight`` to the weight that was trained is gone by the part
    ``multiplier``, as ComfyUI does.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    base = weight.to(dtype)
    change = delta(adapter, dtype).to(base.device)
    magnitude = None if isinstance(adapter, FullWeights) else adapter.magnitude
    if magnitude is None:
        return base.add(change, alpha=multiplier)
    trained = base + change
    dims = tuple(d for d in range(trained.dim()) if d != (0 if magnitude.shape[0] > 1 else 1))
    norm = trained.square().sum(dims, keepdim=True).sqrt_()
    shaped = magnitude.to(base).view(norm.shape)
    trained.mul_(shaped / norm.clamp_(min=torch.finfo(dtype).tiny))
    return base.lerp(trained, multiplier)


def rows(adapter: AdapterWeights, first: int, end: int) -> AdapterWeights | None:
    """The adapter of rows ``first`` to ``end`` of the weight, exactly; None if it has none.

    It has none where a Kronecker factor would be cut, or the norm of each column is given.
    """
    part = slice(first, end)
    bias_diff = None if adapter.bias_diff is None else adapter.bias_diff[part]
    if isinstance(adapter, FullWeights):
        return FullWeights(None if adapter.diff is None else adapter.diff[part], bias_diff)
    adapter = replace(adapter, bias_diff=bias_diff)
    magnitude = adapter.magnitude
    if magnitude is not None:
        if magnitude.shape[0] == 1:
            return None
        magnitude = magnitude[part]
    if isinstance(adapter, LoRAWeights):
        return replace(adapter, up=adapter.up[part], magnitude=magnitude)
    if isinstance(adapter, LoHaWeights):
        w1_a, w2_a = adapter.w1_a[part], adapter.w2_a[part]
        return replace(adapter, w1_a=w1_a, w2_a=w2_a, magnitude=magnitude)
    height = _shape(adapter.w2)[0]
    if first % height or end % height:
        return None
    part = slice(first // height, end // height)
    w1 = adapter.w1
    w1 = (w1[0][part], w1[1]) if isinstance(w1, tuple) else w1[part]
    return replace(adapter, w1=w1, magnitude=magnitude)


def stacked(parts: Sequence[AdapterWeights]) -> AdapterWeights | None:
    """One adapter of the weight whose rows are those of ``parts``, exactly; None if there is none.

    Where the parts do not share their ``down``, its rank is the sum of theirs.
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, FullWeights) for part in parts):
        return _stacked_full([part for part in parts if isinstance(part, FullWeights)])
    if any(_magnitude(part) is not None for part in parts):
        return None
    if all(isinstance(part, LoRAWeights) for part in parts):
        whole = _stacked_lora([part for part in parts if isinstance(part, LoRAWeights)])
    elif all(isinstance(part, LoHaWeights) for part in parts):
        whole = _stacked_loha([part for part in parts if isinstance(part, LoHaWeights)])
    else:
        return None
    return replace(whole, bias_diff=_stacked_bias(parts))


def unstacked(adapter: AdapterWeights, heights: Sequence[int]) -> list[AdapterWeights] | None:
    """The adapters of consecutive rows, ``heights`` of each; None if there are none.

    Gives exactly what `stacked` was given: a part's rank is only as large as it has to be where
    the others' columns of ``up`` are zero.
    """
    ends = torch.tensor(heights).cumsum(0).tolist()
    found = [rows(adapter, end - height, end) for end, height in zip(ends, heights, strict=True)]
    if any(part is None for part in found):
        return None
    parts = [part for part in found if part is not None]
    if isinstance(adapter, LoRAWeights):
        return [_compact(part) if isinstance(part, LoRAWeights) else part for part in parts]
    return parts


def as_lora(adapter: AdapterWeights) -> LoRAWeights | None:
    """The same change as a LoRA, exactly; None if it has none (a full difference, a magnitude).

    A LoHa has rank R^2 then, a LoKr of factors L, M and rank R has M R.
    """
    if isinstance(adapter, LoRAWeights):
        return adapter
    if isinstance(adapter, FullWeights) or adapter.magnitude is not None:
        return None
    if isinstance(adapter, LoHaWeights):
        up = torch.einsum("or,os->ors", adapter.w1_a, adapter.w2_a).flatten(1)
        down = torch.einsum("r...,s...->rs...", adapter.w1_b, adapter.w2_b).flatten(0, 1)
        alpha = adapter.scale * up.shape[1]
        return LoRAWeights(down, up, alpha, bias_diff=adapter.bias_diff)
    w1 = _whole(adapter.w1, _dtype(adapter.w1))
    if isinstance(adapter.w2, tuple):
        w2_a, w2_b = adapter.w2
    else:
        w2_b = adapter.w2
        w2_a = torch.eye(w2_b.shape[0], dtype=w2_b.dtype, device=w2_b.device)
    up = torch.kron(w1, w2_a)
    eye = torch.eye(w1.shape[1], dtype=w2_b.dtype, device=w2_b.device)
    eye = eye.view(*eye.shape, *(1 for _ in w2_b.shape[2:]))
    alpha = adapter.scale * up.shape[1]
    return LoRAWeights(torch.kron(eye, w2_b), up, alpha, bias_diff=adapter.bias_diff)


def tensors(adapter: AdapterWeights) -> dict[str, Tensor]:
    """All tensors of an adapter, by the name of the field (``w2_a`` and ``w2_b`` of a pair)."""
    found: dict[str, Tensor] = {}
    for name, value in vars(adapter).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}_a": value[0], f"{name}_b": value[1]}
    return found


def converted(adapter: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    """The adapter with all tensors in ``dtype``, on the CPU."""
    changed = {
        name: _to(value, dtype)
        for name, value in vars(adapter).items()
        if isinstance(value, Tensor | tuple)
    }
    return replace(adapter, **changed)


def _to(value: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    if isinstance(value, tuple):
        return tuple(part.to("cpu", dtype) for part in value)
    return value.to("cpu", dtype)


def _magnitude(adapter: AdapterWeights) -> Tensor | None:
    return None if isinstance(adapter, FullWeights) else adapter.magnitude


def _stacked_full(parts: Sequence[FullWeights]) -> FullWeights | None:
    diffs = [part.diff for part in parts if part.diff is not None]
    biases = [part.bias_diff for part in parts if part.bias_diff is not None]
    if len(diffs) not in (0, len(parts)) or len(biases) not in (0, len(parts)):
        return None
    return FullWeights(torch.cat(diffs) if diffs else None, torch.cat(biases) if biases else None)


def _stacked_bias(parts: Sequence[AdapterWeights]) -> Tensor | None:
    given = [part.bias_diff for part in parts if part.bias_diff is not None]
    if not given:
        return None
    heights = [part.shape[0] for part in parts if part.shape is not None]
    biases = [part.bias_diff for part in parts]
    return torch.cat(
        [
            given[0].new_zeros(height) if bias is None else bias
            for bias, height in zip(biases, heights, strict=True)
        ]
    )


def _stacked_lora(parts: Sequence[LoRAWeights]) -> LoRAWeights:
    first = parts[0]
    if all(_same(part.down, first.down) and part.scale == first.scale for part in parts):
        return replace(first, up=torch.cat([part.up for part in parts]))
    scale = next((part.scale for part in parts if part.scale), 1.0)
    ups = [part.up * (part.scale / scale) if part.scale != scale else part.up for part in parts]
    down = torch.cat([part.down for part in parts])
    return LoRAWeights(down, torch.block_diag(*ups), alpha=scale * down.shape[0])


def _stacked_loha(parts: Sequence[LoHaWeights]) -> LoHaWeights:
    scale = next((part.scale for part in parts if part.scale), 1.0)
    w1_a = [part.w1_a * (part.scale / scale) for part in parts]
    w1_b = torch.cat([part.w1_b for part in parts])
    return LoHaWeights(
        torch.block_diag(*w1_a),
        w1_b,
        torch.block_diag(*(part.w2_a for part in parts)),
        torch.cat([part.w2_b for part in parts]),
        alpha=scale * w1_b.shape[0],
    )


def _compact(adapter: LoRAWeights) -> LoRAWeights:
    used = adapter.up.ne(0).any(dim=0)
    count = int(used.sum())
    if count in (0, adapter.rank):
        return adapter
    scale = adapter.scale
    return replace(adapter, up=adapter.up[:, used], down=adapter.down[used], alpha=scale * count)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    product = a.to(dtype) @ b.to(dtype).flatten(1)
    return product.view(a.shape[0], *b.shape[1:])


def _whole(part: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return _product(*part, dtype) if isinstance(part, tuple) else part.to(dtype)


def _shape(part: Tensor | tuple[Tensor, Tensor]) -> tuple[int, ...]:
    if isinstance(part, tuple):
        return (part[0].shape[0], *part[1].shape[1:])
    return tuple(part.shape)


def _dtype(part: Tensor | tuple[Tensor, Tensor]) -> torch.dtype:
    return part[0].dtype if isinstance(part, tuple) else part.dtype


def num_values(adapter: AdapterWeights) -> int:
    """How many numbers the adapter has."""
    return sum(math.prod(tensor.shape) for tensor in tensors(adapter).values())
