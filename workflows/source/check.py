"""What is wrong with a workflow file, judged by a recorded ``/object_info`` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import check_layout
from .graph import Graph, Link, Node, Value
from .node_types import Input
from .ui import NOTE, Types, Workflow, from_ui, saved_values, slots, widget_values

_ANYTHING = "*"
_NUMBERS = {"INT": (int,), "FLOAT": (int, float)}


def problems(workflow: Workflow, types: Types) -> list[str]:
    """One sentence for everything that is wrong with a file in the frontend's format."""
    found = [*_node_problems(workflow, types), *_link_problems(workflow)]
    if not found:
        found += graph_problems(from_ui(workflow, types), types)
    return found + check_layout.problems(workflow)


def graph_problems(graph: Graph, types: Types) -> list[str]:
    """One sentence for everything that is wrong with nodes, values and links."""
    found = [
        f"node {number} {node.kind}: {problem}"
        for number, node in graph.items()
        for problem in _input_problems(node, graph, types)
    ]
    known = (types[node.kind] for node in graph.values() if node.kind in types)
    return found if any(kind.is_output for kind in known) else [*found, "there is no output node"]


def _input_problems(node: Node, graph: Graph, types: Types) -> Iterator[str]:
    if node.kind not in types:
        yield "there is no such node"
        return
    inputs = {one.name: one for one in types[node.kind].inputs(node.inputs)}
    for name in node.inputs.keys() - inputs.keys():
        yield f"it has no input {name}"
    for name, one in inputs.items():
        if name not in node.inputs:
            if one.required:
                yield f"{name} is missing"
            continue
        value = node.inputs[name]
        problem = (
            _link_problem(one, value, graph, types)
            if isinstance(value, Link)
            else _value_problem(one, value)
        )
        if problem:
            yield f"{name}: {problem}"


def _link_problem(one: Input, link: Link, graph: Graph, types: Types) -> str:
    if link.node not in graph:
        return f"there is no node {link.node}"
    source = types.get(graph[link.node].kind)
    if source is None:
        return ""
    if link.slot >= len(source.outputs):
        return f"{source.name} has no output {link.slot}"
    kind = source.outputs[link.slot].kind
    return "" if fits(kind, one.kind) else f"{kind} does not fit {one.kind}"


def fits(output: str, wanted: str) -> bool:
    """Whether an output may be linked to an input; either may name several types."""
    both = (set(output.split(",")), set(wanted.split(",")))
    return any(_ANYTHING in kinds for kinds in both) or bool(both[0] & both[1])


def _value_problem(one: Input, value: Value) -> str:
    if not one.is_widget:
        return f"it needs a link, not {value!r}"
    if one.choices is not None:
        known = not one.choices or value in one.choices
        return "" if known else f"{value!r} is none of {one.choices}"
    if one.kind in _NUMBERS:
        return _number_problem(one, value)
    wanted = {"BOOLEAN": bool, "STRING": str}[one.kind]
    return "" if isinstance(value, wanted) else f"{value!r} is no {one.kind}"


def _number_problem(one: Input, value: Value) -> str:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS[one.kind]):
        return f"{value!r} is no {one.kind}"
    low, high = one.options.get("min", float("-inf")), one.options.get("max", float("inf"))
    return "" if low <= value <= high else f"{value} is not in {low}..{high}"


def _node_problems(workflow: Workflow, types: Types) -> Iterator[str]:
    """Slots and widget values that are not those of the node's type."""
    numbers = [node["id"] for node in workflow["nodes"]]
    if len(numbers) != len(set(numbers)):
        yield "two nodes have the same id"
    if max(numbers) > workflow["last_node_id"]:
        yield "last_node_id is smaller than a node's id"
    for node in workflow["nodes"]:
        if node["type"] == NOTE:
            continue
        where = f"node {node['id']} {node['type']}"
        if node["type"] not in types:
            yield f"{where}: there is no such node"
            continue
        kind = types[node["type"]]
        try:
            values = widget_values(kind, saved_values(node))
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        linked = [slot["name"] for slot in node["inputs"] if slot["link"] is not None]
        expected = slots(kind, values, linked)
        if _shape(node["inputs"]) != [(one.name, one.kind) for one in expected]:
            yield f"{where}: its inputs are not those of its type"
        if _shape(node["outputs"]) != [(one.name, one.kind) for one in kind.outputs]:
            yield f"{where}: its outputs are not those of its type"


def _shape(written: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(slot["name"], slot["type"]) for slot in written]


def _link_problems(workflow: Workflow) -> Iterator[str]:
    """Links and slots that do not name each other."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    if len(links) != len(workflow["links"]):
        yield "two links have the same id"
    if max(links, default=0) > workflow["last_link_id"]:
        yield "last_link_id is smaller than a link's id"
    for number, source, output, target, slot, kind in links.values():
        ends = [(source, "outputs", output), (target, "inputs", slot)]
        slots_ = [_slot(nodes, *end) for end in ends]
        if None in slots_:
            yield f"link {number}: one of its ends does not exist"
            continue
        leaving, entering = slots_
        if number not in (leaving["links"] or []) or entering["link"] != number:
            yield f"link {number}: one of its ends does not name it"
        if kind != leaving["type"]:
            yield f"link {number}: it says {kind}, its output {leaving['type']}"
    for node in workflow["nodes"]:
        for number, end in _named_links(node):
            if number not in links:
                yield f"node {node['id']}: there is no link {number}"
            elif end not in (links[number][1:3], links[number][3:5]):
                yield f"node {node['id']}: link {number} is somewhere else"


def _slot(nodes: Mapping[int, Any], node: int, side: str, slot: int) -> Any:
    written = nodes[node][side] if node in nodes else []
    return written[slot] if 0 <= slot < len(written) else None


def _named_links(node: Mapping[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """Every link that a node says it has, with the end where it says so."""
    for slot, entering in enumerate(node["inputs"]):
        if entering["link"] is not None:
            yield entering["link"], [node["id"], slot]
    for slot, leaving in enumerate(node["outputs"]):
        for number in leaving["links"] or []:
            yield number, [node["id"], slot]
