from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pack.engine.media import to_image
from PIL import Image


@pytest.fixture
def images(load: Callable[[str], Any]) -> Any:
    return load("images")


def test_pictures_become_a_batch_from_0_to_1(images: Any) -> None:
    pictures = [Image.new("RGB", (3, 2), color) for color in ((255, 0, 51), (0, 102, 255))]
    pictures[1].putpixel((2, 0), (255, 255, 255))
    batch = images.to_comfy(pictures)
    assert batch.shape == (2, 2, 3, 3) and batch.dtype == torch.float32
    assert torch.equal(batch[0, 1, 2], torch.tensor([255, 0, 51]) / 255)
    assert batch[1, 0, 2].tolist() == [1, 1, 1] and batch[1, 1, 2, 0] == 0


def test_a_picture_of_another_kind_has_three_colours_too(images: Any) -> None:
    batch = images.to_comfy([Image.new("L", (1, 1), 255), Image.new("RGBA", (1, 1), "red")])
    assert batch.tolist() == [[[[1, 1, 1]]], [[[1, 0, 0]]]]


def test_pixels_of_the_engine_are_those_of_its_pictures(images: Any) -> None:
    levels = torch.arange(256) / 127.5 - 1
    pixels_CHW = torch.stack([levels, levels.flip(0), levels.roll(7)])[:, None]
    batch = images.as_comfy(pixels_CHW[None])
    assert batch.shape == (1, 1, 256, 3)
    assert torch.allclose(batch, images.to_comfy([to_image(pixels_CHW)]), atol=1e-5)


def test_a_batch_becomes_the_pictures_that_it_was_made_from(images: Any) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(16, 16, 3)
    pictures = [Image.fromarray(levels.numpy()), Image.new("RGB", (16, 16), "orange")]
    again = images.from_comfy(images.to_comfy(pictures))
    assert [picture.tobytes() for picture in again] == [each.tobytes() for each in pictures]


def test_values_that_no_picture_has_are_cut(images: Any) -> None:
    [picture] = images.from_comfy(torch.tensor([-0.5, 0.5, 1.5]).reshape(1, 1, 1, 3))
    assert picture.getpixel((0, 0)) == (0, 128, 255)
