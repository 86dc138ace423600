"""What all kinds of adapters have in common, and the layer that an adapter is put on.

Shapes: O out features of the published layer, I in features, R rank, K kernel of a convolution.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..adapter_weights import AdapterWeights
from .settings import Dropouts


@runtime_checkable
class AnyLinear(Protocol):
    """A linear layer, however its weight is stored."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Dequantizable(Protocol):
    """A layer that can give its weight [O, I] in an ordinary type."""

    def dequantized(self, dtype: torch.dtype) -> Tensor: ...


class Adapter(nn.Module):
    """A trainable change of one published layer; zero at initialisation.

    The parameters stay in float32 whatever type the model has. While ``enabled`` is false the
    adapter does nothing. Dropouts act in training only.
    """

    def __init__(self, *, alpha: float, scale: float, dropouts: Dropouts) -> None:
        super().__init__()
        self.alpha = alpha
        self.scale = scale
        self.dropouts = dropouts
        self.enabled = True

    @abstractmethod
    def adapted(self, base: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
        """The output of ``base``, which is rows ``first`` to ``end``, with the adapter."""

    @abstractmethod
    def weights(self) -> AdapterWeights:
        """The adapter's tensors, detached, not copied."""

    @abstractmethod
    def load(self, weights: AdapterWeights) -> None:
        """Take over an adapter of the same kind and shapes.

        The scale of this one stays: where that of ``weights`` differs, the up side makes up for
        it, so that the change of the layer is the same.

        Raises:
            ValueError: the kind or a shape differs.
        """

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in training states."""

    @abstractmethod
    def factors(self) -> list[nn.Parameter]:
        """``delta W`` is proportional to each of them."""

    @abstractmethod
    def up_side(self) -> list[nn.Parameter]:
        """Those that LoRA+ trains at a higher rate."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """``||delta W||_F^2``, without a magnitude, as a tensor on the device."""

    @property
    def is_dropping(self) -> bool:
        return self.training and self.dropouts.any

    def module_mask(self) -> Tensor | None:
        """0 or 1 to multiply with, drawn on the CPU; other devices take it without waiting.

        A mask rather than a jump: a compiled graph has no jumps, and where several processes
        train together each needs a gradient for every parameter.
        """
        if not (self.training and self.dropouts.module):
            return None
        return torch.rand(()) >= self.dropouts.module


class Adapted(nn.Module):
    """A frozen layer plus rows ``first`` to ``end`` of an adapter."""

    def __init__(self, base: nn.Module, adapter: Adapter, first: int, end: int) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.first = first
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        if not self.adapter.enabled:
            return self.base(x)
        return self.adapter.adapted(self.base, x, self.first, self.end)


def kaiming(*shape: int, generator: torch.Generator) -> nn.Parameter:
    """Uniform within ``1 / sqrt(fan in)``, as PyTorch's own layers begin."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


def normal(*shape: int, std: float, generator: torch.Generator) -> nn.Parameter:
    """Normally distributed around zero."""
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def zeros(*shape: int) -> nn.Parameter:
    """All zero."""
    return nn.Parameter(torch.zeros(shape))


def rows(parameter: Tensor, first: int, end: int) -> Tensor:
    """Rows ``first`` to ``end``; where that is all, no operation to differentiate."""
    return parameter if end - first == parameter.shape[0] else parameter[first:end]


def product_squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """``||a b||_F^2`` of a [., R] and b [R, ...], by products of size [R, R] only."""
    flat = b.flatten(1)
    return ((a.t() @ a) * (flat @ flat.t())).sum().clamp_(min=0.0)


def scaled(tensor: Tensor, ratio: float) -> Tensor:
    """``ratio`` times a tensor of a file, not rounded to the file's type."""
    return tensor.float() * ratio


@torch.no_grad()
def take(targets: Mapping[str, nn.Parameter], found: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names.

    Raises:
        ValueError: names or shapes differ.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        raise ValueError(f"an adapter with {wanted} cannot take over one with {shapes}")
    for name, tensor in found.items():
        targets[name].copy_(tensor)
