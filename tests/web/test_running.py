"""What a user sees of a run, from the messages that real ones have sent."""

from __future__ import annotations

import pytest
from pack.tests.web.frontend import Page, wait_until
from pack.tests.web.recording import Message, read
from pack.tests.web.replay import ReplayServer

DEMO = "demo_train_and_generate"
TRAIN = "LoraLoom_TrainLora"

pytestmark = pytest.mark.slow

_MARKED = """app.rootGraph.nodes.filter(
    node => node.strokeStyles?.executionError?.call(node)).map(node => node.type)"""
_PICTURES = """performance.getEntriesByType('resource').map(one => new URL(one.name))
    .filter(url => url.pathname === '/api/view').map(url => url.searchParams.get('filename'))"""
_TOASTS = """[...document.querySelectorAll('.p-toast-message')].map(
    one => [one.className.match(/p-toast-message-(\\w+)/)[1], ...one.innerText.split('\\n')])"""
_INTO_SUBGRAPH = """(node => { const outer = app.rootGraph.convertToSubgraph(new Set([node])).node;
    return `${outer.id}:${outer.subgraph.nodes[0].id}`;
})(app.rootGraph.nodes.find(node => node.type === a[0]))"""


def training(messages: list[Message]) -> list[Message]:
    """What came until the training was under way; its last is the text of a step."""
    begun = next(i for i, one in enumerate(messages) if text_of(one).startswith("train "))
    moved = next(i for i in range(begun, len(messages)) if messages[i]["type"] == "progress")
    return messages[: next(i for i in range(moved, len(messages)) if text_of(messages[i])) + 1]


def text_of(message: Message) -> str:
    return message["data"]["text"] if message["type"] == "progress_text" else ""


def run(page: Page, replay: ReplayServer) -> None:
    """Queue the demo."""
    page.open_template(DEMO)
    page.click("[data-testid=queue-button]")
    wait_until(lambda: replay.prompts, "a prompt")


def test_train_lora_shows_how_far_it_is_and_then_pictures(
    page: Page, replay: ReplayServer, design: str
) -> None:
    messages = read("finished")
    begun = training(messages)
    run(page, replay)
    replay.send(begun)

    node_id, text = (begun[-1]["data"][name] for name in ("node", "text"))
    page.wait_for_text(int(node_id), text)
    state = [one for one in begun if one["type"] == "progress_state"][-1]["data"]["nodes"][node_id]
    progress = page.ask("app.rootGraph.getNodeById(a[0]).progress", int(node_id))
    assert 0 < progress == state["value"] / state["max"] < 1
    page.screenshot(f"training_{design}")

    replay.send(messages[len(begun) :])
    shown = {
        image["filename"]
        for message in messages
        if message["type"] == "executed"
        for image in message["data"]["output"].get("images", [])
    }
    wait_until(lambda: shown <= set(page.ask(_PICTURES)), f"{shown} in the page")
    assert page.ask(_MARKED) == []
    page.screenshot(f"finished_{design}")
    assert not page.problems()


def test_an_error_is_shown_on_the_node_that_raised_it(
    page: Page, replay: ReplayServer, design: str
) -> None:
    [error] = read("failed")
    run(page, replay)
    replay.send([*training(read("finished")), error])

    assert page.wait(f"({_MARKED}).length > 0 && {_MARKED}") == [TRAIN]
    page.click_on("View details")
    first_line = error["data"]["exception_message"].strip()
    page.wait("document.body.innerText.includes(a[0])", first_line)
    page.screenshot(f"error_{design}")
    assert not page.problems()


def test_messages_of_nodes_are_toasts_with_their_titles(
    classic_page: Page, replay: ReplayServer
) -> None:
    classic_page.open_template(DEMO)
    train = classic_page.ask("app.rootGraph.nodes.find(node => node.type === a[0]).id", TRAIN)
    replay.send(
        [
            message(train, "info", "Training stopped", "Everything is saved."),
            message(train, "warning", "Few pictures", "There are 3."),
            message(1_000_000, "error", "Gone", "The node was deleted."),
        ]
    )
    shown = classic_page.wait(f"({_TOASTS}).length === 3 && {_TOASTS}")
    classic_page.screenshot("messages")
    assert shown == [
        ["info", "Train LoRA: Training stopped", "Everything is saved."],
        ["warn", "Train LoRA: Few pictures", "There are 3."],
        ["error", "LoRA Loom: Gone", "The node was deleted."],
    ]
    assert not classic_page.problems()


def test_a_message_out_of_a_subgraph_has_the_title_of_the_inner_node(
    classic_page: Page, replay: ReplayServer
) -> None:
    classic_page.open_template(DEMO)
    inner = classic_page.ask(_INTO_SUBGRAPH, TRAIN)
    replay.send([message(inner, "info", "Training stopped", "Everything is saved.")])
    [toast] = classic_page.wait(f"({_TOASTS}).length && {_TOASTS}")
    assert toast == ["info", "Train LoRA: Training stopped", "Everything is saved."]


def message(node_id: int | str, level: str, summary: str, detail: str) -> Message:
    data = {"node_id": str(node_id), "level": level, "summary": summary, "detail": detail}
    return {"type": "lora_loom.message", "data": data}
