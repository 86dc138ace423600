"""Back to the last good state of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import optimizer_state, training_state
from ..training_state import Progress
from .build import Built
from .outputs import RunFiles
from .saving import STATISTICS


class GoodStates:
    """The states that a run can go back to: those on disk, and the one that it began with.

    Args:
        start: where it began; empty progress for a new run.
    """

    def __init__(self, built: Built, files: RunFiles, start: Progress) -> None:
        self._built, self._files, self._start = built, files, start
        # In memory, because the file that the run continues from will be replaced.
        take_step = built.take_step
        self._tensors: dict[str, Tensor] = {}
        self._optimizer = optimizer_state.pack(take_step.optimizer, self._tensors)
        self._tensors = {name: _copied(tensor) for name, tensor in self._tensors.items()}
        self._weights = [_copied(weight) for weight in take_step.parameters]
        self._statistics = {
            name: _copied(tensor) for name, tensor in take_step.statistics.state().items()
        }

    def restore(self, before: int) -> Progress:
        """Put the newest one of fewer than ``before`` steps into the run."""
        paths = [self._files.state, *self._files.numbered(".state")]
        good: list[tuple[int, Path]] = []
        for path in paths:
            if path.exists():
                saved = training_state.read_progress(path)
                calm = saved.extra.get("guard", {}).get("calm", True)
                if calm and self._start.step < saved.step < before:
                    good.append((saved.step, path))
        if good:
            return load(max(good)[1], self._built)
        take_step = self._built.take_step
        with torch.no_grad():
            for parameter, weight in zip(take_step.parameters, self._weights, strict=True):
                parameter.copy_(weight)
        optimizer_state.unpack(take_step.optimizer, self._optimizer, self._tensors)
        take_step.statistics.load(self._statistics)
        return self._start


def load(path: Path, built: Built) -> Progress:
    """Put a saved state into a run of the same recipe.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    take_step = built.take_step
    progress, extra = training_state.load_state(
        path, built.network, take_step.optimizer, take_step.scaler
    )
    take_step.statistics.load(_without_prefix(extra))
    return progress


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(STATISTICS): tensor for name, tensor in tensors.items()}
