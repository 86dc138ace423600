"""A training in a running ComfyUI that is told what to do while it goes on."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.jobs.outputs import RunFiles
from pack.engine.loss_history import read_history
from pack.engine.run_status import read_status
from pack.engine.weights import open_checkpoint
from pack.tests.comfyui import graphs
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.comfyui.server import PACK, ComfyServer, Event
from safetensors.torch import load_file

STEPS = 400
PATH = "/lora_loom/control"


@pytest.fixture(scope="module")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(comfyui.folder, comfyui.python, base) as running:
        yield running


def files(server: ComfyServer, name: str) -> RunFiles:
    return RunFiles(server.base / "output" / "loras", name)


def demo(name: str, **changes: Any) -> graphs.Graph:
    """A training, and a node that waits for its LoRA."""
    graph = graphs.demo(output_name=name, max_train_steps=STEPS, **changes)
    graph["loss"] = graphs.node("LossGraphNode", loss=["train", 2], filename_prefix=name)
    return graph


def refusal(server: ComfyServer, body: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(PATH, body)
    return caught.value.code, json.loads(caught.value.read())["error"]


class Buttons:
    """Presses the buttons of the node one after the other; notes what was seen in between."""

    def __init__(self, server: ComfyServer, files: RunFiles) -> None:
        self._server, self._files = server, files
        self._done = self._presses()
        self._wanted = next(self._done)
        self.paused_at = self.saved_at = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "lora_loom.run" and self._wanted(event.data):
            self._wanted = next(self._done)

    def _presses(self) -> Iterator[Any]:
        yield lambda run: run["state"] == "training" and run["step"] > 1
        assert refusal(self._server, {"node_id": "demo", "command": "stop"})[0] == 404
        assert refusal(self._server, {"node_id": "train", "command": "sample"}) == (
            409,
            "cannot sample: it has no sample prompts",
        )
        self._press("pause")
        yield lambda run: run["state"] == "paused"
        self.paused_at = len(read_history(self._files.history))
        assert not self._files.lora.exists()
        self._press("save")
        yield lambda run: run["obeyed"].get("save") == 1
        self.saved_at = int(open_checkpoint(self._files.lora).metadata["ss_steps"])
        assert len(read_history(self._files.history)) == self.paused_at
        self._press("resume")
        yield lambda run: run["step"] > self.paused_at
        self._press("stop")
        yield lambda run: False

    def _press(self, command: str) -> None:
        body = {"node_id": "train", "command": command}
        assert self._server.post(PATH, body) == {"accepted": command}


def test_the_buttons_pause_save_and_stop_and_the_result_stays_exact(server: ComfyServer) -> None:
    place = files(server, "told")
    buttons = Buttons(server, place)
    run = server.run(demo("told"), on_event=buttons)
    assert run.status == "success", run.error and run.error["exception_message"]
    steps = len(read_history(place.history))
    assert 0 < buttons.paused_at == buttons.saved_at < steps < STEPS
    assert run.data("lora_loom.run")[-1] == {"node_id": "train", "state": "ended"}
    # The workflow went on with what was trained so far.
    assert run.outputs["loss"]["images"]
    stopped = (
        f"Stopped after step {steps} of {STEPS}. Everything is saved; queue again to continue."
    )
    assert stopped in run.outputs["train"]["text"][0]
    found = read_status(place.status)
    assert found and (found.state, found.told_to_stop, found.step) == ("stopped", True, steps)
    assert open_checkpoint(place.lora).metadata["ss_steps"] == str(steps)
    assert refusal(server, {"node_id": "train", "command": "save"})[0] == 404

    again = server.run(demo("told"))
    assert again.status == "success", again.error
    assert f"continuing after step {steps} of {STEPS}" in again.outputs["train"]["text"][0]
    assert server.run(demo("straight")).status == "success"
    told, straight = load_file(place.lora), load_file(files(server, "straight").lora)
    assert told.keys() == straight.keys()
    assert all(torch.equal(told[name], straight[name]) for name in told)


def test_the_shell_can_stop_what_comfyui_trains(server: ComfyServer, comfyui: ComfyUI) -> None:
    place = files(server, "by shell")
    done: list[subprocess.CompletedProcess[str]] = []

    def ask(path: Path) -> None:
        command = [comfyui.python, "-m", "engine", "control", path, "stop", "--wait"]
        done.append(subprocess.run(command, cwd=PACK, capture_output=True, text=True))

    askers: list[threading.Thread] = []

    def on_event(event: Event) -> None:
        if event.kind == "lora_loom.run" and not askers:
            askers.append(threading.Thread(target=ask, args=(place.folder / place.name,)))
            askers[0].start()

    run = server.run(demo("by shell"), on_event=on_event)
    askers[0].join()
    assert run.status == "success", run.error and run.error["exception_message"]
    steps = len(read_history(place.history))
    assert f"Stopped after step {steps} of {STEPS}" in run.outputs["train"]["text"][0]
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout.startswith(f"by shell: stopped, step {steps}/{STEPS}, loss ")


def test_nobody_trains_when_nothing_runs(server: ComfyServer) -> None:
    assert refusal(server, {"node_id": "train", "command": "stop"}) == (
        404,
        "this node trains nothing now",
    )
    assert refusal(server, {"node_id": "train", "command": "explode"})[0] == 400
