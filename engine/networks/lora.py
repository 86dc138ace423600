"""LoRA on linear layers (Hu et al. 2021, arXiv:2106.09685): ``delta W = (alpha / R) B A``.

With a decomposition it is a DoRA. Shapes: O out features of the published layer, I in features,
R rank, T tokens of all samples together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..adapter_weights import AdapterWeights, LoRAWeights
from .adapter import Adapter, kaiming, product_squared_norm, rows, scaled, take, zeros
from .decomposition import DecomposedLinear, Decomposition
from .dropout import drop
from .settings import Dropouts


class LoRAAdapter(Adapter):
    """``lora_A`` [R, I], ``lora_B`` [O, R]; zero at initialisation because B is."""

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
        self.lora_A = kaiming(rank, in_features, generator=generator)
        self.lora_B = zeros(out_features, rank)
        self.decomposition: Decomposition | None = None

    def adapted(self, base: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
        lora_B = rows(self.lora_B, first, end)
        gain_I = None
        if self.decomposition is not None:
            gain_I = self.decomposition.gain(self.lora_A, self.lora_B, self.scale)
        if type(base) is nn.Linear and not self.is_dropping:
            tensors = (base.weight, base.bias, self.lora_A, lora_B)
            if gain_I is None:
                return LoRALinear.apply(x, *tensors, self.scale)
            return DecomposedLinear.apply(x, gain_I, *tensors, self.scale)
        if gain_I is not None:
            x = (x * gain_I).to(x.dtype)
        x_TI = x.reshape(-1, x.shape[-1])
        out_TO = base(x_TI)
        hidden = F.linear(x_TI, self.lora_A.to(x.dtype)).view(*x.shape[:-1], -1)
        hidden, scale = drop(self, hidden, rank_dim=-1)
        # In place, so that there is one tensor of the output's size and not three.
        out_TO.addmm_(hidden.flatten(0, -2), lora_B.to(x.dtype).t(), alpha=scale)
        return out_TO.view(*x.shape[:-1], end - first)

    def weights(self) -> LoRAWeights:
        magnitude = self.decomposition.magnitude.detach() if self.decomposition else None
        return LoRAWeights(self.lora_A.detach(), self.lora_B.detach(), self.alpha, magnitude)

    def load(self, weights: AdapterWeights) -> None:
        if not isinstance(weights, LoRAWeights):
            raise ValueError(f"a LoRA cannot take over {type(weights).__name__}")
        found = {"A": weights.down, "B": scaled(weights.up, weights.scale / self.scale)}
        if weights.magnitude is not None:
            found["magnitude"] = weights.magnitude
        targets = self.tensors()
        if self.decomposition and weights.magnitude is None:
            take({name: targets[name] for name in "AB"}, found)
            self.decomposition.reset(self.lora_A, self.lora_B, self.scale)
        else:
            take(targets, found)

    def tensors(self) -> dict[str, nn.Parameter]:
        found = {"A": self.lora_A, "B": self.lora_B}
        if self.decomposition is not None:
            found["magnitude"] = self.decomposition.magnitude
        return found

    def factors(self) -> list[nn.Parameter]:
        return [self.lora_A, self.lora_B]

    def up_side(self) -> list[nn.Parameter]:
        return [self.lora_B]

    def squared_norm(self) -> Tensor:
        return product_squared_norm(self.lora_B, self.lora_A) * self.scale**2


class LoRALinear(torch.autograd.Function):
    """``x W^T + b + scale (x A^T) B^T``; only ``x`` and ``x A^T`` are kept for the gradients.

    The low-rank part goes on top of the product by the same kernel that multiplies, forward and
    backward, so nothing of the output's or input's size is made besides the results.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        hidden_TR = x_TI @ lora_A.to(x.dtype).t()
        out = F.linear(x, weight_OI, bias_O)
        out.view(-1, out.shape[-1]).addmm_(hidden_TR, lora_B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x_TI, hidden_TR, weight_OI, lora_A, lora_B)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x_TI, hidden_TR, weight_OI, lora_A, lora_B = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_TR = (grad_TO @ lora_B.to(grad.dtype)).mul_(ctx.scale)
        grad_A = grad_TR.t() @ x_TI
        grad_B = (hidden_TR.t() @ grad_TO).mul_(ctx.scale).t()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ weight_OI).addmm_(grad_TR, lora_A.to(grad.dtype))
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), None
