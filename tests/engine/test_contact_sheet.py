from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pack.engine.contact_sheet import contact_sheet
from pack.engine.manifest import Sample
from PIL import Image


def samples(folder: Path, count: int) -> list[Sample]:
    """Pictures of one colour each; the first is red, the last blue."""
    made: list[Sample] = []
    for index in range(count):
        share = index / max(1, count - 1)
        colour = (round(255 * (1 - share)), 0, round(255 * share))
        path = folder / f"{index:03d}.png"
        size = (64, 32) if index % 2 else (48, 48)
        Image.new("RGB", size, colour).save(path)
        made.append(Sample(path, f"picture number {index} of many", size))
    return made


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 2, 2), (20, 5, 4)])
def test_the_grid_is_about_square(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    one = contact_sheet(samples(tmp_path, 1))
    sheet = contact_sheet(samples(tmp_path, count))
    gap = 12
    assert sheet.width == gap + columns * (one.width - gap)
    assert sheet.height == gap + rows * (one.height - gap)


def test_a_large_dataset_is_sampled_from_its_whole_length(tmp_path: Path) -> None:
    pixels = np.asarray(contact_sheet(samples(tmp_path, 100), limit=10)).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=2)
    blue = (pixels[..., 2] > 200) & (pixels[..., :2] < 60).all(axis=2)
    assert red.sum() > 20_000 and blue.sum() > 20_000


def test_the_shape_of_a_picture_is_kept(tmp_path: Path) -> None:
    [_, wide] = samples(tmp_path, 2)
    pixels = np.asarray(contact_sheet([wide])).astype(int)
    blue = (pixels[..., 2] > 200) & (pixels[..., :2] < 60).all(axis=2)
    rows, columns = (np.ptp(where) + 1 for where in blue.nonzero())
    assert columns / rows == pytest.approx(2, rel=0.02)


def test_without_samples_there_is_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="no samples"):
        contact_sheet([])
