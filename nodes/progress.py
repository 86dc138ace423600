"""Events of a job -> progress bar, text on the node, messages; and ComfyUI's Cancel."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer

from ..engine.errors import EngineError
from ..engine.events import Event, Message, Progress, in_words

logger = logging.getLogger(__name__)


class NodeProgress:
    """Shows what a job reports on the node ``node_id``; in a ``with`` block also its errors."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._task = ""
        self._bar: Any = None
        self.last: Progress | None = None
        self.messages: list[str] = []

    def __enter__(self) -> NodeProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # ComfyUI shows that there is an error at once, but what it is only on request.
        if isinstance(error, EngineError):
            self.message("error", "error", str(error))

    def __call__(self, event: Event) -> None:
        """A reporter; raises ComfyUI's interrupt when the user has cancelled."""
        if isinstance(event, Progress):
            if event.task == "train":
                self.last = event
            self.text(f"{event.task} {event.done}/{event.total} {in_words(event)}".strip())
            if event.task != self._task:
                # A bar shows nothing before it is further than ever, so each task gets its own.
                self._task = event.task
                self._bar = comfy.utils.ProgressBar(event.total, node_id=self._node_id)
            self._bar.update_absolute(event.done, event.total)
        elif isinstance(event, Message):
            self.messages.append(event.text)
            level = logging.WARNING if event.level == "warning" else logging.INFO
            logger.log(level, "%s", event.text)
            if event.level == "warning":
                self.message("warning", "note", event.text)

    def text(self, text: str) -> None:
        """Show one line on the node while it runs."""
        send_text(self._node_id, text)

    def message(self, level: str, summary: str, detail: str) -> None:
        """Show a note in the corner of the window."""
        send_message(self._node_id, level, summary, detail)


def send_text(node_id: str, text: str) -> None:
    """Show one line on a node while it runs."""
    PromptServer.instance.send_progress_text(text, node_id)


def send_message(node_id: str, level: str, summary: str, detail: str) -> None:
    """Show a note with a node's title in the corner of the window."""
    record = {"node_id": node_id, "level": level, "summary": summary, "detail": detail}
    server = PromptServer.instance
    server.send_sync("lora_loom.message", record, server.client_id)


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt when the user has cancelled; only from the node's own thread."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def free_memory() -> None:
    """Give the models that ComfyUI holds back to the system."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
