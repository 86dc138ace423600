"""Random adapters of every kind for all layers of a checkpoint.

What they add is about half as large as the weight, so that a layer which is left out, or scaled
wrongly, cannot be mistaken for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
)
from torch import Tensor

SIZE = 0.5


class Draw:
    """Normal numbers from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def pair(self, out: int, rank: int, into: tuple[int, ...], *, std: float) -> tuple[Tensor, ...]:
        """``a`` [out, rank] and ``b`` [rank, *into] whose product has this deviation."""
        each = (std / rank**0.5) ** 0.5
        return self(out, rank, std=each), self(rank, *into, std=each)


def lora(weight: Tensor, draw: Draw, rank: int) -> LoRAWeights:
    """Alpha is half the rank."""
    std = 2 * SIZE * float(weight.std())
    up, down = draw.pair(weight.shape[0], rank, tuple(weight.shape[1:]), std=std)
    return LoRAWeights(down, up, alpha=rank / 2)


def loha(weight: Tensor, draw: Draw, rank: int) -> LoHaWeights:
    """Alpha is twice the rank."""
    out, into = weight.shape[0], tuple(weight.shape[1:])
    std = (SIZE * float(weight.std()) / 2) ** 0.5
    w1_a, w1_b = draw.pair(out, rank, into, std=std)
    w2_a, w2_b = draw.pair(out, rank, into, std=std)
    return LoHaWeights(w1_a, w1_b, w2_a, w2_b, alpha=2.0 * rank)


def lokr(weight: Tensor, draw: Draw, rank: int, *, factors: int = 1) -> LoKrWeights:
    """``factors`` of its two factors, the second one first, are products of two."""
    out, into, *kernel = weight.shape
    left, middle = math.gcd(out, 4), math.gcd(into, 8)
    std = (SIZE * float(weight.std())) ** 0.5
    shape = (out // left, (into // middle, *kernel))
    w2 = draw.pair(shape[0], rank, shape[1], std=std) if factors else None
    w1 = draw.pair(left, rank, (middle,), std=std) if factors > 1 else None
    return LoKrWeights(
        draw(left, middle, std=std) if w1 is None else (w1[0], w1[1]),
        draw(shape[0], *shape[1], std=std) if w2 is None else (w2[0], w2[1]),
        alpha=float(rank),
    )


def column_norms(weight: Tensor, draw: Draw) -> Tensor:
    """A magnitude [1, I] near that of the weight."""
    norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
    return (norms * (1 + draw(len(norms), std=0.2)))[None]


def row_norms(weight: Tensor, draw: Draw) -> Tensor:
    """A magnitude [O, 1] near that of the weight."""
    norms = weight.flatten(1).norm(dim=1)
    return (norms * (1 + draw(len(norms), std=0.2)))[:, None]


def layers_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of linear layers and convolutions by the layer's name."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.dim() > 1
    }


def lora_everywhere(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Ranks differ from layer to layer."""
    return _everywhere(state, lora)


def loha_everywhere(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Ranks differ from layer to layer."""
    return _everywhere(state, loha)


def lokr_everywhere(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Layers take turns in how many of the two factors are products."""
    draw = Draw(5)
    return {
        name: lokr(weight, draw, 2 + index % 3, factors=index % 3)
        for index, (name, weight) in enumerate(layers_of(state).items())
    }


def dora_everywhere(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Layers take turns in what the magnitude is added to."""
    draw, makers = Draw(6), (lora, loha, lokr)
    found: dict[str, AdapterWeights] = {}
    for index, (name, weight) in enumerate(layers_of(state).items()):
        adapter = makers[index % 3](weight, draw, 3)
        found[name] = replace(adapter, magnitude=column_norms(weight, draw))
    return found


def biased_everywhere(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Layers take turns in what comes with a difference of the bias."""
    draw, makers = Draw(8), (lora, loha, lokr)
    found: dict[str, AdapterWeights] = {}
    for index, (name, weight) in enumerate(layers_of(state).items()):
        adapter = makers[index % 3](weight, draw, 3)
        bias = state.get(f"{name}.bias")
        if bias is not None:
            adapter = replace(adapter, bias_diff=draw(*bias.shape, std=0.05))
        found[name] = adapter
    return found


def full_everywhere(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Differences of every weight, norms included, and of every bias."""
    draw = Draw(7)
    found: dict[str, AdapterWeights] = {}
    for key, tensor in state.items():
        name, _, parameter = key.rpartition(".")
        if parameter not in ("weight", "scale"):
            continue
        bias = state.get(f"{name}.bias")
        found[name] = FullWeights(
            draw(*tensor.shape, std=SIZE * float(tensor.abs().mean())),
            None if bias is None else draw(*bias.shape, std=0.01),
        )
    return found


KINDS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, AdapterWeights]]] = {
    "lora": lora_everywhere,
    "loha": loha_everywhere,
    "lokr": lokr_everywhere,
    "dora": dora_everywhere,
    "with bias": biased_everywhere,
    "full": full_everywhere,
}


def _everywhere(
    state: Mapping[str, Tensor], make: Callable[[Tensor, Draw, int], AdapterWeights]
) -> dict[str, AdapterWeights]:
    draw = Draw(4)
    return {
        name: make(weight, draw, 1 + index % 4)
        for index, (name, weight) in enumerate(layers_of(state).items())
    }
