"""Tests of MagCache's pictures: that what is computed and what is wrong is there."""

from __future__ import annotations

import numpy as np
import pytest
from pack.engine.magcache import full_plan, greedy_plan, planned
from pack.engine.magcache_curves import CONDITIONAL, UNCONDITIONAL, published_curve
from pack.engine.magcache_plots import Quality, curve_and_plan, quality_curves
from PIL import Image

ERROR = (0xB0, 0x5A, 0x2C)


def columns_of(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """How many pixels of each column have the colour."""
    return (np.asarray(image) == colour).all(axis=-1).sum(axis=0)


def test_every_skipped_step_has_a_bar() -> None:
    plan = planned([1.0, 0.5, 0.5, 1.0, 0.75, 1.0], [True, False, False, True, False, True])
    picture = curve_and_plan({CONDITIONAL: [1.0] * 6}, plan, title="tiny")
    heights = columns_of(picture, ERROR)
    columns = np.flatnonzero(heights > 5)
    bars = np.split(
        columns, np.flatnonzero(np.diff(columns) > 10) + 1
    )  # lines of the grid are thin
    # The errors are 0.5, 0.75 and 0.25.
    tall = [heights[bar].max() for bar in bars]
    assert tall == pytest.approx([2 * tall[2], 3 * tall[2], tall[2]], abs=6)


def test_a_plan_without_errors_has_no_bars() -> None:
    picture = curve_and_plan({CONDITIONAL: [1.0] * 4}, full_plan(4), title="tiny")
    assert not columns_of(picture, ERROR).any()


def test_two_branches_of_a_published_curve_are_drawn() -> None:
    curve = published_curve("wan", variant="Wan2.1 T2V 14B")
    assert curve
    plan = greedy_plan(curve.of(CONDITIONAL), curve.steps)
    one = curve_and_plan({CONDITIONAL: curve.of(CONDITIONAL)}, plan, title="Wan")
    two = curve_and_plan(curve.ratios, plan, title="Wan")
    assert set(curve.ratios) == {CONDITIONAL, UNCONDITIONAL}
    assert one.size == two.size and one.tobytes() != two.tobytes()


def test_qualities_are_drawn_for_every_way() -> None:
    curves = {
        "reuse": [Quality(2.0, 25.0), Quality(1.5, 30.0)],
        "linear": [Quality(1.5, 40.0)],
    }
    picture = quality_curves(curves, title="tiny", measure="PSNR in dB")
    assert np.asarray(picture).std() > 0
    with pytest.raises(ValueError, match="no qualities"):
        quality_curves({"reuse": []}, title="tiny", measure="PSNR in dB")
