"""All workflow files with their content."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from . import demo, flux_kontext
from .api import to_api
from .graph import Builder
from .layout import Area, arrange
from .node_types import read_types
from .ui import to_ui

Rows = list[list[Area]]
WORKFLOWS: dict[str, Callable[[Builder], Rows]] = {
    "demo_train_and_generate": demo.build,
    "flux_kontext_train_and_generate": flux_kontext.build,
}


def all_files(object_info: Mapping[str, Any]) -> dict[str, str]:
    """Contents by path within ``workflows``: each workflow for the canvas and as a prompt."""
    types = read_types(object_info)
    files: dict[str, str] = {}
    for name, build in WORKFLOWS.items():
        builder = Builder(types)
        rows = build(builder)
        workflow = to_ui(name, builder.graph, arrange(rows, builder.graph), types)
        files[f"{name}.json"] = _written(workflow)
        files[f"api/{name}.json"] = _written(to_api(builder.graph))
    return files


def _written(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
