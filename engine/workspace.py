"""Memory that is used again and again, where fresh memory would cost as much as the arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Kept(threading.local):
    def __init__(self) -> None:
        self.pieces: dict[tuple[str, torch.dtype], Tensor] = {}


class Workspace:
    """Tensors without values, on a CPU in memory that is kept and grows to what was asked for.

    The system clears fresh memory, page by page: of the time to restore a weight of 14 million
    values that was more than half. What a GPU's allocator gives is fresh by name only.

    Each ``name`` is one piece of memory, which a later request takes over. Every thread has its
    own, and so can share the workspace with others.
    """

    def __init__(self) -> None:
        self._kept = _Kept()

    def empty(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous tensor that is the caller's until the next request of this name."""
        if device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        size = torch.Size(shape).numel()
        flat = self._kept.pieces.get((name, dtype))
        if flat is None or len(flat) < size:
            flat = self._kept.pieces[name, dtype] = torch.empty(size, dtype=dtype)
        return flat[:size].view(tuple(shape))

    def __deepcopy__(self, memo: dict[int, object]) -> Workspace:
        """There is nothing in it to copy."""
        return self
