"""The measures against drawings whose content is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pack.engine.demo import concept, measure
from pack.engine.demo.pictures import BACKGROUNDS, Picture, all_pictures
from PIL import Image

SAMPLE = random.Random(0).sample(all_pictures(), 60)


def test_colours_of_drawn_pictures_are_found() -> None:
    for picture in SAMPLE:
        image = picture.draw(random.Random(1))

        assert measure.background_name(image) == picture.background
        assert measure.colour_name(image, picture.background) == picture.colour


def test_an_empty_picture_has_no_colour_and_no_overlap() -> None:
    picture = SAMPLE[0]
    empty = Image.new("RGB", (64, 64), BACKGROUNDS[picture.background])

    assert measure.colour_name(empty, picture.background) is None
    assert measure.overlap(empty, picture) == 0


def test_the_ideal_picture_overlaps_itself_almost_completely() -> None:
    for picture in SAMPLE:
        # Pixels that an edge cuts in half fall on either side; a small star has 72 in all.
        assert measure.overlap(picture.draw(), picture) > 0.9


def test_a_shape_moved_by_half_its_width_overlaps_by_a_third() -> None:
    here = Picture("square", "white", "black", "medium", "center")
    image = here.draw()
    side = 2 * 0.85 * 16

    moved = image.transform((64, 64), Image.Transform.AFFINE, (1, 0, side / 2, 0, 1, 0))

    assert measure.overlap(moved, here) == pytest.approx(1 / 3, abs=0.03)


def test_similarity_is_one_for_equal_pictures_and_symmetric() -> None:
    first, second = SAMPLE[0].draw(), SAMPLE[1].draw()

    assert measure.similarity(first, first) == pytest.approx(1, abs=1e-5)
    assert measure.similarity(first, second) == pytest.approx(
        measure.similarity(second, first), abs=1e-5
    )
    assert measure.similarity(first, second) < 0.9


def test_similarity_equals_the_published_formula_written_as_loops() -> None:
    noise = np.random.default_rng(0)
    first = noise.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    second = np.clip(first + noise.integers(-40, 40, first.shape), 0, 255).astype(np.uint8)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        x, y = first[..., channel] / 255, second[..., channel] / 255
        for row in range(6):
            for column in range(6):
                a, b = (
                    x[row : row + 11, column : column + 11],
                    y[row : row + 11, column : column + 11],
                )
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                variance_a = (window * (a - mean_a) ** 2).sum()
                variance_b = (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 0.01**2)
                    * (2 * covariance + 0.03**2)
                    / (mean_a**2 + mean_b**2 + 0.01**2)
                    / (variance_a + variance_b + 0.03**2)
                )

    found = measure.similarity(Image.fromarray(first), Image.fromarray(second))

    assert found == pytest.approx(float(np.mean(values)), abs=1e-4)


def test_eyes_are_found_in_loomlings_and_not_in_plain_shapes() -> None:
    for creature in (*concept.TRAIN, *concept.HELD_OUT):
        words = (creature.colour, creature.background, creature.size, creature.position)

        assert measure.has_eye(creature.draw(random.Random(2)), creature)
        for shape in ("circle", "ring", "cross"):
            assert not measure.has_eye(Picture(shape, *words).draw(), creature)
