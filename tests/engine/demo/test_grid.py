from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.demo.grid import save_grid
from PIL import Image

COLOURS = ["red", "green", "blue"]


def test_the_grid_shows_every_picture_once_in_its_row_and_column(tmp_path: Path) -> None:
    tiles = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]

    save_grid(
        tmp_path / "grid.png", "title", COLOURS, {"before": tiles, "after": list(reversed(tiles))}
    )

    with Image.open(tmp_path / "grid.png") as sheet:
        areas = {
            colour: [
                (x, y)
                for y in range(0, sheet.height, 8)
                for x in range(0, sheet.width, 8)
                if sheet.getpixel((x, y)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
            ]
            for colour in COLOURS
        }
    # A tile of 224 pixels is met 28 x 28 times by a step of 8; each colour has two tiles.
    assert all(len(points) == 2 * 28 * 28 for points in areas.values())
    red_top = min(areas["red"], key=lambda point: point[1])
    red_bottom = max(areas["red"], key=lambda point: point[1])
    assert red_top[0] < red_bottom[0]


def test_a_row_with_another_number_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argument"):
        save_grid(tmp_path / "grid.png", "title", COLOURS, {"row": [Image.new("RGB", (64, 64))]})
    assert not list(tmp_path.iterdir())
