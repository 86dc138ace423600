from __future__ import annotations

import numpy as np
import pytest
from pack.engine.flow import LOSS_WEIGHTS
from pack.engine.loss_history import Step
from pack.engine.plots import (
    loss_by_time,
    loss_curve,
    loss_functions,
    rate_curve,
    schedule_curve,
    smoothed,
    time_histogram,
)
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


BLUE, PALE, BROWN, GREEN = (
    (0x1F, 0x4E, 0x8C),
    (0x9D, 0xB4, 0xD3),
    (0xB0, 0x5A, 0x2C),
    (0x3F, 0x7D, 0x4E),
)


def places(image: Image.Image, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows, counted downwards, and columns of the pixels of a colour."""
    rows, columns = (np.asarray(image) == colour).all(axis=2).nonzero()
    return rows, columns


def test_measurements_are_drawn_at_their_steps_and_the_running_mean_can_be_left_out() -> None:
    image = loss_curve(steps(300), title="a run", validation=[(150, 0.2), (300, 0.1)], mean=False)
    assert pixels_of(image, BLUE) == 0
    _, columns = places(image, BROWN)  # the learning rate spans all steps
    first, last = columns.min(), columns.max()
    rows, columns = places(image, GREEN)
    curve = rows > 100  # without the legend
    assert abs(columns[curve].min() - (first + last) / 2) < 8  # half of a marker
    assert abs(columns[curve].max() - last) < 8
    left, right = (
        rows[curve][columns[curve] == end].mean() for end in np.quantile(columns[curve], [0, 1])
    )
    assert left < right


def test_a_spike_does_not_press_the_curve_flat() -> None:
    """A validation loss of 1 is drawn as high with a spike in the training loss as without."""
    calm = [Step(n, 1, 1.0, 1e-4, 0.5, 0.1) for n in range(1, 401)]
    spiked = [*calm[:200], Step(201, 1, 1000.0, 1e-4, 0.5, 0.1), *calm[201:]]
    images = [
        loss_curve(run, title="a run", validation=[(1, 1.0), (400, 1.0)], mean=False)
        for run in (calm, spiked)
    ]
    rows = [np.sort(places(image, GREEN)[0]) for image in images]
    assert np.array_equal(*rows)


@pytest.mark.parametrize("losses", [[0.0], [0.0, 0.0, 0.0]])
def test_a_loss_of_nothing_can_be_drawn(losses: list[float]) -> None:
    run = [Step(n, 1, loss, 0.0, 0.5, 0.1) for n, loss in enumerate(losses, 1)]
    assert loss_curve(run, title="a run", validation=[(1, 0.0)]).size == (960, 540)


def test_the_loss_by_time_has_bars_where_there_are_samples() -> None:
    image = loss_by_time([9.0, 2.0, 1.0, float("nan")], [0, 10, 5, 0], title="a run")
    bars = np.asarray(image).astype(int)
    dark = bars[..., 2] - bars[..., 0] > 60
    _, columns = dark.nonzero()
    pale_rows, pale_columns = places(image, PALE)
    assert columns.min() == pale_columns.min() and abs(columns.max() - pale_columns.max()) <= 1
    heights = dark.sum(axis=0)
    quarter = (columns.max() - columns.min()) // 4
    # Twice the loss is twice as high; lines of the grid are within the bars.
    assert heights[columns.min() + quarter] == pytest.approx(
        2 * heights[columns.max() - quarter], rel=0.05
    )
    assert len(set(pale_rows)) > 50


def test_without_samples_there_is_no_loss_by_time() -> None:
    with pytest.raises(ValueError, match="no samples"):
        loss_by_time([0.0, 0.0], [0, 0], title="a run")


@pytest.mark.parametrize("numbers", [[1], [1, 50_000_000, 100_000_000]])
def test_the_rates_of_a_few_steps_are_a_curve(numbers: list[int]) -> None:
    image = rate_curve(numbers, [1e-4 / n for n in numbers], title="a schedule")
    assert image.size == (960, 540)
    assert pixels_of(image, BROWN) > (0 if len(numbers) == 1 else 100) - 1


def test_a_narrow_range_of_times_fills_a_third_of_the_picture_and_no_more() -> None:
    times = np.linspace(0.5, 0.52, 10_000).tolist()
    image = time_histogram(times, title="narrow", low=0.5, high=0.52)
    bars = np.asarray(image).astype(int)
    _, columns = (bars[..., 2] - bars[..., 0] > 60).nonzero()
    assert columns.max() - columns.min() == pytest.approx(image.width * 0.92 / 3, rel=0.05)


def test_where_equally_trained_parts_meet_there_are_lines() -> None:
    image = time_histogram([0.05] * 9, title="parts", edges=[0.5, 0.75])
    dark = (np.asarray(image).max(axis=2) < 60)[100:400]
    lines = [column for column in np.flatnonzero(dark.sum(axis=0) > 60) if column > 200]
    middle = np.split(lines, np.flatnonzero(np.diff(lines) > 3) + 1)
    assert len(middle) == 2
    distance = middle[1].mean() - middle[0].mean()
    assert distance == pytest.approx(image.width * 0.92 / 4, rel=0.05)


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


@pytest.mark.parametrize(("chosen", "half_way"), [("straight", 0.5), ("square", 0.25)])
def test_the_chosen_loss_stands_out_and_has_its_shape(chosen: str, half_way: float) -> None:
    errors = np.linspace(-2, 2, 401)
    curves = {"straight": np.abs(errors).tolist(), "square": np.square(errors).tolist()}
    image = loss_functions(errors.tolist(), curves, chosen=chosen)

    rows, columns = places(image, BLUE)
    # Without the legend, whose line is as dark: what is left of the middle.
    middle = columns[rows == rows.max()].mean()
    left = columns < middle
    top, bottom = rows[left].min(), rows.max()
    at_one = columns[left].min() + (middle - columns[left].min()) / 2
    height = bottom - rows[left & (np.abs(columns - at_one) < 2)].mean()
    # The line is a few pixels thick.
    assert height / (bottom - top) == pytest.approx(half_way, abs=0.03)
