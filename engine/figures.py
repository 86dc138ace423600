"""Figures of matplotlib as pictures, without a screen."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def new_figure(width_inches: float = 8, height_inches: float = 4.5, *, dpi: int = 120) -> Any:
    """A figure of its own: pyplot would keep global state and look for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture_of(figure: Any, *, grid: bool = True) -> Image.Image:
    """The figure as it is drawn, with only two sides of a frame."""
    for axes in figure.axes:
        # A second scale would have its own grid.
        if grid and axes.yaxis.get_ticks_position() == "left":
            axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
