"""What is wrong with the places of nodes and groups in a workflow file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from .layout import Box


def problems(workflow: dict[str, Any]) -> list[str]:
    """One sentence for every overlap and every node outside of the groups."""
    nodes = {
        f"node {node['id']} {node['type']}": Box(*node["pos"], *node["size"]).with_title
        for node in workflow["nodes"]
    }
    groups = {f"group {group['title']!r}": Box(*group["bounding"]) for group in workflow["groups"]}
    return [*_overlaps(nodes), *_overlaps(groups), *_outside(nodes, groups)]


def _overlaps(boxes: dict[str, Box]) -> Iterator[str]:
    for (name, box), (other, other_box) in combinations(boxes.items(), 2):
        if box.overlaps(other_box):
            yield f"{name} overlaps {other}"


def _outside(nodes: dict[str, Box], groups: dict[str, Box]) -> Iterator[str]:
    for name, box in nodes.items():
        if not any(group.encloses(box) for group in groups.values()):
            yield f"{name} is in no group"
    for title, group in groups.items():
        if not any(group.encloses(box) for box in nodes.values()):
            yield f"{title} is empty"
