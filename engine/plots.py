"""Pictures of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .figures import new_figure, picture_of
from .loss_history import Step

_SMOOTHING = 0.9
# Steps that the running mean of a loss curve is over: at least so many, or a share of the run.
_MEAN_STEPS, _MEAN_SHARE = 10, 0.02
_LIGHT, _DARK, _RATE, _WEIGHT = "#9db4d3", "#1f4e8c", "#b05a2c", "#3f7d4e"
_MEASURED = {"color": _WEIGHT, "marker": "o", "markersize": 4, "linewidth": 1.5}
# Labels of an axis; matplotlib's own would take a power of ten out of them.
_STEP_FORMAT, _RATE_FORMAT = "{x:,.0f}", "{x:.3g}"
_NARROW = 0.2  # ranges of time that are drawn larger
_TIME_AXIS = "flow time: 0 is the picture, 1 is pure noise"


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


def loss_curve(
    steps: Sequence[Step],
    *,
    title: str,
    validation: Sequence[tuple[int, float]] = (),
    mean: bool = True,
) -> Image.Image:
    """The loss of every optimizer step, its running mean, and the learning rate below.

    The mean is over more steps the longer the run is. A few spikes may be higher than the picture.

    Args:
        validation: (step, loss) of each measurement.
        mean: draw the running mean.

    Raises:
        ValueError: there are no steps.
    """
    if not steps:
        raise ValueError("no steps to plot")
    figure = new_figure()
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    numbers = [step.step for step in steps]
    losses = [step.loss for step in steps]
    highest = [float(np.quantile(losses, 0.99))]
    loss.plot(numbers, losses, color=_LIGHT, linewidth=0.8, label="each step")
    if mean:
        means = smoothed(losses, decay=1 - 1 / max(_MEAN_STEPS, len(steps) * _MEAN_SHARE))
        highest.append(max(means))
        loss.plot(numbers, means, color=_DARK, linewidth=2, label="running mean")
    if validation:
        measured, values = zip(*validation, strict=True)
        highest.append(max(values))
        loss.plot(measured, values, **_MEASURED, label="validation")
    loss.set_ylabel("loss")
    loss.set_ylim(0, 1.2 * max(highest) or 1)
    loss.set_title(title)
    loss.legend(frameon=False, loc="upper right", ncols=3)
    rate.plot(numbers, [step.learning_rate for step in steps], color=_RATE, linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(_RATE_FORMAT)
    rate.xaxis.set_major_formatter(_STEP_FORMAT)
    rate.set_xlabel("optimizer step")
    return picture_of(figure)


def loss_by_time(means: Sequence[float], counts: Sequence[int], *, title: str) -> Image.Image:
    """The mean loss in equal parts of the flow times [0, 1], and how many samples each is of.

    The mean of a part without samples is not looked at.

    Raises:
        ValueError: there are no samples.
    """
    if not sum(counts):
        raise ValueError("no samples to plot")
    figure = new_figure()
    loss, number = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 1, len(counts) + 1)
    heights = [mean if count else math.nan for mean, count in zip(means, counts, strict=True)]
    loss.stairs(heights, edges, color=_DARK, fill=True, alpha=0.8)
    loss.set_ylabel("mean loss")
    loss.set_ylim(bottom=0)
    loss.set_title(title)
    number.stairs(counts, edges, color=_LIGHT, fill=True)
    number.set_ylabel("samples")
    number.set_ylim(bottom=0)
    number.set_xlabel(_TIME_AXIS)
    number.set_xlim(0, 1)
    return picture_of(figure)


def schedule_curve(multipliers: Sequence[float], *, title: str) -> Image.Image:
    """What each optimizer step's learning rate is multiplied with."""
    numbers = range(1, len(multipliers) + 1)
    figure = _curve(numbers, multipliers, title=title)
    figure.axes[0].set_ylabel("part of the learning rate")
    return picture_of(figure)


def rate_curve(steps: Sequence[int], rates: Sequence[float], *, title: str) -> Image.Image:
    """The learning rate at some optimizer steps, counted from 1."""
    figure = _curve(steps, rates, title=title)
    figure.axes[0].set_ylabel("learning rate")
    figure.axes[0].yaxis.set_major_formatter(_RATE_FORMAT)
    return picture_of(figure)


def _curve(steps: Sequence[int], values: Sequence[float], *, title: str) -> Any:
    figure = new_figure()
    axes = figure.subplots()
    axes.plot(steps, values, color=_RATE, linewidth=2, drawstyle="steps-mid")
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_formatter(_STEP_FORMAT)
    axes.set_ylim(0, 1.05 * max(values) or 1)
    return figure


def time_histogram(
    times: Sequence[float],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
    edges: Sequence[float] = (),
) -> Image.Image:
    """How often each flow time is trained, and how much it counts.

    Args:
        low, high: the range that was asked for; the rest is shaded.
        weight: of the loss at a time [N]; None for none.
        edges: where parts that are trained equally often meet.
    """
    figure = new_figure()
    axes = figure.subplots()
    beside = high - low if high - low < _NARROW else 1.0  # a narrow range fills a third
    left, right = max(0.0, low - beside), min(1.0, high + beside)
    bins = max(33, round(100 * (high - low)))
    axes.hist(times, bins=bins, range=(low, high), density=True, color=_DARK, alpha=0.8)
    median = float(np.median(times))
    axes.axvline(median, color=_RATE, linewidth=2, label=f"half of all lie below {median:.3g}")
    for start, end in ((0.0, low), (high, 1.0)):
        if start < end:
            axes.axvspan(start, end, color="#888888", alpha=0.2, linewidth=0)
    for number, edge in enumerate(edges):
        label = None if number else "parts that are trained equally often"
        axes.axvline(edge, color="black", linewidth=1, linestyle=":", label=label)
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
    axes.set_title(title)
    axes.set_xlabel(_TIME_AXIS)
    axes.set_ylabel("density")
    axes.set_xlim(left, right)
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    return picture_of(figure)


def loss_functions(
    errors: Sequence[float], curves: Mapping[str, Sequence[float]], *, chosen: str
) -> Image.Image:
    """The loss that each error gives; the chosen one stands out."""
    figure = new_figure()
    axes = figure.subplots()
    for name, values in curves.items():
        if name == chosen:
            axes.plot(errors, values, color=_DARK, linewidth=2.5, label=name, zorder=3)
        else:
            axes.plot(errors, values, linewidth=1, alpha=0.7, label=name)
    axes.set_title(f"loss_type {chosen}")
    axes.set_xlabel("error of the velocity")
    axes.set_ylabel("loss")
    axes.set_ylim(0, 1.3 * max(curves[chosen]))
    axes.set_xlim(errors[0], errors[-1])
    axes.legend(frameon=False)
    return picture_of(figure)
