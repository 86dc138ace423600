from __future__ import annotations

import numpy as np
import pytest
from pack.engine.flow import LOSS_WEIGHTS
from pack.engine.loss_history import Step
from pack.engine.plots import loss_curve, schedule_curve, smoothed, time_histogram
from PIL import Image


def steps(count: int) -> list[Step]:
    return [Step(n, 1, 1 / n, 1e-4, 0.5, 0.1) for n in range(1, count + 1)]


def test_the_running_mean_of_a_constant_is_that_constant_from_the_first_step() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)


def test_the_running_mean_weighs_older_values_less() -> None:
    # Weights 1, 1/2, 1/4 from the newest back: (4 + 2/2 + 1/4) / (1 + 1/2 + 1/4).
    assert smoothed([1.0, 2.0, 4.0], decay=0.5)[-1] == pytest.approx(5.25 / 1.75)


def pixels_of(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image).reshape(-1, 3) == colour).all(axis=1).sum())


@pytest.mark.parametrize("count", [1, 300])
def test_a_loss_curve_is_a_picture_with_both_lines_in_it(count: int) -> None:
    image = loss_curve(steps(count), title="a run")

    assert image.mode == "RGB" and image.size == (960, 540)
    if count > 1:
        for colour in ((0x1F, 0x4E, 0x8C), (0xB0, 0x5A, 0x2C)):
            assert pixels_of(image, colour) > 100


def test_a_run_without_steps_has_no_curve() -> None:
    with pytest.raises(ValueError, match="no steps"):
        loss_curve([], title="a run")


def test_a_schedule_that_rises_is_drawn_lower_on_the_left() -> None:
    image = schedule_curve([0.25, 0.5, 0.75, 1.0] + [1.0] * 96, title="warm-up")

    rows, columns = np.nonzero((np.asarray(image) == (0xB0, 0x5A, 0x2C)).all(axis=2))
    left, right = rows[columns < columns.min() + 4], rows[columns > columns.max() - 4]
    assert left.min() > right.max()  # rows count downwards


def test_a_histogram_of_late_times_is_drawn_on_the_right() -> None:
    generator = np.random.default_rng(0)
    image = time_histogram(generator.uniform(0.9, 1, 10_000).tolist(), title="late")

    bars = np.asarray(image).astype(int)
    blue = (bars[..., 2] - bars[..., 0] > 60).nonzero()[1]
    assert blue.min() > image.width * 0.8


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_the_weight_of_the_loss_is_drawn_and_the_rest_of_the_range_shaded(name: str) -> None:
    image = time_histogram([0.3, 0.5], title="part", low=0.2, high=0.6, weight=LOSS_WEIGHTS[name])
    assert pixels_of(image, (0x3F, 0x7D, 0x4E)) > 200
    assert pixels_of(image, (231, 231, 231)) > 20_000
