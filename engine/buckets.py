"""Image sizes for training: every one about the same area, so that memory use is even."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]  # width, height in pixels


def bucket_sizes(resolution: Size, *, step: int = 16) -> list[Size]:
    """All sizes of about the area of ``resolution`` with sides that are multiples of ``step``.

    From half to twice the side of the square, in ascending order; the list that trainers of this
    field use. Never empty.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes: set[Size] = set()
    first = _floor(side // 2, step)
    for width in range(first, side + step, step):
        if width and (height := _floor(area // width, step)):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes) or [(step, step)]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of ``size``.

    Ratios are compared by their logarithm, which treats wide and tall images alike.
    """
    wanted = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - wanted))


def own_size(size: Size, *, step: int = 16) -> Size:
    """``size`` with both sides cut to multiples of ``step``, at least one step each."""
    return max(step, _floor(size[0], step)), max(step, _floor(size[1], step))


def _floor(value: int, step: int) -> int:
    return value // step * step
