"""A graph of nodes as the workflows describe it, without places on the canvas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .node_types import NodeType

Value = str | int | float | bool


class Link(NamedTuple):
    """An output of another node."""

    node: int
    slot: int


@dataclass(frozen=True)
class Node:
    """``inputs`` holds the links and a value for every widget that has no link."""

    kind: str
    title: str
    inputs: Mapping[str, Value | Link]


Graph = dict[int, Node]


@dataclass(frozen=True)
class Handle:
    """A node that was added; ``handle["name"]`` is its output of that name."""

    number: int
    type: NodeType

    def __getitem__(self, output: str) -> Link:
        names = [one.name for one in self.type.outputs]
        if output not in names:
            raise ValueError(f"{self.type.name} has no output {output!r}, only {names}")
        return Link(self.number, names.index(output))


class Builder:
    """Adds nodes one after the other; a link can only point back, so there is no cycle."""

    def __init__(self, types: Mapping[str, NodeType]) -> None:
        self._types = types
        self.graph: Graph = {}

    def add(self, kind: str, title: str = "", **inputs: Value | Link | Handle) -> Handle:
        """A node of the type ``kind``; widgets that are not named keep their default.

        A ``Handle`` stands for the only output of its node.
        """
        if kind not in self._types:
            raise ValueError(f"{kind} is not in the recording; see record.py")
        node_type = self._types[kind]
        known = node_type.inputs(inputs)
        if unknown := inputs.keys() - {one.name for one in known}:
            raise ValueError(f"{kind} has no inputs {sorted(unknown)}")
        values = {name: _linked(value) for name, value in inputs.items()}
        for one in known:
            if one.is_widget and one.name not in values:
                values[one.name] = _default(kind, one.name, one.default)
        ordered = {one.name: values[one.name] for one in known if one.name in values}
        number = len(self.graph) + 1
        self.graph[number] = Node(kind, title or node_type.title, ordered)
        return Handle(number, node_type)


def _linked(value: Value | Link | Handle) -> Value | Link:
    if not isinstance(value, Handle):
        return value
    if len(value.type.outputs) != 1:
        raise ValueError(f"{value.type.name} has several outputs; name one")
    return Link(value.number, 0)


def _default(kind: str, name: str, default: Any) -> Value:
    if default is None:
        raise ValueError(f"{kind}: name a file for {name}; it has no default")
    return default
