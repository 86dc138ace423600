"""The workflow files: current, without mistakes, the same graph in both formats."""

from __future__ import annotations

import re

import pytest
from pack.tests.workflows.shipped import FOLDER, NAMES, RECORDING, TYPES, layout_of, read
from pack.workflows.source import check, ui
from pack.workflows.source.api import from_api, to_api
from pack.workflows.source.files import all_files
from pack.workflows.source.layout import Note, node_height
from pack.workflows.source.record import NATIVE, OUR_PREFIX, reduced
from PIL import Image

each_workflow = pytest.mark.parametrize("name", NAMES)


def test_the_files_are_those_that_the_source_writes() -> None:
    written = all_files(RECORDING)
    paths = [*FOLDER.glob("*.json"), *FOLDER.glob("api/*.json")]
    found = {path.relative_to(FOLDER).as_posix(): path.read_text("utf-8") for path in paths}

    assert found.keys() == written.keys()
    stale = [name for name, content in written.items() if found[name] != content]
    assert not stale, f"{stale}: run python -m workflows.source"


def test_the_recording_holds_our_nodes_and_those_that_are_used() -> None:
    used = {node.kind for name in NAMES for node in from_api(read(f"api/{name}")).values()}

    assert {kind for kind in used if not kind.startswith(OUR_PREFIX)} == set(NATIVE)
    assert used <= RECORDING.keys()
    assert reduced(RECORDING) == RECORDING  # in particular, no files of anyone's machine


@each_workflow
def test_the_list_of_templates_has_a_picture(name: str) -> None:
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.format == "JPEG" and max(picture.size) <= 800


@each_workflow
def test_nothing_is_wrong(name: str) -> None:
    assert check.problems(read(name), TYPES) == []
    assert check.graph_problems(from_api(read(f"api/{name}")), TYPES) == []


@each_workflow
def test_both_formats_are_the_same_graph(name: str) -> None:
    workflow, prompt = read(name), read(f"api/{name}")

    assert to_api(ui.from_ui(workflow, TYPES)) == prompt
    assert ui.to_ui(name, from_api(prompt), layout_of(workflow), TYPES) == workflow


@each_workflow
def test_every_node_is_as_large_as_its_widgets(name: str) -> None:
    workflow = read(name)
    graph = ui.from_ui(workflow, TYPES)
    for node in workflow["nodes"]:
        if node["type"] != ui.NOTE:
            needed = node_height(TYPES[node["type"]], graph[node["id"]])
            assert node["size"][1] >= needed, node["type"]
            assert node["size"][0] >= 270, node["type"]


@each_workflow
def test_every_note_is_as_large_as_its_text(name: str) -> None:
    notes = [node for node in read(name)["nodes"] if node["type"] == ui.NOTE]
    assert len(notes) >= 4
    for node in notes:
        width, height = node["size"]
        assert height >= Note(node["title"], node["widgets_values"][0], width).height


@each_workflow
def test_our_nodes_say_which_pack_to_install(name: str) -> None:
    ours = [node for node in read(name)["nodes"] if node["type"].startswith(OUR_PREFIX)]
    assert ours
    for node in ours:
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        assert (properties["cnr_id"], properties["ver"]) == ("lora-loom", ui.pack_version())


@each_workflow
def test_seeds_stay_as_they_are_after_a_run(name: str) -> None:
    for node in read(name)["nodes"]:
        assert "randomize" not in ui.saved_values(node)


@each_workflow
def test_the_notes_speak_of_what_is_there(name: str) -> None:
    workflow = read(name)
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == ui.NOTE]
    kinds = {node["type"] for node in workflow["nodes"]} - {ui.NOTE}
    inputs = {one.name for kind in kinds for one in TYPES[kind].inputs({})}
    folders = {"diffusion_models", "text_encoders"}  # of ComfyUI's models
    emphasized = re.findall(r"\*\*(\w+_\w+)\*\*", "\n".join(notes))

    assert emphasized
    assert set(emphasized) <= inputs | set(NAMES) | folders
