"""DoRA (Liu et al. 2024, arXiv:2402.09353): a magnitude for each column of the trained weight.

``W' = (W + s B A) * m / c``, c the norm of each column of ``W + s B A``, is the same as scaling
the inputs by ``m / c`` and applying a LoRA. The norm counts as a constant in the gradient
(section 4.3). It follows from

``c^2 = ||W||^2 + 2 s (B^T W) . A + s^2 (B^T B A) . A``    (column by column),

so nothing of the weight's size is made.

Shapes: O out features of the published layer, I in features, R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .adapter import Dequantizable


class Decomposition(nn.Module):
    """The trained ``magnitude`` [1, I] of a published layer; at first that of its own weight.

    Args:
        bases: the modules that the layer is made of, in stacking order. Their weights must not
            change any more: the norms of their columns are kept.
    """

    squares_I: Tensor

    def __init__(self, bases: Sequence[nn.Module]) -> None:
        super().__init__()
        # In a tuple they are not submodules: they have their place in the model already.
        self._bases = tuple(bases)
        squares_I = torch.stack([_column_squares(base) for base in bases]).sum(0)
        # Follows from the model's weights, so it is in no saved state.
        self.register_buffer("squares_I", squares_I, persistent=False)
        self.magnitude = nn.Parameter(squares_I.sqrt().unsqueeze(0))

    @torch.no_grad()
    def norm(self, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
        """c [I]: the norm of each column of the weight with the adapter, in float32."""
        cross_RI = torch.zeros_like(lora_A)
        first = 0
        for base in self._bases:
            weight_OI = _weight(base)
            end = first + weight_OI.shape[0]
            part_OR = lora_B[first:end].to(weight_OI.dtype)
            cross_RI = cross_RI + part_OR.t() @ weight_OI
            first = end
        own_RI = (lora_B.t() @ lora_B) @ lora_A
        squares_I = self.squares_I + (2 * scale) * (cross_RI * lora_A).sum(0)
        squares_I = squares_I + scale**2 * (own_RI * lora_A).sum(0)
        return squares_I.clamp_(min=torch.finfo(squares_I.dtype).tiny).sqrt_()

    def gain(self, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
        """m / c [I], what inputs are scaled by; only the magnitude has a gradient."""
        return self.magnitude.squeeze(0) / self.norm(lora_A, lora_B, scale)

    @torch.no_grad()
    def reset(self, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
        """Let the magnitude be the norm, so that the layer is a plain LoRA for now."""
        self.magnitude.copy_(self.norm(lora_A, lora_B, scale))


class DecomposedLinear(torch.autograd.Function):
    """`lora.LoRALinear` of ``x * gain``; keeps ``x`` and no scaled copy of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain_I: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        # In the gain's float32: one of 1.02 would be 1.0234 in bf16.
        scaled = (x * gain_I).to(x.dtype)
        hidden_TR = scaled.view(x_TI.shape) @ lora_A.to(x.dtype).t()
        out = F.linear(scaled, weight_OI, bias_O)
        out.view(-1, out.shape[-1]).addmm_(hidden_TR, lora_B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x_TI, gain_I, hidden_TR, weight_OI, lora_A, lora_B)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x_TI, gain_I, hidden_TR, weight_OI, lora_A, lora_B = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_TR = (grad_TO @ lora_B.to(grad.dtype)).mul_(ctx.scale)
        grad_A = (grad_TR.t() @ x_TI).to(lora_A.dtype).mul_(gain_I)
        grad_B = (hidden_TR.t() @ grad_TO).mul_(ctx.scale).t()
        grad_TI = (grad_TO @ weight_OI).addmm_(grad_TR, lora_A.to(grad.dtype))
        grad_gain = (grad_TI * x_TI).sum(0, dtype=gain_I.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TI.mul_(gain_I).view(*grad.shape[:-1], -1)
        gradients = (grad_A, grad_B.to(lora_B.dtype))
        return grad_x, grad_gain, None, None, *gradients, None


def _weight(base: nn.Module) -> Tensor:
    if isinstance(base, Dequantizable):
        return base.dequantized(torch.float32)
    assert isinstance(base.weight, Tensor)
    return base.weight


@torch.no_grad()
def _column_squares(base: nn.Module) -> Tensor:
    """Summed in chunks of rows, so that no second weight is made in float32."""
    weight_OI = _weight(base)
    return sum(
        (chunk.float().square().sum(0) for chunk in weight_OI.split(256)),
        start=torch.zeros(weight_OI.shape[1], device=weight_OI.device),
    )
