"""Low-rank adapters on the linear layers of a transformer (Hu et al. 2021, arXiv:2106.09685).

One adapter belongs to one *published* layer. Where our classes split that layer (q, k and v of a
fused projection), its parts share the adapter's A and each takes its own rows of B, so what is
trained is exactly an adapter of the published layer and is saved under its name.

Shapes: O out features of the published layer, I in features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class LoRAAdapter(nn.Module):
    """``delta W = (alpha / R) B A``; zero at initialisation because B is.

    The parameters stay in float32 whatever type the model has. While ``enabled`` is false the
    adapter does nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        weight_RI = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(weight_RI)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.alpha = alpha
        self.scale = alpha / rank
        self.enabled = True


class LoRALinear(nn.Module):
    """A frozen linear layer plus rows ``first`` to ``end`` of an adapter."""

    def __init__(self, base: nn.Linear, adapter: LoRAAdapter, first: int, end: int) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.first = first
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.adapter.enabled:
            return out
        hidden = F.linear(x, self.adapter.lora_A.to(x.dtype))
        rows_OR = self.adapter.lora_B[self.first : self.end].to(x.dtype)
        # One kernel adds the scaled product in place of three that make full-size temporaries.
        return torch.addmm(
            out.flatten(0, -2), hidden.flatten(0, -2), rows_OR.t(), alpha=self.adapter.scale
        ).view(out.shape)


@dataclass(frozen=True)
class LoRAWeights:
    """One adapter's tensors as they are in a file: ``down_RI``, ``up_OR`` and alpha."""

    down_RI: Tensor
    up_OR: Tensor
    alpha: float


@dataclass(frozen=True)
class LoRANetwork:
    """All adapters of one transformer, by published name."""

    adapters: dict[str, LoRAAdapter]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable parameter, in a fixed order."""
        for adapter in self.adapters.values():
            yield from adapter.parameters()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is what it was without adapters, bit for bit.

        Nothing is differentiated inside: gradient checkpointing would compute it again later,
        outside, with the adapters.
        """
        before = {adapter: adapter.enabled for adapter in self.adapters.values()}
        try:
            for adapter in before:
                adapter.enabled = False
            with torch.no_grad():
                yield
        finally:
            for adapter, enabled in before.items():
                adapter.enabled = enabled

    def weights(self) -> dict[str, LoRAWeights]:
        """The adapters' tensors, detached, not copied."""
        return {
            name: LoRAWeights(adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.alpha)
            for name, adapter in self.adapters.items()
        }


def inject(
    transformer: nn.Module,
    targets: Mapping[str, tuple[str, ...]],
    *,
    rank: int,
    alpha: float,
    generator: torch.Generator,
) -> LoRANetwork:
    """Put a fresh adapter on each target; the model's output does not change yet.

    Args:
        transformer: changed in place; its own parameters should be frozen already.
        targets: published name -> the Linear modules it is made of, in stacking order.
        rank: R of every adapter.
        alpha: the adapters are scaled by ``alpha / rank``.
        generator: on the CPU; decides the initial A.

    Raises:
        ValueError: there are no targets.
    """
    if not targets:
        raise ValueError("no layer to put an adapter on")
    adapters: dict[str, LoRAAdapter] = {}
    for name, inner in targets.items():
        layers = [_linear(transformer, path) for path in inner]
        adapter = LoRAAdapter(
            layers[0].in_features,
            sum(layer.out_features for layer in layers),
            rank=rank,
            alpha=alpha,
            generator=generator,
        ).to(layers[0].weight.device)
        first = 0
        for path, layer in zip(inner, layers, strict=True):
            end = first + layer.out_features
            transformer.set_submodule(path, LoRALinear(layer, adapter, first, end))
            first = end
        adapters[name] = adapter
    return LoRANetwork(adapters)


@torch.no_grad()
def merge(
    transformer: nn.Module,
    linears: Mapping[str, tuple[str, ...]],
    weights: Mapping[str, LoRAWeights],
    *,
    multiplier: float,
) -> None:
    """Add ``multiplier`` times a LoRA to the model's own weights, in float32, rounded once.

    Args:
        linears: published name -> Linear modules, for every name in ``weights``.
    """
    for name, lora in weights.items():
        scale = multiplier * lora.alpha / lora.down_RI.shape[0]
        first = 0
        for path in linears[name]:
            weight_OI = _linear(transformer, path).weight
            end = first + weight_OI.shape[0]
            up_OR = lora.up_OR[first:end].to(weight_OI.device, torch.float32)
            delta_OI = up_OR @ lora.down_RI.to(weight_OI.device, torch.float32)
            weight_OI.copy_(weight_OI.float().add_(delta_OI, alpha=scale))
            first = end


def linear_shapes(
    transformer: nn.Module, linears: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, int]]:
    """Published name -> (out features, in features) of the layer that its modules make up."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, inner in linears.items():
        layers = [_linear(transformer, path) for path in inner]
        shapes[name] = (sum(layer.out_features for layer in layers), layers[0].in_features)
    return shapes


def _linear(transformer: nn.Module, path: str) -> nn.Linear:
    layer = transformer.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{path} is a {type(layer).__name__}, not a Linear")
    return layer
