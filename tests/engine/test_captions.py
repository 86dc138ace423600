from __future__ import annotations

import pytest
from pack.engine.captions import replace_word


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("ohwx running", "dog running"),
        ("a photo of OHWX, and Ohwx", "a photo of dog, and dog"),
        ("ohwx's ball (ohwx)", "dog's ball (dog)"),
        ("the ohwxes", None),
        ("my_ohwx", None),
        ("nothing of it", None),
        ("", None),
    ],
)
def test_whole_words_are_replaced_and_nothing_else(caption: str, expected: str | None) -> None:
    assert replace_word(caption, "ohwx", "dog") == expected


def test_words_are_no_patterns() -> None:
    assert replace_word("a c++ logo, cc", "c++", r"\1 \g<0>") == r"a \1 \g<0> logo, cc"
    assert replace_word("a [x]", "[x]", "y") == "a y"
    assert replace_word("two words here", "two words", "one") == "one here"
    assert replace_word("größe GRÖSSE größer", "größe", "x") == "x GRÖSSE größer"
