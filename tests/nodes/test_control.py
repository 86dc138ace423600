from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pack.engine import control as files_of_commands
from pack.engine.control import ControlFile
from pack.engine.events import Progress, silent
from pack.engine.jobs import run_control
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.run_control import Commands, RunControl
from pack.engine.signals import Stopped

NODE = "7:3"
PATH = "/lora_loom/control"


class Server:
    """ComfyUI's, as far as it is used: it has routes and sends to the browser."""

    client_id = "browser"

    def __init__(self) -> None:
        self.routes = web.RouteTableDef()
        self.sent: list[tuple[Any, ...]] = []

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.sent.append(("text", text, node_id))

    def send_sync(self, event: str, record: dict[str, Any], client: str) -> None:
        self.sent.append((event, record, client))

    def of_kind(self, kind: str) -> list[Any]:
        return [one[1] for one in self.sent if one[0] == kind]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> Server:
    server = Server()
    monkeypatch.setattr(sys.modules["server"].PromptServer, "instance", server)
    name = "throw_exception_if_processing_interrupted"
    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, name, lambda: None, raising=False)
    return server


@pytest.fixture
def control(
    load: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> types.ModuleType:
    module = load("control")
    monkeypatch.setattr(module, "_LOOK_EVERY_SECONDS", 0)
    monkeypatch.setattr(run_control, "LOOK_EVERY_SECONDS", 0)
    monkeypatch.setattr(run_control, "WRITE_EVERY_SECONDS", 0)
    module.add_routes()
    return module


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path, "cats")


@pytest.fixture
def run(control: Any, files: RunFiles) -> Iterator[Any]:
    """The run of the node; its process has said nothing yet."""
    with control.running(NODE, files) as run:
        yield run


@pytest.fixture
def process(run: Any, files: RunFiles) -> Iterator[RunControl]:
    """The process that trains; it is in its third step."""
    refused = {"sample": "it has no sample prompts"}
    with RunControl(files, silent, refused=refused) as process:
        process.report(Progress("train", 3, 10, loss=0.25))
        yield process


def post(server: Server, body: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    """The answer of the real route to a real request."""
    options = {"json": body} | options

    async def ask() -> tuple[int, dict[str, Any]]:
        app = web.Application()
        app.add_routes(server.routes)
        async with TestClient(TestServer(app)) as client:
            response = await client.post(PATH, **options)
            return response.status, await response.json()

    return asyncio.run(ask())


@pytest.mark.parametrize("command", ["stop", "save", "pause", "resume"])
def test_a_button_writes_the_command_for_the_run_of_its_node(
    server: Server, process: RunControl, files: RunFiles, command: str
) -> None:
    body = {"node_id": NODE, "command": command}
    assert post(server, body) == (200, {"accepted": command})
    assert ControlFile(files.control, silent).take() == [command]


def test_a_node_that_trains_nothing_is_not_found(
    server: Server, process: RunControl, files: RunFiles
) -> None:
    before = sorted(files.folder.iterdir())
    for node_id in ("8", "", str(files.control), None, [NODE]):
        status, answer = post(server, {"node_id": node_id, "command": "stop"})
        assert (status, answer) == (404, {"error": "this node trains nothing now"})
    assert sorted(files.folder.iterdir()) == before


def test_when_the_run_is_over_its_node_is_not_found(
    control: Any, server: Server, files: RunFiles
) -> None:
    with pytest.raises(KeyboardInterrupt), control.running(NODE, files):
        raise KeyboardInterrupt
    assert post(server, {"node_id": NODE, "command": "stop"})[0] == 404
    assert server.of_kind("lora_loom.run") == [{"node_id": NODE, "state": "ended"}]


@pytest.mark.parametrize(
    "options",
    [
        {"json": {"node_id": NODE}},
        {"json": [1]},
        {"json": None, "data": b"{"},
        {"json": None, "data": b'{"node_id": "7:3", "command": "stop"}'},  # no JSON, it says
        {"json": {"node_id": NODE, "command": "../../x"}},
        {"json": {"node_id": NODE, "command": ["stop"]}},
    ],
)
def test_a_wrong_request_is_refused(
    server: Server, process: RunControl, files: RunFiles, options: dict[str, Any]
) -> None:
    status, answer = post(server, None, **options)
    assert status == 400 and answer["error"].startswith("expected ")
    assert not files.control.exists()


def test_a_run_that_has_not_begun_is_told_nothing(
    server: Server, run: Any, files: RunFiles
) -> None:
    body = {"node_id": NODE, "command": "stop"}
    expected = {"error": "cannot stop yet; wait for the first step of the training"}
    assert post(server, body) == (409, expected)
    with RunControl(files, silent) as process:
        assert post(server, body) == (409, expected)
        process.report(Progress("cache images", 1, 5))
        assert post(server, body) == (409, expected)
    assert not files.control.exists()


def test_the_status_of_an_earlier_run_is_not_that_of_this_one(
    control: Any, server: Server, files: RunFiles
) -> None:
    with RunControl(files, silent) as process:
        process.report(Progress("train", 3, 10))
    with control.running(NODE, files) as run:
        run.poll()
        assert run.status() is None and server.sent == []
        assert post(server, {"node_id": NODE, "command": "stop"})[0] == 409


def test_what_a_run_cannot_do_is_told(server: Server, process: RunControl) -> None:
    status, answer = post(server, {"node_id": NODE, "command": "sample"})
    assert (status, answer) == (409, {"error": "cannot sample: it has no sample prompts"})


def test_a_folder_that_is_gone_is_told(
    server: Server, process: RunControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, lines: list[str]) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_of_commands, "_publish", full)
    status, answer = post(server, {"node_id": NODE, "command": "stop"})
    assert status == 409 and "cannot be written (No space left on device)" in answer["error"]


