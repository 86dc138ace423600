from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from pack.engine.errors import DataError
from pack.engine.events import Finished, Message, Progress, Saved

NODE = "7:3"


class Screen:
    """What the user's browser is sent, in order."""

    client_id = "browser"

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.sent.append(("text", text, node_id))

    def send_sync(self, event: str, record: dict[str, Any], client: str) -> None:
        self.sent.append((event, record, client))

    def bar(self, total: int, node_id: str) -> Any:
        """As ComfyUI's: it is not shown before it moves, and never when it goes back."""
        screen = self

        class Bar:
            furthest = -1

            def update_absolute(self, done: int, total: int) -> None:
                if done > self.furthest:
                    screen.sent.append(("bar", done, total, node_id))
                self.furthest = max(done, self.furthest)

        return Bar()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> Screen:
    screen = Screen()
    monkeypatch.setattr(sys.modules["server"].PromptServer, "instance", screen)
    monkeypatch.setattr(sys.modules["comfy.utils"], "ProgressBar", screen.bar, raising=False)
    return screen


@pytest.fixture
def progress(load: Callable[[str], Any], screen: Screen) -> Any:
    return load("progress").NodeProgress(NODE)


def test_a_step_moves_the_bar_and_is_told_on_the_node(progress: Any, screen: Screen) -> None:
    progress(Progress("train", 3, 10, loss=0.25, step_seconds=2.0, eta_seconds=14.0))
    assert screen.sent == [
        ("text", "train 3/10 loss 0.2500, 2.0 s/step, 14.0 s left", NODE),
        ("bar", 3, 10, NODE),
    ]


def test_an_unknown_loss_leaves_no_gap_at_the_end(progress: Any, screen: Screen) -> None:
    progress(Progress("cache images", 1, 20, unit="image"))
    assert screen.sent[0] == ("text", "cache images 1/20", NODE)


def test_the_last_step_is_remembered_but_not_that_of_other_tasks(progress: Any) -> None:
    assert progress.last is None
    step = Progress("train", 3, 10)
    for event in (Progress("cache images", 1, 20), step, Progress("preview", 1, 2)):
        progress(event)
    assert progress.last == step


def test_a_message_is_kept_and_logged(
    progress: Any, screen: Screen, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pack.nodes.progress")
    progress(Message("Encoded 100% of it."))
    assert progress.messages == ["Encoded 100% of it."]
    assert [(line.levelname, line.message) for line in caplog.records] == [
        ("INFO", "Encoded 100% of it.")
    ]
    assert screen.sent == []


def test_a_warning_is_shown_in_a_corner_of_the_window_too(
    progress: Any, screen: Screen, caplog: pytest.LogCaptureFixture
) -> None:
    progress(Message("It is slow.", level="warning"))
    shown = {"node_id": NODE, "level": "warning", "summary": "note", "detail": "It is slow."}
    assert screen.sent == [("lora_loom.message", shown, "browser")]
    assert progress.messages == ["It is slow."]
    assert [line.levelname for line in caplog.records] == ["WARNING"]


def test_other_events_show_nothing(progress: Any, screen: Screen) -> None:
    progress(Saved("/x/cats.safetensors", "lora"))
    progress(Finished("train"))
    assert screen.sent == [] and progress.messages == []


def test_cancel_is_asked_of_comfyui(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled() -> None:
        raise KeyboardInterrupt

    management = sys.modules["comfy.model_management"]
    name = "throw_exception_if_processing_interrupted"
    monkeypatch.setattr(management, name, lambda: None, raising=False)
    load("progress").check_cancelled()
    monkeypatch.setattr(management, name, cancelled)
    with pytest.raises(KeyboardInterrupt):
        load("progress").check_cancelled()


def test_memory_is_only_given_back_when_no_model_holds_it(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("unload_all_models", "soft_empty_cache"):
        record = partial(called.append, name)
        monkeypatch.setattr(sys.modules["comfy.model_management"], name, record, raising=False)
    load("progress").free_memory()
    assert called == ["unload_all_models", "soft_empty_cache"]


def test_a_task_after_a_longer_one_moves_the_bar_from_its_first_step(
    progress: Any, screen: Screen
) -> None:
    for event in (Progress("cache images", 20, 20), Progress("train", 1, 400)):
        progress(event)
    assert [sent for sent in screen.sent if sent[0] == "bar"] == [
        ("bar", 20, 20, NODE),
        ("bar", 1, 400, NODE),
    ]


def test_an_error_that_a_user_can_mend_is_shown_in_a_corner_of_the_window(
    progress: Any, screen: Screen
) -> None:
    with pytest.raises(DataError), progress:
        raise DataError("the folder is empty")
    shown = {"node_id": NODE, "level": "error", "summary": "error", "detail": "the folder is empty"}
    assert screen.sent == [("lora_loom.message", shown, "browser")]
    with pytest.raises(ZeroDivisionError), progress:
        raise ZeroDivisionError
    assert len(screen.sent) == 1
