"""LoRA on convolutions: a convolution to R channels, then a 1 x 1 one to O.

Shapes: B samples, O out channels, I in channels, R rank, K kernel; S the places of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..adapter_weights import AdapterWeights, LoRAWeights
from .adapter import Adapter, kaiming, product_squared_norm, scaled, take, zeros
from .dropout import drop
from .settings import Dropouts


class ConvolutionAdapter(Adapter):
    """``lora_A`` [R, I, *K], ``lora_B`` [O, R]; zero at initialisation because B is.

    Raises:
        ValueError: the convolution has more than one group.
    """

    def __init__(
        self,
        base: nn.Conv2d | nn.Conv3d,
        *,
        rank: int,
        alpha: float,
        dropouts: Dropouts,
        generator: torch.Generator,
    ) -> None:
        super().__init__(alpha=alpha, scale=alpha / rank, dropouts=dropouts)
        if base.groups != 1:
            raise ValueError(f"a LoRA needs a convolution of one group, not {base.groups}")
        self.lora_A = kaiming(rank, *base.weight.shape[1:], generator=generator)
        self.lora_B = zeros(base.out_channels, rank)

    def adapted(self, base: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
        assert isinstance(base, nn.Conv2d | nn.Conv3d)
        out = base(x)
        # PyTorch's own way to convolve as the layer does, but with other weights.
        hidden = base._conv_forward(x, self.lora_A.to(x.dtype), None)
        hidden, scale = drop(self, hidden, rank_dim=1)
        convolve = F.conv2d if isinstance(base, nn.Conv2d) else F.conv3d
        kernel = (1,) * (x.dim() - 2)
        up = convolve(hidden, self.lora_B.to(x.dtype).view(*self.lora_B.shape, *kernel))
        return out.add_(up, alpha=scale)

    def weights(self) -> LoRAWeights:
        return LoRAWeights(self.lora_A.detach(), self.lora_B.detach(), self.alpha)

    def load(self, weights: AdapterWeights) -> None:
        if not isinstance(weights, LoRAWeights) or weights.magnitude is not None:
            raise ValueError("a convolution can only take over a LoRA without magnitude")
        up = scaled(weights.up, weights.scale / self.scale)
        take(self.tensors(), {"A": weights.down, "B": up})

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"A": self.lora_A, "B": self.lora_B}

    def factors(self) -> list[nn.Parameter]:
        return [self.lora_A, self.lora_B]

    def up_side(self) -> list[nn.Parameter]:
        return [self.lora_B]

    def squared_norm(self) -> Tensor:
        return product_squared_norm(self.lora_B, self.lora_A) * self.scale**2
