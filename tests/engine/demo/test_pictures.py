"""The pictures that the tiny base model is trained on."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pack.engine.demo.pictures import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    POSITIONS,
    SIZES,
    Picture,
    all_pictures,
    edit,
)

PICTURES = all_pictures()


def test_about_one_combination_in_ten_is_held_out() -> None:
    share = sum(picture.held_out for picture in PICTURES) / len(PICTURES)

    # 26 of the 256 values of the hash's first byte are multiples of ten.
    assert share == pytest.approx(26 / 256, abs=4 * (0.1 * 0.9 / len(PICTURES)) ** 0.5)


def test_every_word_is_trained_on_in_other_combinations() -> None:
    trained = [picture for picture in PICTURES if not picture.held_out]

    assert {p.shape for p in trained} == OUTLINES.keys()
    assert {p.colour for p in trained} == COLOURS.keys()
    assert {p.background for p in trained} == BACKGROUNDS.keys()
    assert {p.size for p in trained} == SIZES.keys()
    assert {p.position for p in trained} == POSITIONS.keys()


@pytest.mark.parametrize("template", [0, 1, 2])
def test_a_full_caption_names_everything_in_the_picture(template: int) -> None:
    picture = Picture("star", "red", "mint", "large", "top left")

    caption = picture.caption(template)

    assert all(word in caption for word in ("star", "red", "mint", "large", "top left"))


def test_orange_things_have_the_right_article() -> None:
    picture = Picture("star", "orange", "gray", "small", "top")

    captions = {picture.any_caption(random.Random(seed)) for seed in range(200)}

    assert any(caption.startswith("an orange star") for caption in captions)
    assert not any("a orange" in caption for caption in captions)


def test_jitter_is_reproducible_and_moves_the_shape_by_a_pixel_at_most() -> None:
    picture = Picture("circle", "white", "black", "medium", "center")

    ideal = np.asarray(picture.mask()) >= 128
    for seed in range(20):
        drawn = picture.draw(random.Random(seed))
        assert drawn.tobytes() == picture.draw(random.Random(seed)).tobytes()
        rows, columns = np.nonzero(np.asarray(drawn.convert("L")) > 128)
        middle = np.array([rows.mean(), columns.mean()])
        wanted = np.array([axis.mean() for axis in np.nonzero(ideal)])
        # Up to 1 px, and half a pixel for what the threshold does at the edge.
        assert np.abs(middle - wanted).max() <= 1.5


@pytest.mark.parametrize("shape", list(OUTLINES))
def test_every_shape_lies_inside_the_picture_at_its_largest(shape: str) -> None:
    for position in POSITIONS:
        mask = np.asarray(Picture(shape, "red", "gray", "large", position).mask())

        assert mask.any()
        assert not any(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def test_an_edit_changes_one_thing_into_a_picture_that_may_be_learned() -> None:
    chance = random.Random(0)
    found = [(p, edit(p, chance)) for p in chance.choices(PICTURES, k=300)]
    edits = [(before, *pair) for before, pair in found if pair]

    assert len(edits) > 200
    for before, after, instruction in edits:
        changed = [
            name for name in before.__dict__ if getattr(before, name) != getattr(after, name)
        ]
        assert len(changed) == 1
        assert getattr(after, changed[0]) in instruction
        assert not after.held_out
