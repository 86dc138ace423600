from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pack.engine.loss_history import Step
from pack.engine.plots import save_loss_curve, smoothed
from PIL import Image


def steps(count: int) -> list[Step]:
    return [Step(n, 1, 1 / n, 1e-4, 0.5, 0.1) for n in range(1, count + 1)]


def test_the_running_mean_of_a_constant_is_that_constant_from_the_first_step() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)


def test_the_running_mean_weighs_older_values_less() -> None:
    # Weights 1, 1/2, 1/4 from the newest back: (4 + 2/2 + 1/4) / (1 + 1/2 + 1/4).
    assert smoothed([1.0, 2.0, 4.0], decay=0.5)[-1] == pytest.approx(5.25 / 1.75)


@pytest.mark.parametrize("count", [1, 300])
def test_a_loss_curve_is_a_picture_with_both_lines_in_it(tmp_path: Path, count: int) -> None:
    save_loss_curve(tmp_path / "curve.png", steps(count), title="a run")

    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.size == (960, 540)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    if count > 1:
        for colour in ((0x1F, 0x4E, 0x8C), (0xB0, 0x5A, 0x2C)):
            assert (pixels == colour).all(axis=1).sum() > 100
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_run_without_steps_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no steps"):
        save_loss_curve(tmp_path / "curve.png", [], title="a run")
