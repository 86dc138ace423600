"""What the rules of ComfyUI's schemas make of values in a file."""

from __future__ import annotations

from typing import Any

import pytest
from pack.workflows.source.graph import Builder, Link
from pack.workflows.source.node_types import NodeType, read_types
from pack.workflows.source.ui import slots, widget_values

FLOAT = {"default": 0.5, "min": 0.0, "max": 1.0}
INFO: dict[str, Any] = {
    "Source": {
        "input": {"required": {}},
        "output": ["MODEL", ["first", "second"], "STRING"],
        "output_name": ["model", "choice", "text"],
        "output_node": False,
        "python_module": "nodes",
    },
    "Target": {
        "input": {
            "required": {
                "size": ["INT", {"default": 3}],
                "model": ["MODEL"],
                "schedule": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "constant", "inputs": {"required": {}}},
                            {
                                "key": "rex",
                                "inputs": {
                                    "required": {"alpha": ["FLOAT", FLOAT]},
                                    "optional": {"curve": ["CURVE", {}]},
                                },
                            },
                        ]
                    },
                ],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "old": [["first", "second"]],
                "forced": ["STRING", {"forceInput": True}],
            },
            "optional": {"name": ["STRING", {"multiline": True}], "vae": ["VAE", {}]},
            "hidden": {"unique_id": ["UNIQUE_ID"]},
        },
        "input_order": {
            "required": ["model", "size", "schedule", "seed", "old", "forced"],
            "optional": ["name", "vae"],
        },
        "output": [],
        "output_node": True,
        "python_module": "custom_nodes.Pack",
    },
}
TYPES = read_types(INFO)
TARGET = TYPES["Target"]


def names(kind: NodeType, **values: Any) -> list[str]:
    return [one.name for one in kind.inputs(values)]


def test_inputs_have_the_order_of_the_schema_without_the_hidden_ones() -> None:
    assert names(TARGET) == [
        *("model", "size", "schedule", "seed", "old", "forced"),
        *("name", "vae"),
    ]
    assert [one.name for one in TARGET.inputs({}) if not one.required] == ["name", "vae"]


def test_a_dynamic_combo_brings_the_inputs_of_what_is_chosen() -> None:
    chosen = names(TARGET, schedule="rex")
    assert chosen[2:5] == ["schedule", "schedule.alpha", "schedule.curve"]


def test_a_file_lists_sockets_before_widgets_and_only_widgets_with_a_link() -> None:
    listed = slots(TARGET, {"schedule": "rex"}, ["seed", "size"])
    sockets = ["model", "schedule.curve", "forced", "vae"]
    assert [one.name for one in listed] == [*sockets, "size", "seed"]


def test_widget_values_follow_the_schema_and_seeds_have_two() -> None:
    saved = [3, "rex", 0.25, 7, "fixed", "second", "text"]
    assert widget_values(TARGET, saved) == {
        "size": 3,
        "schedule": "rex",
        "schedule.alpha": 0.25,
        "seed": 7,
        "old": "second",
        "name": "text",
    }


@pytest.mark.parametrize("saved", [[3, "constant", 7, "fixed", "first"], [3, "rex", 7, "fixed"]])
def test_too_few_widget_values_are_an_error(saved: list[Any]) -> None:
    with pytest.raises(ValueError, match="only"):
        widget_values(TARGET, saved)


def test_too_many_widget_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="belong to no widget"):
        widget_values(TARGET, [3, "constant", 7, "fixed", "first", "text", "more"])


def test_a_new_node_has_the_defaults_of_its_widgets() -> None:
    flow = Builder(TYPES)
    source = flow.add("Source")
    flow.add("Target", model=source["model"], forced=source["text"])

    assert flow.graph[2].inputs == {
        "model": Link(1, 0),
        "size": 3,
        "schedule": "constant",
        "seed": 0,
        "old": "first",
        "forced": Link(1, 2),
        "name": "",
    }
    assert TYPES["Source"].outputs[1].kind == "COMBO"


@pytest.mark.parametrize(
    ("kind", "inputs", "reason"),
    [
        ("Traget", {}, "not in the recording"),
        ("Target", {"modl": 1}, "has no inputs"),
    ],
)
def test_the_source_cannot_name_what_is_not_there(
    kind: str, inputs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Builder(TYPES).add(kind, **inputs)


def test_the_source_cannot_link_an_output_that_is_not_there() -> None:
    source = Builder(TYPES).add("Source")
    with pytest.raises(ValueError, match=r"no output 'vae', only \['model', 'choice', 'text'\]"):
        source["vae"]


def test_a_node_with_several_outputs_is_no_link() -> None:
    flow = Builder(TYPES)
    with pytest.raises(ValueError, match="name one"):
        flow.add("Target", model=flow.add("Source"))
