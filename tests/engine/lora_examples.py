"""Random adapters of every kind, and layers of every family that they may be for."""

from __future__ import annotations

from dataclasses import replace

import torch
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
)
from pack.engine.layer_names import LayerNames
from torch import Tensor

KINDS = ("lora", "loha", "lokr", "lokr_whole", "lokr_pairs", "full", "dora_rows", "dora_columns")


def random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def adapter(
    kind: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    rank: int = 2,
    alpha: float = 1.0,
) -> AdapterWeights:
    """``shape`` [O, I, *K] with even O and I."""
    out, in_, *kernel = shape

    def draw(*sizes: int) -> Tensor:
        return random(*sizes, generator=generator)

    if kind == "full":
        return FullWeights(draw(*shape))
    if kind == "loha":
        pairs = [draw(out, rank), draw(rank, in_, *kernel), draw(out, rank)]
        return LoHaWeights(*pairs, draw(rank, in_, *kernel), alpha)
    if kind.startswith("lokr"):
        small = (draw(2, 1), draw(1, 2)) if kind == "lokr_pairs" else draw(2, 2)
        if kind == "lokr_whole":
            return LoKrWeights(small, draw(out // 2, in_ // 2, *kernel), alpha)
        return LoKrWeights(small, (draw(out // 2, 1), draw(1, in_ // 2, *kernel)), alpha)
    lora = LoRAWeights(draw(rank, in_, *kernel), draw(out, rank), alpha)
    if kind == "dora_rows":
        return replace(lora, magnitude=draw(out, 1).abs() + 0.5)
    if kind == "dora_columns":
        return replace(lora, magnitude=draw(1, in_).abs() + 0.5)
    return lora


def layers(
    names: LayerNames,
    kind: str,
    generator: torch.Generator,
    *,
    unit: int = 8,
    in_features: int = 12,
    blocks: tuple[int, ...] = (0, 3),
) -> dict[str, AdapterWeights]:
    """An adapter for every module of the family that has a matrix, in these blocks."""
    found: dict[str, AdapterWeights] = {}
    for row in names.table:
        count = row.published.count("{}")
        if row.bare or "norm" in row.published:
            continue
        out = unit * sum(row.parts or (1,) * len(row.inner))
        for index in blocks if count else blocks[:1]:
            published = row.published.format(*[index] * count)
            found[published] = adapter(kind, (out, in_features), generator)
    return found
