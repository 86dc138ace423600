"""The buttons on a node that trains, clicked in a browser."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pack.tests.web.frontend import Page, wait_until
from pack.tests.web.recording import PROMPT_ID, Message, read
from pack.tests.web.replay import ReplayServer

DEMO = "demo_train_and_generate"
TRAIN = "LoraLoom_TrainLora"

pytestmark = pytest.mark.slow

_NODE = "app.rootGraph.nodes.find(node => node.type === a[0])"
_BUTTON = ".lora-loom-run button[data-command={}]"
# Every button that is seen: what it says, and whether it can be clicked.
_SEEN = """[...document.querySelectorAll(".lora-loom-run button")].filter(
    one => one.getBoundingClientRect().height > 0).map(one => [one.innerText, !one.disabled])"""
_INSIDE = """(node => {
    const {scale, offset} = app.canvas.ds, corner = app.canvas.canvas.getBoundingClientRect();
    const top = corner.top + (node.pos[1] + offset[1]) * scale;
    const bottom = top + node.size[1] * scale;
    const box = document.querySelector(".lora-loom-run").getBoundingClientRect();
    return box.height > 0 && box.top > top && box.bottom <= bottom + 2;
})(app.rootGraph.nodes.find(node => node.type === a[0]))"""
_POINTS = "document.querySelector('.lora-loom-run polyline').getAttribute('points')"
_HEIGHT = f"{_NODE}.size[1]"
_SAVED = "app.rootGraph.serialize().nodes.find(node => node.type === a[0]).widgets_values"
_TOASTS = """[...document.querySelectorAll('.p-toast-message')].map(
    one => [one.className.match(/p-toast-message-(\\w+)/)[1], ...one.innerText.split('\\n')])"""
ALL = [["Save now", True], ["Sample now", True], ["Pause", True], ["Stop and save", True]]


@pytest.fixture
def training(page: Page, replay: ReplayServer) -> str:
    """The id of the node that trains in the page; the server has sent how the run began."""
    page.open_template(DEMO)
    page.click("[data-testid=queue-button]")
    wait_until(lambda: replay.prompts, "a prompt")
    messages = read("finished")
    node = str(page.ask(f"{_NODE}.id", TRAIN))
    begun = next(
        index
        for index, one in enumerate(messages)
        if one["type"] == "progress_text" and one["data"]["text"].startswith("train ")
    )
    replay.send(messages[:begun])
    return node


def status(node_id: str, **changes: Any) -> Message:
    record = {
        "node_id": node_id,
        "state": "training",
        "step": 12,
        "total_steps": 400,
        "loss": 0.25,
        "smoothed_loss": 0.25,
        "refused": {},
        "obeyed": {},
    }
    return {"type": "lora_loom.run", "data": record | changes}


def test_while_it_trains_the_node_has_buttons_that_work(
    page: Page, replay: ReplayServer, training: str, design: str
) -> None:
    before = page.ask(_HEIGHT, TRAIN)
    assert page.ask(_SEEN) == []
    curve = [status(training, step=n, smoothed_loss=math.exp(-n / 40)) for n in range(0, 120, 4)]
    replay.send(curve)
    page.wait(f"({_SEEN}).length === 4")
    page.wait_for_drawing()
    assert page.ask(_SEEN) == ALL
    page.wait(_INSIDE, TRAIN)
    page.screenshot(f"buttons_{design}")

    page.click(_BUTTON.format("save"))
    wait_until(lambda: replay.commands, "a command")
    assert replay.commands == [{"node_id": training, "command": "save"}]
    page.wait(f"!({_SEEN})[0][1]")  # until it is done, it cannot be asked for again
    replay.send([status(training, step=121, obeyed={"save": 1})])
    page.wait(f"({_SEEN})[0][1]")

    page.click(_BUTTON.format("pause"))
    replay.send([status(training, step=122, state="paused", obeyed={"save": 1, "pause": 1})])
    page.wait(f"({_SEEN})[2][0] === 'Resume'")
    page.screenshot(f"paused_{design}")
    page.click(_BUTTON.format("resume"))
    replay.send([status(training, step=123, obeyed={"save": 1, "pause": 1, "resume": 1})])
    page.wait(f"({_SEEN})[2][0] === 'Pause'")

    page.click(_BUTTON.format("stop"))
    page.wait(f"({_SEEN}).every(button => !button[1])")
    assert [one["command"] for one in replay.commands] == ["save", "pause", "resume", "stop"]
    replay.send([status(training, state="ended")])
    page.wait("document.querySelector('.lora-loom-run') === null")
    page.wait_for_drawing()
    assert page.ask(_HEIGHT, TRAIN) == pytest.approx(before, abs=1)
    assert page.ask(f"{_NODE}.widgets.every(one => one.name !== 'lora_loom_run')", TRAIN)
    assert not page.problems()


def test_the_curve_is_that_of_the_losses(page: Page, replay: ReplayServer, training: str) -> None:
    losses = {10: 3, 20: 1, 30: 2}
    replay.send([status(training, step=n, smoothed_loss=loss) for n, loss in losses.items()])
    page.wait(f"({_POINTS})?.split(' ').length === 3")
    assert page.ask(_POINTS) == "0,6 50,94 100,50"
    # It went back, and a loss that is not known yet draws nothing.
    replay.send([status(training, step=20, smoothed_loss=3), status(training, smoothed_loss=None)])
    page.wait(f"({_POINTS}).split(' ').length === 2")
    many = [status(training, step=30 + n, smoothed_loss=2 + n % 2) for n in range(1000)]
    replay.send(many)
    page.wait(f"({_POINTS}).split(' ').at(-1).startsWith('100,')")
    assert len(page.ask(_POINTS).split()) <= 400
    assert not page.problems()


def test_a_refused_command_is_told_and_can_be_tried_again(
    page: Page, replay: ReplayServer, training: str
) -> None:
    refused = {"sample": "it has no sample prompts"}
    replay.send([status(training, refused=refused)])
    page.wait(f"({_SEEN}).length === 4")
    assert page.ask(_SEEN)[1] == ["Sample now", False]
    title = f"document.querySelector('{_BUTTON.format('sample')}').title"
    assert page.ask(title) == "it has no sample prompts"

    replay.refusal = (409, "cannot save yet")
    page.click(_BUTTON.format("save"))
    [toast] = page.wait(f"({_TOASTS}).length && {_TOASTS}")
    assert toast == ["warn", "Train LoRA: Save now", "cannot save yet"]
    page.wait(f"({_SEEN})[0][1]")

    replay.refusal = (404, "this node trains nothing now")
    page.click(_BUTTON.format("save"))
    page.wait("document.querySelector('.lora-loom-run') === null")


def test_the_end_of_the_whole_run_takes_the_buttons_away(
    page: Page, replay: ReplayServer, training: str
) -> None:
    replay.send([status(training)])
    page.wait(f"({_SEEN}).length === 4")
    interrupted = {
        "prompt_id": PROMPT_ID,
        "node_id": training,
        "node_type": TRAIN,
        "executed": [],
    }
    replay.send([{"type": "execution_interrupted", "data": interrupted}])
    page.wait("document.querySelector('.lora-loom-run') === null")


def test_the_buttons_are_no_part_of_the_workflow(
    page: Page, replay: ReplayServer, training: str
) -> None:
    before = page.ask(_SAVED, TRAIN)
    prompt = "(await app.graphToPrompt()).output[a[0]].inputs"
    inputs = _ask_async(page, prompt, training)
    replay.send([status(training)])
    page.wait(f"({_SEEN}).length === 4")
    assert page.ask(_SAVED, TRAIN) == before and len(before) > 5
    assert _ask_async(page, prompt, training) == inputs


def test_a_node_of_another_kind_or_none_gets_no_buttons(
    page: Page, replay: ReplayServer, training: str
) -> None:
    other = page.ask("app.rootGraph.nodes.find(node => node.type !== a[0]).id", TRAIN)
    replay.send([status(str(other)), status("1000000"), status("1:2:3"), status(training)])
    page.wait(f"({_SEEN}).length")
    assert page.ask("document.querySelectorAll('.lora-loom-run').length") == 1
    assert not page.problems()


def test_a_node_that_is_deleted_while_it_trains_takes_its_buttons_along(
    page: Page, replay: ReplayServer, training: str
) -> None:
    replay.send([status(training)])
    page.wait(f"({_SEEN}).length === 4")
    page.ask(f"app.rootGraph.remove({_NODE})", TRAIN)
    page.wait("document.querySelector('.lora-loom-run') === null")
    replay.send([status(training), status(training, state="ended")])
    page.wait_for_drawing()
    assert not page.problems()


def _ask_async(page: Page, expression: str, *arguments: Any) -> Any:
    """The value of an expression that has to be waited for."""
    page.ask(
        f"(async () => {{ window.loraLoomAnswer = undefined; window.loraLoomAnswer = {expression};"
        " })()",
        *arguments,
    )
    return page.wait("window.loraLoomAnswer")
