"""Events of a job -> progress bar, text on the node, messages; and ComfyUI's Cancel."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.utils
from server import PromptServer

from ..engine.events import Event, Message, Progress, in_words

logger = logging.getLogger(__name__)


class NodeProgress:
    """Shows what a job reports on the node ``node_id``."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self.last: Progress | None = None
        self.messages: list[str] = []

    def __call__(self, event: Event) -> None:
        """A reporter; raises ComfyUI's interrupt when the user has cancelled."""
        if isinstance(event, Progress):
            if event.task == "train":
                self.last = event
            self.text(f"{event.task} {event.done}/{event.total} {in_words(event)}".strip())
            self._bar.update_absolute(event.done, event.total)
        elif isinstance(event, Message):
            self.messages.append(event.text)
            level = logging.WARNING if event.level == "warning" else logging.INFO
            logger.log(level, "%s", event.text)
            if event.level == "warning":
                self.message("warning", "LoRA Loom", event.text)

    def text(self, text: str) -> None:
        """Show one line on the node while it runs."""
        PromptServer.instance.send_progress_text(text, self._node_id)

    def message(self, level: str, summary: str, detail: str) -> None:
        """Show a note in the corner of the window."""
        record = {"node_id": self._node_id, "level": level, "summary": summary, "detail": detail}
        server = PromptServer.instance
        server.send_sync("lora_loom.message", record, server.client_id)


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt when the user has cancelled; only from the node's own thread."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def free_memory() -> None:
    """Give the models that ComfyUI holds back to the system."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
