from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.engine.buckets import bucket_sizes, nearest_bucket, own_size


def test_the_list_for_a_small_square() -> None:
    assert bucket_sizes((64, 64)) == [(32, 128), (48, 80), (64, 64), (80, 48), (128, 32)]


@pytest.mark.parametrize(
    ("resolution", "count", "first", "last"),
    [
        ((960, 544), 47, (352, 1472), (1472, 352)),
        ((1024, 1024), 65, (512, 2048), (2048, 512)),
        ((512, 512), 33, (256, 1024), (1024, 256)),
    ],
)
def test_the_lists_are_those_of_published_trainers(
    resolution: tuple[int, int], count: int, first: tuple[int, int], last: tuple[int, int]
) -> None:
    sizes = bucket_sizes(resolution)
    assert (len(sizes), sizes[0], sizes[-1]) == (count, first, last)


sides = st.integers(16, 4096)


@given(sides, sides)
def test_every_bucket_fits_the_area_and_the_step(width: int, height: int) -> None:
    sizes = bucket_sizes((width, height))
    assert sizes == sorted(set(sizes))
    for bucket in sizes:
        assert bucket[0] % 16 == 0 and bucket[1] % 16 == 0 and min(bucket) > 0
        assert bucket[0] * bucket[1] <= width * height
        assert bucket[::-1] in sizes


@given(sides, sides)
def test_wide_and_tall_images_are_treated_alike(width: int, height: int) -> None:
    sizes = bucket_sizes((1024, 1024))
    found = nearest_bucket((width, height), sizes)
    best = min(abs(math.log(w / h * height / width)) for w, h in sizes)
    assert abs(math.log(found[0] / found[1] * height / width)) == pytest.approx(best)
    turned = nearest_bucket((height, width), sizes)
    assert abs(math.log(turned[0] / turned[1] * width / height)) == pytest.approx(best)


def test_a_full_hd_image_gets_the_wide_bucket() -> None:
    assert nearest_bucket((1920, 1080), bucket_sizes((960, 544))) == (960, 544)


def test_an_own_size_never_vanishes() -> None:
    assert own_size((100, 63)) == (96, 48)
    assert own_size((10, 1000)) == (16, 992)
