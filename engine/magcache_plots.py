"""Pictures of MagCache: a curve with its plan, and what speed costs in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from .figures import new_figure, picture_of
from .magcache import Plan, describe

_LIGHT, _DARK, _ERROR = "#9db4d3", "#1f4e8c", "#b05a2c"
_MARKERS = "osD^vPX"


class Quality(NamedTuple):
    """How many times faster than all steps a plan is, and how near to their picture it comes."""

    speedup: float
    value: float


def curve_and_plan(
    ratios: Mapping[str, Sequence[float]], plan: Plan, *, title: str, other_cost: float = 0.0
) -> Image.Image:
    """The ratio of every step, and below what each skipped step is wrong by.

    Args:
        ratios: of each branch of the guidance, one for each step of the plan.
        other_cost: as for `Plan.speedup`.
    """
    figure = new_figure()
    curve, error = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, plan.steps + 1)
    computed = [step for step, now in zip(steps, plan.computed, strict=True) if now]
    for step in computed:
        for axes in (curve, error):
            axes.axvspan(step - 0.5, step + 0.5, color=_LIGHT, alpha=0.35, linewidth=0)
    for index, (branch, values) in enumerate(ratios.items()):
        style = {"marker": "o", "markersize": 4} if index == 0 else {"linestyle": "--"}
        colour = _DARK if index == 0 else _ERROR
        curve.plot(steps, values, color=colour, linewidth=1.5, label=branch, **style)
    curve.axhline(1, color="black", linewidth=0.8, alpha=0.5)
    curve.set_ylabel("residual / the one before")
    curve.set_title(f"{title}: {describe(plan, other_cost=other_cost)}")
    if len(ratios) > 1:
        curve.legend(frameon=False)
    error.bar(steps, plan.errors, color=_ERROR, width=0.8)
    error.set_ylabel("magnitude error")
    error.set_ylim(0, 1.15 * max(plan.errors) or 1)
    error.set_xlim(0.5, plan.steps + 0.5)
    error.set_xlabel(f"sampling step; shaded ones are computed; the errors sum to {plan.error:.3g}")
    _whole_numbers(error)
    return picture_of(figure)


def quality_curves(
    curves: Mapping[str, Sequence[Quality]], *, title: str, measure: str
) -> Image.Image:
    """What each way to skip keeps of the quality, by its speed.

    Args:
        measure: what the values are, with their unit.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(curves.values()):
        raise ValueError("no qualities to plot")
    figure = new_figure()
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        axes.plot(
            [point.speedup for point in ordered],
            [point.value for point in ordered],
            marker=_MARKERS[index % len(_MARKERS)],
            linewidth=1.5,
            label=name,
        )
    axes.set_title(title)
    axes.set_xlabel("steps / computed steps")
    axes.set_ylabel(measure)
    axes.legend(frameon=False)
    return picture_of(figure)


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
