"""Every kind of mistake in a workflow file is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pack.tests.workflows.shipped import TYPES, read
from pack.workflows.source import check
from pack.workflows.source.api import from_api
from pack.workflows.source.check import fits

DEMO = "demo_train_and_generate"
Workflow = dict[str, Any]


def node(workflow: Workflow, kind: str) -> Any:
    return next(node for node in workflow["nodes"] if node["type"] == kind)


def widgets(kind: str, position: int, value: Any) -> Callable[[Workflow], None]:
    def change(workflow: Workflow) -> None:
        node(workflow, kind)["widgets_values"][position] = value

    return change


def rename_node(workflow: Workflow) -> None:
    node(workflow, "KSampler")["type"] = "KSamplr"


def lose_widget_value(workflow: Workflow) -> None:
    node(workflow, "LoraLoom_TrainLora")["widgets_values"].pop()


def add_widget_value(workflow: Workflow) -> None:
    node(workflow, "LoraLoom_TrainLora")["widgets_values"].append("continue")


def lose_control_of_seed(workflow: Workflow) -> None:
    node(workflow, "KSampler")["widgets_values"].remove("fixed")


def link_to_other_output(workflow: Workflow) -> None:
    link = next(link for link in workflow["links"] if link[5] == "LORA_MODEL")
    link[2] += 1


def link_to_nowhere(workflow: Workflow) -> None:
    workflow["links"][0][1] = 999


def lose_link(workflow: Workflow) -> None:
    workflow["links"].pop(0)


def forget_link_at_source(workflow: Workflow) -> None:
    node(workflow, "LoraLoom_DemoTextEncode")["outputs"][0]["links"].pop()


def name_link_at_another_input(workflow: Workflow) -> None:
    inputs = node(workflow, "KSampler")["inputs"]
    inputs[1]["link"], inputs[2]["link"] = inputs[2]["link"], inputs[1]["link"]


def call_link_another_type(workflow: Workflow) -> None:
    workflow["links"][0][5] = "IMAGE"


def link_image_to_latent(workflow: Workflow) -> None:
    """Consistent in all three places, but of the wrong type."""
    target = node(workflow, "VAEDecode")
    link = next(one for one in workflow["links"] if one[0] == target["inputs"][0]["link"])
    old = next(one for one in workflow["nodes"] if one["id"] == link[1])
    old["outputs"][link[2]]["links"].remove(link[0])
    output = node(workflow, "ImageScaleBy")["outputs"][0]
    output["links"].append(link[0])
    link[1:3] = [node(workflow, "ImageScaleBy")["id"], 0]
    link[5] = output["type"]


def unlink_required_input(workflow: Workflow) -> None:
    entry = node(workflow, "SaveImage")["inputs"][0]
    link = next(one for one in workflow["links"] if one[0] == entry["link"])
    workflow["links"].remove(link)
    node(workflow, "ImageScaleBy")["outputs"][0]["links"] = None
    entry["link"] = None


def rename_slot(workflow: Workflow) -> None:
    node(workflow, "LoraLoom_TrainLora")["inputs"][0]["name"] = "base_model"


def swap_outputs(workflow: Workflow) -> None:
    node(workflow, "LoraLoom_LrScheduler")["outputs"].reverse()


def same_id(workflow: Workflow) -> None:
    workflow["nodes"][0]["id"] = workflow["nodes"][1]["id"]


def small_last_id(workflow: Workflow) -> None:
    workflow["last_node_id"] = workflow["last_link_id"] = 3


def move_node(workflow: Workflow) -> None:
    node(workflow, "VAEDecode")["pos"] = node(workflow, "KSampler")["pos"]


def move_node_outside(workflow: Workflow) -> None:
    node(workflow, "SaveImage")["pos"] = [9000, 9000]


def cover_title(workflow: Workflow) -> None:
    """A title lies above the box that ``pos`` and ``size`` give."""
    below, above = node(workflow, "ImageScaleBy"), node(workflow, "ImageStitch")
    below["pos"][1] = above["pos"][1] + above["size"][1] + 5


def grow_group(workflow: Workflow) -> None:
    workflow["groups"][0]["bounding"][2] += 500


def empty_group(workflow: Workflow) -> None:
    workflow["groups"].append({"title": "Nothing", "bounding": [5000, 5000, 200, 200]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename_node, "KSamplr: there is no such node"),
        (lose_widget_value, "LoraLoom_TrainLora: there are only"),
        (add_widget_value, "['continue'] belong to no widget"),
        (lose_control_of_seed, "KSampler: there are only 6 widget values"),
        (widgets("LoraLoom_TrainLora", 1, 0), "max_train_steps: 0 is not in 1..100000000"),
        (widgets("LoraLoom_TrainLora", 1, 400.5), "max_train_steps: 400.5 is no INT"),
        (widgets("LoraLoom_TrainLora", 0, 7), "output_name: 7 is no STRING"),
        (widgets("LoraModelLoader", 1, 0), "bypass: 0 is no BOOLEAN"),
        (widgets("KSampler", 3, True), "cfg: True is no FLOAT"),
        (widgets("KSampler", 4, "eulr"), "sampler_name: 'eulr' is none of"),
        (link_to_other_output, "one of its ends does not name it"),
        (link_to_nowhere, "link 1: one of its ends does not exist"),
        (lose_link, "there is no link 1"),
        (forget_link_at_source, "one of its ends does not name it"),
        (name_link_at_another_input, "is somewhere else"),
        (call_link_another_type, "link 1: it says IMAGE"),
        (link_image_to_latent, "VAEDecode: samples: IMAGE does not fit LATENT"),
        (unlink_required_input, "SaveImage: images is missing"),
        (rename_slot, "LoraLoom_TrainLora: its inputs are not those of its type"),
        (swap_outputs, "LoraLoom_LrScheduler: its outputs are not those of its type"),
        (same_id, "two nodes have the same id"),
        (small_last_id, "last_node_id is smaller"),
        (small_last_id, "last_link_id is smaller"),
        (move_node, "overlaps"),
        (move_node_outside, "SaveImage is in no group"),
        (cover_title, "overlaps"),
        (grow_group, "group '1  Start here' overlaps group '2  Train'"),
        (empty_group, "group 'Nothing' is empty"),
    ],
)
def test_a_mistake_in_a_file_is_named(change: Callable[[Workflow], None], reason: str) -> None:
    workflow = read(DEMO)
    change(workflow)

    assert any(reason in problem for problem in check.problems(workflow, TYPES))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rank", 4, "it has no input rank"),
        ("model", 4, "model: it needs a link, not 4"),
        ("model", ["99", 0], "model: there is no node 99"),
        ("model", ["1", 9], "model: LoraLoom_DemoModel has no output 9"),
        ("model", ["1", 0], "model: MODEL does not fit LORALOOM_MODEL"),
    ],
)
def test_a_mistake_in_a_prompt_is_named(name: str, value: Any, reason: str) -> None:
    prompt = read(f"api/{DEMO}")
    training = next(one for one in prompt.values() if one["class_type"] == "LoraLoom_TrainLora")
    training["inputs"][name] = value

    (problem,) = check.graph_problems(from_api(prompt), TYPES)
    assert problem.endswith(f"LoraLoom_TrainLora: {reason}")


def test_a_graph_that_produces_nothing_is_refused() -> None:
    prompt = read(f"api/{DEMO}")
    only_model = {number: one for number, one in prompt.items() if number == "1"}

    assert check.graph_problems(from_api(only_model), TYPES) == ["there is no output node"]


def test_inputs_of_several_types_take_each_of_them() -> None:
    assert fits("IMAGE", "IMAGE,MASK") and fits("IMAGE", "*") and fits("*", "LATENT")
    assert not fits("LATENT", "IMAGE,MASK")
