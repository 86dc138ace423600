"""Pictures of numbers, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .atomic_file import replacing
from .loss_history import Step

_SMOOTHING = 0.9


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


def save_loss_curve(path: Path, steps: Sequence[Step], *, title: str) -> None:
    """The loss of every optimizer step, its running mean, and the learning rate below.

    Raises:
        ValueError: there are no steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not steps:
        raise ValueError("no steps to plot")
    # A figure of its own: pyplot would keep global state and look for a screen.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    numbers = [step.step for step in steps]
    losses = [step.loss for step in steps]
    loss.plot(numbers, losses, color="#9db4d3", linewidth=0.8, label="each step")
    loss.plot(numbers, smoothed(losses), color="#1f4e8c", linewidth=2, label="running mean")
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0)
    loss.set_title(title)
    loss.legend(frameon=False)
    rate.plot(numbers, [step.learning_rate for step in steps], color="#b05a2c", linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("optimizer step")
    for axes in (loss, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
