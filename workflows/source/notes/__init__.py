"""The texts on the canvas, one Markdown file per workflow; its top headings are their titles."""

from __future__ import annotations

import re
from pathlib import Path

from ..layout import Note

_HEADING = re.compile(r"^# (.+)\n", re.MULTILINE)
# A line that neither begins a paragraph nor an entry of a list goes on with the one before.
_WRAPPED = re.compile(r"(?<=[^\n])\n {0,2}(?=[^\s\-#])")


def load(workflow: str) -> dict[str, Note]:
    """The notes by title, with each paragraph on one line: the canvas has its own width."""
    text = Path(__file__).with_name(f"{workflow}.md").read_text("utf-8")
    _, *parts = _HEADING.split(text)
    return {
        title: Note(title, _WRAPPED.sub(" ", body.strip()) + "\n")
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }
