"""Graphs in the format that ComfyUI's frontend saves and opens (0.4)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .graph import Graph, Link, Node, Value
from .layout import Box, Layout, Note
from .node_types import Input, NodeType

NOTE = "MarkdownNote"
PACK = "lora-loom"
COMFYUI_VERSION = "0.33.0"  # that the workflows are made and tested with
_PACK_MODULE = "custom_nodes."
_OPTIONAL = 7  # the frontend draws a hollow circle
_NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}
_CONTROL = "fixed"
_WINDOW = (1780, 850)  # of 1920x1080, less the bars of browser and frontend
_BARS = (80, 80)
_PROJECT = Path(__file__).parents[2] / "pyproject.toml"

Workflow = dict[str, Any]
Types = Mapping[str, NodeType]


def to_ui(name: str, graph: Graph, layout: Layout, types: Types) -> Workflow:
    """The workflow file; ``name`` gives it an id that stays."""
    links = list(_links(graph, types))
    notes = [
        _note(number, note, box)
        for number, (note, box) in enumerate(layout.notes, start=len(graph) + 1)
    ]
    nodes = notes + [
        _node(number, node, layout.nodes[number], types[node.kind], links)
        for number, node in graph.items()
    ]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": [node | {"order": order} for order, node in enumerate(nodes)],
        "links": links,
        "groups": [
            {
                "id": number,
                "title": area.title,
                "bounding": list(box),
                "color": area.colour,
                "font_size": 24,
                "flags": {},
            }
            for number, (area, box) in enumerate(layout.areas, start=1)
        ],
        "config": {},
        "extra": {"ds": _view(layout)},
        "version": 0.4,
    }


def from_ui(workflow: Workflow, types: Types) -> Graph:
    """The graph of a workflow that `check.problems` finds nothing wrong with."""
    links = {link[0]: Link(link[1], link[2]) for link in workflow["links"]}
    graph: Graph = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["id"]):
        if node["type"] == NOTE:
            continue
        kind = types[node["type"]]
        linked = {
            one["name"]: links[one["link"]] for one in node["inputs"] if one["link"] is not None
        }
        values: dict[str, Value | Link] = widget_values(kind, saved_values(node)) | linked
        names = [one.name for one in kind.inputs(values) if one.name in values]
        graph[node["id"]] = Node(
            kind.name, node.get("title", kind.title), {name: values[name] for name in names}
        )
    return graph


def widget_values(kind: NodeType, saved: list[Any]) -> dict[str, Any]:
    """The saved values by widget; those of seeds' controls are left out.

    Raises:
        ValueError: there are more or fewer than the node has widgets.
    """
    values: dict[str, Any] = {}
    rest = iter(saved)
    try:
        # The inputs of a dynamic combo are known once its own value is.
        while widget := _next_widget(kind, values):
            values[widget.name] = next(rest)
            if widget.has_control:
                next(rest)
    except StopIteration:
        raise ValueError(f"there are only {len(saved)} widget values") from None
    if left := list(rest):
        raise ValueError(f"widget values {left} belong to no widget")
    return values


def saved_values(node: Workflow) -> list[Any]:
    """The widget values of a node in a file; a node without widgets saves none."""
    return node.get("widgets_values", [])


def slots(kind: NodeType, values: Mapping[str, Any], linked: Collection[str]) -> list[Input]:
    """The inputs that a file lists, in its order: all sockets, then the widgets with a link."""
    inputs = kind.inputs(values)
    sockets = [one for one in inputs if not one.is_widget]
    return sockets + [one for one in inputs if one.is_widget and one.name in linked]


def _next_widget(kind: NodeType, values: Mapping[str, Any]) -> Input | None:
    widgets = (one for one in kind.inputs(values) if one.is_widget)
    return next((one for one in widgets if one.name not in values), None)


def _slots(node: Node, kind: NodeType) -> list[Input]:
    linked = {name for name, value in node.inputs.items() if isinstance(value, Link)}
    return slots(kind, node.inputs, linked)


def _links(graph: Graph, types: Types) -> Iterator[list[Any]]:
    number = 0
    for target, node in graph.items():
        for slot, one in enumerate(_slots(node, types[node.kind])):
            link = node.inputs.get(one.name)
            if isinstance(link, Link):
                number += 1
                output = types[graph[link.node].kind].outputs[link.slot]
                yield [number, link.node, link.slot, target, slot, output.kind]


def _node(number: int, node: Node, box: Box, kind: NodeType, links: list[list[Any]]) -> Workflow:
    incoming = {link[4]: link[0] for link in links if link[3] == number}
    ours = kind.module.startswith(_PACK_MODULE)
    written = {
        "id": number,
        "type": kind.name,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "mode": 0,
        "inputs": [_input(one, incoming.get(slot)) for slot, one in enumerate(_slots(node, kind))],
        "outputs": [
            {
                "name": output.name,
                "type": output.kind,
                "links": [link[0] for link in links if link[1:3] == [number, slot]] or None,
            }
            for slot, output in enumerate(kind.outputs)
        ],
        "properties": {
            "cnr_id": PACK if ours else "comfy-core",
            "ver": pack_version() if ours else COMFYUI_VERSION,
            "Node name for S&R": kind.name,
        },
    }
    if values := list(_values_to_save(node, kind)):
        written["widgets_values"] = values
    return written if node.title == kind.title else written | {"title": node.title}


def pack_version() -> str:
    """The version in pyproject.toml."""
    return re.findall(r'^version = "(.+)"$', _PROJECT.read_text("utf-8"), re.MULTILINE)[0]


def _view(layout: Layout) -> Workflow:
    """Shows all of the canvas in the window of a common screen, beside the bars of the frontend."""
    right = max(box.x + box.width for _, box in layout.areas)
    bottom = max(box.y + box.height for _, box in layout.areas)
    scale = round(min(_WINDOW[0] / right, _WINDOW[1] / bottom), 2)
    return {"scale": scale, "offset": [round(bar / scale) for bar in _BARS]}


def _input(one: Input, link: int | None) -> Workflow:
    return {
        "name": one.name,
        "type": one.kind,
        **({} if one.label == one.name else {"label": one.label}),
        **({} if one.required else {"shape": _OPTIONAL}),
        **({"widget": {"name": one.name}} if one.is_widget else {}),
        "link": link,
    }


def _values_to_save(node: Node, kind: NodeType) -> Iterator[Value]:
    for one in kind.inputs(node.inputs):
        if one.is_widget:
            value = node.inputs[one.name]
            # A linked widget is hidden; what it would show otherwise is its default.
            yield one.default if isinstance(value, Link) else value
            if one.has_control:
                yield _CONTROL


def _note(number: int, note: Note, box: Box) -> Workflow:
    return {
        "id": number,
        "type": NOTE,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": note.title,
        "properties": {},
        "widgets_values": [note.text],
        **_NOTE_COLOURS,
    }
