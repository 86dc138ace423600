"""Dropouts between the two factors of a LoRA.

The draws come from PyTorch's global generators, which gradient checkpointing restores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .adapter import Adapter


def drop(adapter: Adapter, hidden: Tensor, *, rank_dim: int) -> tuple[Tensor, float]:
    """What is left of the values [B, ...] of a LoRA's ranks, and the scale that goes with it.

    First the whole adapter, then single values, then ranks of each sample are dropped.
    """
    if not adapter.is_dropping:
        return hidden, adapter.scale
    dropouts = adapter.dropouts
    keeps_module = adapter.module_mask()
    if dropouts.neuron:
        hidden = F.dropout(hidden, dropouts.neuron)
    if dropouts.rank:
        shape = [1] * hidden.dim()
        shape[0], shape[rank_dim] = hidden.shape[0], hidden.shape[rank_dim]
        hidden = hidden * (torch.rand(shape, device=hidden.device) >= dropouts.rank)
    if keeps_module is not None:
        hidden = hidden * keeps_module
    # The rescaling goes with the scale, a number: in bf16 a mask of 1 / 0.9 would be off by 0.2 %.
    return hidden, adapter.scale / (1 - dropouts.rank)


def row_mask(adapter: Adapter, num_rows: int, device: torch.device) -> Tensor | None:
    """Which output rows of a LoHa or LoKr are left, rescaled, in float32; None means all."""
    rank = adapter.dropouts.rank
    if not (adapter.training and rank):
        return None
    return (torch.rand(num_rows, device=device) >= rank) / (1 - rank)
