from __future__ import annotations

import pytest
from pack.engine.text_charts import Row, bar_chart


def test_the_longest_bar_ends_at_the_width_and_the_others_are_in_proportion() -> None:
    rows = [Row(("a", "10"), 10.0), Row(("bb", "5"), 5.0), Row(("c", "0"), 0.0)]
    assert bar_chart(("name", "count"), rows, width=33).splitlines() == [
        "name  count",
        f"   a     10  {'#' * 20}",
        f"  bb      5  {'#' * 10}",
        "   c      0",
    ]


def test_a_small_value_is_told_from_none() -> None:
    text = bar_chart(("x",), [Row(("1",), 1.0), Row(("2",), 1e-6), Row(("3",), 0.0)], width=40)
    assert [line[3:] for line in text.splitlines()[2:]] == [".", ""]


@pytest.mark.parametrize("width", [0, 20, 300])
def test_a_chart_is_readable_in_any_terminal(width: int) -> None:
    lines = bar_chart(("level", "share"), [Row(("0.5", "1 %"), 3.0)], width=width).splitlines()
    assert len(lines[1]) == max(24, width)  # a bar has ten characters at least
    assert lines[1] == "  0.5    1 %".ljust(14) + "#" * (len(lines[1]) - 14)
    assert all(line.isascii() for line in lines)


def test_a_chart_of_nothing_is_its_headings() -> None:
    assert bar_chart(("a", "b"), [], width=80) == "a  b"
    assert bar_chart(("a",), [Row(("1",), 0.0)], width=80) == "a\n1"
