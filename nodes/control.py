"""The buttons of a training: what goes on in this ComfyUI, and how it is told what to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from server import PromptServer

from ..engine import control
from ..engine.errors import DataError, EngineError
from ..engine.jobs.outputs import RunFiles
from ..engine.run_status import Status, read_status
from .progress import check_cancelled, send_message, send_text

_LOOK_EVERY_SECONDS = 0.5
# Before there are steps nothing can be saved, and the process would not listen.
_NOT_YET = ("starting", "caching")


class ControlledRun:
    """A training process that the node ``node_id`` has started and waits for."""

    def __init__(self, node_id: str, files: RunFiles) -> None:
        self.node_id = node_id
        self._files = files
        self._begun = time.time()
        self._seen: Status | None = None
        self._next_look = 0.0

    def poll(self) -> None:
        """Show on the node what is new; to be called often, from the node's own thread.

        Raises:
            InterruptProcessingException: the user has cancelled.
        """
        check_cancelled()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_EVERY_SECONDS
            self._look()

    def status(self) -> Status | None:
        """What the process said last; None until it has said anything."""
        try:
            found = read_status(self._files.status)
        except DataError:
            return None  # the process writes it anew
        # An earlier run of the name may have left one.
        return found if found and found.started >= self._begun else None

    def was_told_to_stop(self) -> bool:
        """Whether the run has ended early because somebody wanted what is trained so far."""
        status = self.status()
        return status is not None and status.told_to_stop

    def request(self, command: str) -> None:
        """Tell the run; it obeys after the step that it is in.

        Raises:
            EngineError: it cannot do that, or not yet.
        """
        status = self.status()
        if status is None or status.state in _NOT_YET:
            raise EngineError(f"cannot {command} yet; wait for the first step of the training")
        if reason := status.refused.get(command):
            raise EngineError(f"cannot {command}: {reason}")
        control.request(self._files.control, command)

    def end(self) -> None:
        """Show how it ended, and take the buttons away."""
        self._look()
        _send({"node_id": self.node_id, "state": "ended"})

    def _look(self) -> None:
        status = self.status()
        if status and status != self._seen:
            self._show(status, self._seen)
            self._seen = status

    def _show(self, status: Status, before: Status | None) -> None:
        if status.state in _NOT_YET:
            return
        where = f"after step {status.step} of {status.total_steps}"
        if status.state == "paused" and not (before and before.state == "paused"):
            send_text(self.node_id, f"paused {where}")
        if before and status.obeyed.get("save", 0) > before.obeyed.get("save", 0):
            send_message(self.node_id, "info", "saved", f"{self._files.lora.name} {where}")
        shown = ("state", "step", "total_steps", "loss", "smoothed_loss", "refused", "obeyed")
        _send({"node_id": self.node_id} | {name: getattr(status, name) for name in shown})


# Routes are made once, before there is any run, and must find those of later.
_RUNS: dict[str, ControlledRun] = {}


@contextmanager
def running(node_id: str, files: RunFiles) -> Iterator[ControlledRun]:
    """While the block lasts, the node's buttons reach the run that it has started."""
    run = _RUNS[node_id] = ControlledRun(node_id, files)
    try:
        yield run
    finally:
        del _RUNS[node_id]
        run.end()


def add_routes() -> None:
    """To be called once, when the pack is loaded; without a server there is nobody to listen to."""
    if hasattr(PromptServer, "instance"):
        PromptServer.instance.routes.post("/lora_loom/control")(answer)


async def answer(request: web.Request) -> web.Response:
    """What a button asks for: ``{"node_id": ..., "command": ...}``.

    Which file that goes to is for us to know; a request never names one.
    """
    try:
        # A page of somewhere else may only send JSON if it is allowed to.
        if request.content_type != "application/json":
            raise ValueError("not JSON")
        body = await request.json()
        node_id, command = str(body["node_id"]), str(body["command"])
    except (ValueError, KeyError, TypeError):
        return _refusal(400, 'expected JSON with "node_id" and "command"')
    if command not in control.COMMANDS:
        return _refusal(400, f"expected one of {', '.join(control.COMMANDS)}, not {command[:40]!r}")
    run = _RUNS.get(node_id)
    if run is None:
        return _refusal(404, "this node trains nothing now")
    try:
        await asyncio.to_thread(run.request, command)
    except EngineError as error:
        return _refusal(409, str(error))
    return web.json_response({"accepted": command})


def _refusal(status: int, error: str) -> web.Response:
    return web.json_response({"error": error}, status=status)


def _send(record: dict[str, Any]) -> None:
    server = PromptServer.instance
    server.send_sync("lora_loom.run", record, server.client_id)
