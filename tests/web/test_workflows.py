"""The workflows and nodes as somebody sees them who opens them for the first time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pack.tests.comfyui.server import PACK
from pack.tests.web.frontend import Page, wait_until
from pack.tests.web.replay import ReplayServer

FOLDER = PACK / "workflows"
# Nodes that miss a file where nobody has put one; the frontend marks them and tells which.
MISS_FILES = {
    "demo_train_and_generate": set(),
    "flux_kontext_train_and_generate": {
        *("LoraLoom_TrainingModel", "DualCLIPLoader", "UNETLoader", "VAELoader")
    },
}
OURS = "LoraLoom_"
MOST_WIDGETS = 7  # without the advanced ones and the one that changes the seed after a run

pytestmark = pytest.mark.slow

_ADD = """(names => { app.rootGraph.clear(); names.forEach((name, index) => {
    const node = LiteGraph.createNode(name);
    node.pos = [index % 5 * 420, Math.floor(index / 5) * 560];
    app.rootGraph.add(node);
}); })(a[0])"""
_WIDGETS = """app.rootGraph.nodes.map(node => {
    const widgets = node.widgets ?? [], linked = widgets.flatMap(one => one.linkedWidgets ?? []);
    return [node.type, widgets.filter(
        one => !one.hidden && !one.options.advanced && !linked.includes(one)).length];
})"""
_ROWS = """app.rootGraph.nodes.map(node => [node.type, document.querySelectorAll(
    `[data-node-id="${node.id}"] [data-testid=node-widget]`).length])"""


@pytest.mark.parametrize("name", MISS_FILES)
def test_a_workflow_opens_with_all_its_nodes_and_without_a_word(
    page: Page, design: str, name: str
) -> None:
    page.open_template(name)
    page.screenshot(f"open_{name}_{design}")
    registered = "app.rootGraph.nodes.every(node => node.type in LiteGraph.registered_node_types)"
    assert page.ask(registered)
    marked = "app.rootGraph.nodes.filter(node => node.has_errors).map(node => node.type)"
    assert set(page.ask(marked)) == MISS_FILES[name]
    assert page.ask("document.querySelectorAll('[role=dialog], .p-toast-message').length") == 0
    assert not page.problems()


@pytest.mark.parametrize("name", MISS_FILES)
def test_run_queues_the_prompt_of_the_api_file(
    classic_page: Page, replay: ReplayServer, name: str
) -> None:
    page = classic_page
    page.open_template(name)
    page.click("[data-testid=queue-button]")
    wait_until(lambda: replay.prompts, "a prompt")
    assert replay.prompts[0]["prompt"] == json.loads((FOLDER / f"api/{name}.json").read_text())


def test_every_workflow_is_tested() -> None:
    assert MISS_FILES.keys() == {path.stem for path in FOLDER.glob("*.json")}


def test_no_node_shows_many_widgets(page: Page, design: str, object_info: dict[str, Any]) -> None:
    ours = [name for name in object_info if name.startswith(OURS)]
    page.open_template(next(iter(MISS_FILES)))
    page.ask(_ADD, ours)
    page.show_all()
    page.screenshot(f"nodes_{design}")
    counted = dict(page.ask(_ROWS if design == "modern" else _WIDGETS))
    assert counted.keys() == set(ours)
    assert {name: count for name, count in counted.items() if count > MOST_WIDGETS} == {}
    assert counted["LoraLoom_TrainLora"] == 7
    assert not page.problems()
