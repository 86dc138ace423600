"""The frontend's format: what a file keeps of a graph, and how the canvas is arranged."""

from __future__ import annotations

from typing import Any

import pytest
from pack.tests.workflows.test_node_types import TYPES
from pack.workflows.source import check
from pack.workflows.source.graph import Builder, Graph, Handle
from pack.workflows.source.layout import Area, Box, Note, arrange
from pack.workflows.source.notes import load
from pack.workflows.source.ui import from_ui, to_ui


def graph_with_linked_widget() -> tuple[Graph, list[list[Area]]]:
    flow = Builder(TYPES)
    source = flow.add("Source")
    target = flow.add(
        "Target",
        "Chosen",
        model=source["model"],
        forced=source["text"],
        old=source["choice"],
        schedule="rex",
    )
    return flow.graph, [[Area("All", "#000", [[source], [target, Note("Why", "Because.")]])]]


@pytest.fixture
def workflow() -> dict[str, Any]:
    graph, rows = graph_with_linked_widget()
    return to_ui("test", graph, arrange(rows, graph), TYPES)


def test_a_widget_with_a_link_is_listed_and_keeps_its_value(workflow: dict[str, Any]) -> None:
    target = next(node for node in workflow["nodes"] if node["type"] == "Target")

    linked = {slot["name"]: slot for slot in target["inputs"]}
    assert linked["old"]["widget"] == {"name": "old"}
    assert "size" not in linked
    assert target["widgets_values"] == [3, "rex", 0.5, 0, "fixed", "first", ""]
    assert target["title"] == "Chosen"


def test_a_file_gives_the_graph_back(workflow: dict[str, Any]) -> None:
    assert check.problems(workflow, TYPES) == []
    assert from_ui(workflow, TYPES) == graph_with_linked_widget()[0]


def test_a_node_without_widgets_saves_no_values(workflow: dict[str, Any]) -> None:
    source = next(node for node in workflow["nodes"] if node["type"] == "Source")
    assert "widgets_values" not in source and "title" not in source


def test_an_id_of_a_file_stays_and_differs_from_others(workflow: dict[str, Any]) -> None:
    graph, rows = graph_with_linked_widget()
    other = to_ui("other", graph, arrange(rows, graph), TYPES)

    assert to_ui("test", graph, arrange(rows, graph), TYPES)["id"] == workflow["id"]
    assert other["id"] != workflow["id"]


def test_areas_of_a_row_are_equally_high_and_rows_do_not_touch() -> None:
    flow = Builder(TYPES)

    def area(title: str, count: int) -> Area:
        nodes: list[Handle] = [flow.add("Source") for _ in range(count)]
        return Area(title, "#000", [nodes])

    rows = [[area("A", 1), area("B", 3)], [area("C", 2)]]
    boxes = {one.title: box for one, box in arrange(rows, flow.graph).areas}

    assert boxes["A"].height == boxes["B"].height
    assert boxes["B"].x > boxes["A"].x + boxes["A"].width
    assert boxes["C"].y > boxes["A"].y + boxes["A"].height


def test_boxes_that_touch_do_not_overlap() -> None:
    box = Box(0, 0, 10, 10)
    assert not box.overlaps(Box(10, 0, 10, 10)) and not box.overlaps(Box(0, 10, 10, 10))
    assert box.overlaps(Box(9, 9, 1, 1)) and box.encloses(Box(9, 9, 1, 1))
    assert not box.encloses(Box(9, 9, 2, 1))


def test_a_note_is_one_line_a_paragraph() -> None:
    notes = load("flux_kontext")
    lines = notes["Files you need"].text.splitlines()

    assert lines[0] == "## A LoRA for FLUX.1 Kontext"
    assert sum(line.startswith("- **") for line in lines) == 3
    assert all(line[:1] in "#-*ABCDEFGHIJKLMNOPQRSTUVWXYZ" for line in lines)
