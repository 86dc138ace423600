"""The mean loss at each noise level over a whole run, gathered without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NUM_BINS = 20
_WITHOUT_FLOAT64 = ("mps", "xpu")


class TimeStatistics:
    """Sums and numbers of losses in equal parts of the flow times [0, 1].

    Owned by one run; its tensors stay on the device.
    """

    def __init__(self, device: torch.device | str = "cpu", *, num_bins: int = NUM_BINS) -> None:
        device = torch.device(device)
        dtype = torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64
        self.loss_sum = torch.zeros(num_bins, dtype=dtype, device=device)
        self.count = torch.zeros(num_bins, dtype=torch.int64, device=device)
        self._bins = torch.arange(num_bins, device=device)

    @torch.no_grad()
    def add(self, t_B: Tensor, loss_B: Tensor) -> None:
        """Count each sample's loss at its time."""
        num_bins = len(self._bins)
        bin_B = (t_B * num_bins).long().clamp(0, num_bins - 1)
        # A sum over a table, because adding by index has no fixed order on a GPU.
        hit_BN = bin_B[:, None] == self._bins
        loss_B1 = loss_B.to(self.loss_sum.dtype)[:, None]
        self.loss_sum += torch.where(hit_BN, loss_B1, 0).sum(0)
        self.count += hit_BN.sum(0)

    def state(self) -> dict[str, Tensor]:
        """What `load` takes; not copied."""
        return {"loss_sum": self.loss_sum, "count": self.count}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of earlier, or from nothing if it is empty."""
        self.loss_sum.zero_()
        self.count.zero_()
        if tensors:
            self.loss_sum.copy_(tensors["loss_sum"])
            self.count.copy_(tensors["count"])
