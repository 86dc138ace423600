"""What is done to captions before they are encoded."""

from __future__ import annotations

import re


def replace_word(caption: str, word: str, other: str) -> str | None:
    """``caption`` with ``other`` everywhere instead of ``word``; None if it does not contain it.

    Only whole words count, upper and lower case are the same; ``word`` may be several.
    """
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    replaced, count = re.subn(pattern, lambda match: other, caption, flags=re.IGNORECASE)
    return replaced if count else None
