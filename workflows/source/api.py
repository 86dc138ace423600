"""Graphs in ComfyUI's API format, which ``POST /prompt`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import Graph, Link, Node, Value

Prompt = dict[str, Any]


def to_api(graph: Graph) -> Prompt:
    """The prompt that the frontend would send."""
    return {
        str(number): {
            "inputs": {name: _written(value) for name, value in node.inputs.items()},
            "class_type": node.kind,
            "_meta": {"title": node.title},
        }
        for number, node in graph.items()
    }


def from_api(prompt: Mapping[str, Any]) -> Graph:
    """The graph of a prompt."""
    return {
        int(number): Node(
            node["class_type"],
            node["_meta"]["title"],
            {name: _read(value) for name, value in node["inputs"].items()},
        )
        for number, node in prompt.items()
    }


def _written(value: Value | Link) -> Any:
    return [str(value.node), value.slot] if isinstance(value, Link) else value


def _read(value: Any) -> Value | Link:
    return Link(int(value[0]), value[1]) if isinstance(value, list) else value
