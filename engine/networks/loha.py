"""LoHa on linear layers (Hyeon-Woo et al. 2021, arXiv:2108.06098).

``delta W = (alpha / R) (w1_a w1_b) o (w2_a w2_b)``, o the product element by element. That is
also one product of rank R^2: with ``up[o, rs] = w1_a[o, r] w2_a[o, s]`` and
``down[rs, i] = w1_b[r, i] w2_b[s, i]`` it is ``up down``, which is what costs less unless the rank
is high or there are few tokens.

Shapes: O out features, I in features, R rank, Q = R^2, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_weights import AdapterWeights, LoHaWeights
from .adapter import Adapter, normal, rows, scaled, take, zeros
from .dropout import row_mask
from .settings import Dropouts

_CHUNK = 2**22  # values of delta W made at a time for its norm


class LoHaAdapter(Adapter):
    """``w1_a`` and ``w2_a`` [O, R], ``w1_b`` and ``w2_b`` [R, I]; ``w2_a`` is zero at first."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        dropouts: Dropouts,
        generator: torch.Generator,
    ) -> None:
        super().__init__(alpha=alpha, scale=alpha / rank, dropouts=dropouts)
        self.w1_a = normal(out_features, rank, std=0.1, generator=generator)
        self.w1_b = normal(rank, in_features, std=1.0, generator=generator)
        self.w2_a = zeros(out_features, rank)
        self.w2_b = normal(rank, in_features, std=1.0, generator=generator)

    def adapted(self, base: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        w1_a = rows(self.w1_a, first, end)
        w2_a = rows(self.w2_a, first, end)
        for mask in (row_mask(self, end - first, x.device), self.module_mask()):
            if mask is not None:
                w1_a = w1_a * (mask.unsqueeze(1) if mask.dim() else mask)
        out_TO = AddLoHa.apply(base(x_TI), x_TI, w1_a, self.w1_b, w2_a, self.w2_b, self.scale)
        return out_TO.view(*x.shape[:-1], end - first)

    def weights(self) -> LoHaWeights:
        tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        return LoHaWeights(**tensors, alpha=self.alpha)

    def load(self, weights: AdapterWeights) -> None:
        if not isinstance(weights, LoHaWeights) or weights.magnitude is not None:
            raise ValueError("a LoHa can only take over another without magnitude")
        found = {name: vars(weights)[name] for name in self.tensors()}
        found["w2_a"] = scaled(weights.w2_a, weights.scale / self.scale)
        take(self.tensors(), found)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a, "w2_b": self.w2_b}

    def factors(self) -> list[nn.Parameter]:
        return [self.w1_a, self.w1_b, self.w2_a, self.w2_b]

    def up_side(self) -> list[nn.Parameter]:
        return [self.w1_a, self.w2_a]

    def squared_norm(self) -> Tensor:
        height = max(1, _CHUNK // self.w1_b.shape[1])
        total = torch.zeros((), device=self.w1_a.device)
        for w1_a, w2_a in zip(self.w1_a.split(height), self.w2_a.split(height), strict=True):
            total = total + ((w1_a @ self.w1_b).mul_(w2_a @ self.w2_b)).square_().sum()
        return total * self.scale**2


class AddLoHa(torch.autograd.Function):
    """``out += scale x delta^T``, in place; ``x`` and at most [T, Q] are kept for the gradients.

    ``delta`` itself is only made, forward and again backward, where that costs less than to
    multiply by ``down`` and ``up``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out_TO: Tensor,
        x_TI: Tensor,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        scale: float,
    ) -> Tensor:
        hidden_TQ = None
        if _is_cheaper_factorised(x_TI, w1_a):
            hidden_TQ = x_TI @ _down(w1_b, w2_b).to(x_TI.dtype).t()
            out_TO.addmm_(hidden_TQ, _up(w1_a, w2_a).to(x_TI.dtype).t(), alpha=scale)
        else:
            first, second = _products(w1_a, w1_b, w2_a, w2_b, x_TI.dtype)
            out_TO.addmm_(x_TI, first.mul_(second).t(), alpha=scale)
        ctx.save_for_backward(x_TI, hidden_TQ, w1_a, w1_b, w2_a, w2_b)
        ctx.scale = scale
        ctx.mark_dirty(out_TO)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = gradients
        x_TI, hidden_TQ, *factors = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[1]
        if hidden_TQ is not None:
            found = _factorised_gradients(grad_TO, x_TI, hidden_TQ, factors, ctx.scale, needs_x)
        else:
            found = _dense_gradients(grad_TO, x_TI, factors, ctx.scale, needs_x)
        return grad_TO, *found, None


def _factorised_gradients(
    grad_TO: Tensor,
    x_TI: Tensor,
    hidden_TQ: Tensor,
    factors: list[Tensor],
    scale: float,
    needs_x: bool,
) -> tuple[Tensor | None, ...]:
    w1_a, w1_b, w2_a, w2_b = factors
    grad_TQ = (grad_TO @ _up(w1_a, w2_a).to(grad_TO.dtype)).mul_(scale)
    grad_x = grad_TQ @ _down(w1_b, w2_b).to(grad_TO.dtype) if needs_x else None
    shape = (w1_b.shape[0], w2_b.shape[0])
    grad_down = (grad_TQ.t() @ x_TI).to(w1_b.dtype).unflatten(0, shape)
    grad_up = (hidden_TQ.t() @ grad_TO).t().to(w1_a.dtype).mul_(scale).unflatten(1, shape)
    return (
        grad_x,
        torch.einsum("ors,os->or", grad_up, w2_a),
        (grad_down * w2_b).sum(1),
        torch.einsum("ors,or->os", grad_up, w1_a),
        (grad_down * w1_b.unsqueeze(1)).sum(0),
    )


def _dense_gradients(
    grad_TO: Tensor, x_TI: Tensor, factors: list[Tensor], scale: float, needs_x: bool
) -> tuple[Tensor | None, ...]:
    w1_a, w1_b, w2_a, w2_b = (factor.to(x_TI.dtype) for factor in factors)
    first, second = _products(w1_a, w1_b, w2_a, w2_b, x_TI.dtype)
    grad_x = (grad_TO @ (first * second)).mul_(scale) if needs_x else None
    grad_OI = (grad_TO.t() @ x_TI).mul_(scale)
    grad_first, grad_second = second.mul_(grad_OI), first.mul_(grad_OI)
    found = (
        grad_first @ w1_b.t(),
        w1_a.t() @ grad_first,
        grad_second @ w2_b.t(),
        w2_a.t() @ grad_second,
    )
    return grad_x, *(each.to(f.dtype) for each, f in zip(found, factors, strict=True))


def _is_cheaper_factorised(x_TI: Tensor, w1_a: Tensor) -> bool:
    """By the number of multiplications."""
    tokens, num_in = x_TI.shape
    num_out, rank = w1_a.shape
    return tokens * rank**2 * (num_in + num_out) < num_out * num_in * (2 * rank + tokens)


def _down(w1_b: Tensor, w2_b: Tensor) -> Tensor:
    return (w1_b.unsqueeze(1) * w2_b).flatten(0, 1)


def _up(w1_a: Tensor, w2_a: Tensor) -> Tensor:
    return (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)


def _products(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return w1_a.to(dtype) @ w1_b.to(dtype), w2_a.to(dtype) @ w2_b.to(dtype)
