"""LoKr on linear layers (Yeh et al. 2023, arXiv:2309.14859): ``delta W = s w1 x w2``.

x is the Kronecker product, which is never made: with outputs and inputs seen as [L, K] and
[M, N], it is ``y[l, k] = sum over m, n of w1[l, m] w2[k, n] x[m, n]``, one small product after the
other.

Shapes: O = L K out features, I = M N in features, R rank, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..adapter_weights import AdapterWeights, LoKrWeights
from .adapter import Adapter, kaiming, product_squared_norm, rows, scaled, take, zeros
from .dropout import row_mask
from .settings import Dropouts, LayerSettings


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two divisors of ``dimension``, the smaller one first.

    ``factor`` itself and its counterpart if it divides; otherwise the pair closest to a square
    with the smaller one at most ``factor`` (-1: at most anything).
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor < 0 else factor
    small, large = 1, dimension
    while small < large:
        step = small + 1
        while dimension % step:
            step += 1
        if step + dimension // step > small + large or step > limit:
            break
        small, large = step, dimension // step
    return min(small, large), max(small, large)


class LoKrAdapter(Adapter):
    """``w1`` [L, M] and ``w2`` [K, N], the latter whole or as ``w2_a`` [K, R] ``w2_b`` [R, N].

    ``w2``, or ``w2_a``, is zero at first.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        settings: LayerSettings,
        dropouts: Dropouts,
        generator: torch.Generator,
    ) -> None:
        out_l, out_k = factorization(out_features, settings.factor)
        in_m, in_n = factorization(in_features, settings.factor)
        rank = settings.rank
        is_low_rank = not settings.full_matrix and rank < max(out_k, in_n) / 2
        scale = settings.alpha / rank if is_low_rank else 1.0
        super().__init__(alpha=settings.alpha, scale=scale, dropouts=dropouts)
        self.w1 = kaiming(out_l, in_m, generator=generator)
        self.w2 = None if is_low_rank else zeros(out_k, in_n)
        self.w2_a = zeros(out_k, rank) if is_low_rank else None
        self.w2_b = kaiming(rank, in_n, generator=generator) if is_low_rank else None

    @property
    def height(self) -> int:
        """K: so many rows of the layer belong to one of ``w1``."""
        return self._up.shape[0]

    def adapted(self, base: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        first_l, end_l = first // self.height, -(-end // self.height)
        w1 = rows(self.w1, first_l, end_l)
        if self.scale != 1:
            w1 = w1 * self.scale
        keeps_module = self.module_mask()
        if keeps_module is not None:
            w1 = w1 * keeps_module
        mask_O = row_mask(self, end - first, x.device)
        skipped = first - first_l * self.height
        out_TO = AddLoKr.apply(base(x_TI), x_TI, w1, self._up, self.w2_b, mask_O, skipped)
        return out_TO.view(*x.shape[:-1], end - first)

    def weights(self) -> LoKrWeights:
        w2 = self._up.detach() if self.w2_b is None else (self._up.detach(), self.w2_b.detach())
        return LoKrWeights(self.w1.detach(), w2, self.alpha)

    def load(self, weights: AdapterWeights) -> None:
        if not isinstance(weights, LoKrWeights) or weights.magnitude is not None:
            raise ValueError("a LoKr can only take over another without magnitude")
        w1, w2 = weights.w1, weights.w2
        found = {"w1": _whole(w1)}
        ratio = weights.scale / self.scale
        if self.w2 is not None:
            found["w2"] = scaled(_whole(w2), ratio)
        elif isinstance(w2, tuple):
            found |= {"w2_a": scaled(w2[0], ratio), "w2_b": w2[1]}
        else:
            found["w2"] = w2
        take(self.tensors(), found)

    def tensors(self) -> dict[str, nn.Parameter]:
        if self.w2_b is None:
            return {"w1": self.w1, "w2": self._up}
        return {"w1": self.w1, "w2_a": self._up, "w2_b": self.w2_b}

    def factors(self) -> list[nn.Parameter]:
        return list(self.tensors().values())

    def up_side(self) -> list[nn.Parameter]:
        return [self._up]

    def squared_norm(self) -> Tensor:
        up = self._up
        second = up.square().sum() if self.w2_b is None else product_squared_norm(up, self.w2_b)
        return self.w1.square().sum() * second * self.scale**2

    @property
    def _up(self) -> nn.Parameter:
        up = self.w2 if self.w2_a is None else self.w2_a
        assert up is not None
        return up


class AddLoKr(torch.autograd.Function):
    """``out += x (w1 x w2)^T``, in place; only ``x`` and the factors are kept.

    ``w1`` has those rows that ``out`` has a part of; ``out`` begins ``skipped`` rows into them.
    ``w2_b`` is missing where ``w2_a`` is the whole ``w2``. ``mask_O`` multiplies what is added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out_TO: Tensor,
        x_TI: Tensor,
        w1_LM: Tensor,
        w2_a: Tensor,
        w2_b: Tensor | None,
        mask_O: Tensor | None,
        skipped: int,
    ) -> Tensor:
        _, mixed = _mixed(x_TI, w1_LM, w2_b)
        mixed = mixed.flatten(0, 1)
        up = w2_a.to(x_TI.dtype).t()
        num_tokens, num_out = out_TO.shape
        num_rows = w1_LM.shape[0] * w2_a.shape[0]
        if mask_O is None and num_rows == num_out:
            out_TO.view(-1, w2_a.shape[0]).addmm_(mixed, up)
        else:
            change = (mixed @ up).view(num_tokens, num_rows)[:, skipped : skipped + num_out]
            out_TO.add_(change if mask_O is None else change * mask_O)
        ctx.save_for_backward(x_TI, w1_LM, w2_a, w2_b, mask_O)
        ctx.skipped = skipped
        ctx.mark_dirty(out_TO)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = gradients
        x_TI, w1_LM, w2_a, w2_b, mask_O = ctx.saved_tensors
        dtype = x_TI.dtype
        needs_x = ctx.needs_input_grad[1]
        grad = grad_TO if mask_O is None else (grad_TO * mask_O).to(dtype)
        num_rows = w1_LM.shape[0] * w2_a.shape[0]
        if num_rows != grad.shape[1]:
            after = num_rows - ctx.skipped - grad.shape[1]
            grad = F.pad(grad, (ctx.skipped, after))
        grad = grad.reshape(-1, w2_a.shape[0])
        narrow, mixed = _mixed(x_TI, w1_LM, w2_b)
        grad_up = grad.t() @ mixed.flatten(0, 1)
        grad_mixed = (grad @ w2_a.to(dtype)).view(mixed.shape)
        # Token by token, which is 2 to 8 times as fast as putting tokens and N side by side first.
        grad_w1 = (grad_mixed @ narrow.transpose(1, 2)).sum(0, dtype=w1_LM.dtype)
        grad_x = grad_down = None
        if w2_b is None and needs_x:
            grad_x = (w1_LM.to(dtype).t() @ grad_mixed).view(x_TI.shape)
        elif w2_b is not None:
            grad_narrow = (w1_LM.to(dtype).t() @ grad_mixed).flatten(0, 1)
            grad_down = (grad_narrow.t() @ x_TI.reshape(-1, w2_b.shape[1])).to(w2_b.dtype)
            if needs_x:
                grad_x = (grad_narrow @ w2_b.to(dtype)).view(x_TI.shape)
        found = (grad_w1, grad_up.to(w2_a.dtype), grad_down)
        return grad_TO, grad_x, *found, None, None


def _mixed(x_TI: Tensor, w1_LM: Tensor, w2_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inputs [T, M, .] after ``w2_b``, and [T, L, .] after ``w1``, too."""
    narrow = x_TI.unflatten(1, (w1_LM.shape[1], -1))
    if w2_b is not None:
        narrow = narrow @ w2_b.to(x_TI.dtype).t()
    return narrow, w1_LM.to(x_TI.dtype) @ narrow


def _whole(factor: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return factor[0].float() @ factor[1].float() if isinstance(factor, tuple) else factor
