"""Pictures of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .loss_history import Step

_SMOOTHING = 0.9
_LIGHT, _DARK, _RATE, _WEIGHT = "#9db4d3", "#1f4e8c", "#b05a2c", "#3f7d4e"


def smoothed(values: Sequence[float], *, decay: float = _SMOOTHING) -> list[float]:
    """Running mean in which a value ``n`` steps back weighs ``decay ** n``, without start-up bias.

    Each mean is divided by the sum of its weights, as in Adam (Kingma and Ba 2015,
    arXiv:1412.6980, section 3).
    """
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def loss_curve(steps: Sequence[Step], *, title: str) -> Image.Image:
    """The loss of every optimizer step, its running mean, and the learning rate below.

    Raises:
        ValueError: there are no steps.
    """
    if not steps:
        raise ValueError("no steps to plot")
    figure = _figure()
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    numbers = [step.step for step in steps]
    losses = [step.loss for step in steps]
    loss.plot(numbers, losses, color=_LIGHT, linewidth=0.8, label="each step")
    loss.plot(numbers, smoothed(losses), color=_DARK, linewidth=2, label="running mean")
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0)
    loss.set_title(title)
    loss.legend(frameon=False)
    rate.plot(numbers, [step.learning_rate for step in steps], color=_RATE, linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("optimizer step")
    return _drawn(figure)


def schedule_curve(multipliers: Sequence[float], *, title: str) -> Image.Image:
    """What each optimizer step's learning rate is multiplied with."""
    figure = _figure()
    axes = figure.subplots()
    numbers = range(1, len(multipliers) + 1)
    axes.plot(numbers, multipliers, color=_RATE, linewidth=2, drawstyle="steps-mid")
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("part of the learning rate")
    axes.set_ylim(0, 1.05 * max(multipliers))
    return _drawn(figure)


def time_histogram(
    times: Sequence[float],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Image.Image:
    """How often each flow time is trained, and how much it counts.

    Args:
        low, high: the range that was asked for; the rest is shaded.
        weight: of the loss at a time [N]; None for none.
    """
    figure = _figure()
    axes = figure.subplots()
    axes.hist(times, bins=100, range=(0, 1), density=True, color=_DARK, alpha=0.8)
    median = float(np.median(times))
    axes.axvline(median, color=_RATE, linewidth=2, label=f"half of all lie below {median:.2f}")
    for start, end in ((0.0, low), (high, 1.0)):
        if start < end:
            axes.axvspan(start, end, color="#888888", alpha=0.2, linewidth=0)
    if weight:
        grid = torch.linspace(max(low, 0.01), high, 400)
        weights = weight(grid)
        other = axes.twinx()
        other.plot(grid, weights, color=_WEIGHT, linewidth=2, label="weight of the loss")
        other.set_ylabel("weight of the loss")
        if weights.max() > 20 * weights.min():
            other.set_yscale("log")
        else:
            other.set_ylim(0, 1.25 * weights.max().item())
        other.legend(frameon=False, loc="upper center")
    axes.set_title(title)
    axes.set_xlabel("flow time: 0 is the picture, 1 is pure noise")
    axes.set_ylabel("density")
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, loc="upper left")
    return _drawn(figure)


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own: pyplot would keep global state and look for a screen.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: Any) -> Image.Image:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
