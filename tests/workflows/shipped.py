"""The workflow files and the recording, as the tests of this folder use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pack.workflows.source import record
from pack.workflows.source.files import WORKFLOWS
from pack.workflows.source.layout import Area, Box, Layout, Note
from pack.workflows.source.node_types import read_types
from pack.workflows.source.ui import NOTE, Workflow

FOLDER = Path(record.__file__).parents[1]
RECORDING = record.load()
TYPES = read_types(RECORDING)
NAMES = sorted(WORKFLOWS)


def read(name: str) -> Workflow:
    """A file by its path within ``workflows``, without the extension."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def layout_of(workflow: Workflow) -> Layout:
    """The places in a file, in the words of the source."""
    notes = [node for node in workflow["nodes"] if node["type"] == NOTE]
    return Layout(
        {node["id"]: _box(node) for node in workflow["nodes"]},
        [(Note(note["title"], note["widgets_values"][0]), _box(note)) for note in notes],
        [
            (Area(group["title"], group["color"], []), Box(*group["bounding"]))
            for group in workflow["groups"]
        ],
    )


def _box(node: dict[str, Any]) -> Box:
    return Box(*node["pos"], *node["size"])