def test_the_node_is_shown_what_is_new_and_nothing_before_the_first_step(
    run: Any, files: RunFiles, server: Server
) -> None:
    with RunControl(files, silent) as process:
        run.poll()
        process.report(Progress("cache images", 1, 5))
        run.poll()
        assert server.sent == []
        process.report(Progress("train", 3, 10, loss=0.25))
        run.poll()
        run.poll()
    [record] = server.of_kind("lora_loom.run")
    assert record == {
        "node_id": NODE,
        "state": "training",
        "step": 3,
        "total_steps": 10,
        "loss": 0.25,
        "smoothed_loss": None,
        "refused": {},
        "obeyed": {},
    }
    assert server.sent[0][2] == "browser"


def test_a_pause_is_told_once_on_the_node_and_a_save_in_the_corner(
    run: Any, process: RunControl, files: RunFiles, server: Server
) -> None:
    run.poll()
    run.request("pause")
    assert process.commands() == Commands(pause=True)
    run.request("save")
    assert process.wait_while_paused() == Commands(save=True, pause=True)
    for _ in range(3):
        run.poll()
    assert server.of_kind("text") == ["paused after step 3 of 10"]
    assert server.of_kind("lora_loom.message") == []
    run.request("resume")
    process.wait_while_paused()
    run.poll()
    [message] = server.of_kind("lora_loom.message")
    assert (message["summary"], message["detail"]) == (
        "saved",
        "cats.safetensors after step 3 of 10",
    )
    assert [one["state"] for one in server.of_kind("lora_loom.run")][-1] == "training"


def test_cancel_goes_through(run: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancelled() -> None:
        raise KeyboardInterrupt

    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancelled)
    with pytest.raises(KeyboardInterrupt):
        run.poll()


def test_a_run_that_was_told_to_stop_is_told_from_others(control: Any, files: RunFiles) -> None:
    with control.running(NODE, files) as run:
        with RunControl(files, silent) as process:
            process.report(Progress("train", 3, 10))
        assert not run.was_told_to_stop()
    with control.running(NODE, files) as run:
        assert not run.was_told_to_stop()
        with pytest.raises(Stopped), RunControl(files, silent) as process:
            process.report(Progress("train", 3, 10))
            run.request("stop")
            assert process.commands().stop
            raise Stopped
        assert run.was_told_to_stop()


def test_how_a_run_ended_is_shown_though_nobody_looked_in_between(
    control: Any, files: RunFiles, server: Server
) -> None:
    with control.running(NODE, files) as run, RunControl(files, silent) as process:
        process.report(Progress("train", 3, 10))
        run.poll()
        run.request("save")
        process.commands()
    states = [record["state"] for record in server.of_kind("lora_loom.run")]
    assert states == ["training", "finished", "ended"]
    [message] = server.of_kind("lora_loom.message")
    assert message["summary"] == "saved"


def test_without_a_server_the_pack_loads_all_the_same(
    control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["server"].PromptServer, "instance")
    control.add_routes()
