"""Notices when a training has gone wrong."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 20  # steps whose losses are looked at together
_SUSPICIOUS = 0.4  # of the factor that counts as an explosion
_LAST = 5  # steps that show soon enough whether one may have begun


class Diverged(Exception):  # noqa: N818  it is caught where the run can go back
    """The loss of optimizer step ``step`` is NaN or part of an explosion."""

    def __init__(self, step: int, found: str) -> None:
        super().__init__(f"{found} at step {step}")
        self.step = step


class DivergenceGuard:
    """Compares the median loss of the last steps with the lowest such median of the run.

    A median, because a single noise level can have a loss a thousand times that of another. What
    is not above the first median is no explosion: a loss that was almost zero may rise.

    Args:
        factor: that many times the lowest is an explosion; 0 looks for NaN and infinity only.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._first = self._lowest = math.inf

    def observe(self, step: int, loss: float) -> None:
        """Take the loss of one optimizer step.

        Raises:
            Diverged: what happened, in words.
        """
        if not math.isfinite(loss):
            raise Diverged(step, f"the loss became {loss}")
        self._recent.append(loss)
        if len(self._recent) < WINDOW:
            return
        median = statistics.median(self._recent)
        if self._factor and median > max(self._factor * self._lowest, self._first):
            raise Diverged(
                step,
                f"the loss of {WINDOW} steps rose to {median:.4g}, from {self._lowest:.4g} at its "
                "lowest,",
            )
        self._first = median if math.isinf(self._first) else self._first
        self._lowest = min(self._lowest, median)

    @property
    def is_calm(self) -> bool:
        """Whether what is reached now is worth going back to; looks at the last few losses."""
        if not self._recent or not self._factor or math.isinf(self._lowest):
            return True
        suspicious = max(1.0, _SUSPICIOUS * self._factor) * self._lowest
        last = list(self._recent)[-_LAST:]
        return statistics.median(last) <= max(suspicious, self._first)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        medians = [None if math.isinf(value) else value for value in (self._first, self._lowest)]
        recent, calm = list(self._recent), self.is_calm
        return {"recent": recent, "first": medians[0], "lowest": medians[1], "calm": calm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; from the beginning if it is empty."""
        self._recent = deque(state.get("recent", ()), maxlen=WINDOW)
        first, lowest = state.get("first"), state.get("lowest")
        self._first = math.inf if first is None else first
        self._lowest = math.inf if lowest is None else lowest
