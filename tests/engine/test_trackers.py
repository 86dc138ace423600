from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from pack.engine.events import Message
from pack.engine.trackers import TensorBoard, Tracker, Wandb
from pack.tests.engine.tracker_files import (
    Events,
    log_out,
    wandb_config,
    wandb_folders,
    wandb_rows,
    wandb_run,
)
from PIL import Image

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # where nothing listens
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None; what wandb read of the environment is forgotten afterwards."""
    import wandb
    from accelerate import PartialState

    PartialState(cpu=True)  # which a training has
    log_out(tmp_path / "home", monkeypatch)
    yield
    wandb.teardown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "logs"
    path.mkdir()
    return path


def tensorboard(folder: Path, step: int = 0) -> TensorBoard:
    return TensorBoard(folder, "project", step=step, arguments={})


def wandb_tracker(folder: Path, told: list[Message] | None = None, **arguments: str) -> Wandb:
    tell = (told if told is not None else []).append
    return Wandb(folder, "project", run_id="abc123", arguments=arguments, tell=tell)


def log_steps(tracker: Tracker, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        tracker.log(step, {"loss/current": scale / step, "lr/unet": step * 1e-5})


def curve(steps: range, scale: float = 1.0) -> dict[int, float]:
    return {step: scale / step for step in steps}


def gradient(width: int, height: int) -> Image.Image:
    pixels = np.indices((height, width)).sum(0)[..., None] * np.array([1, 2, 3])
    return Image.fromarray((pixels % 256).astype(np.uint8))


def test_tensorboard_holds_what_was_logged(folder: Path) -> None:
    tracker = tensorboard(folder)
    tracker.open()
    log_steps(tracker, range(1, 201))
    tracker.close()
    scalars = Events(folder / "project").scalars()
    # Event files hold float32.
    assert scalars["loss/current"] == {
        step: float(np.float32(value)) for step, value in curve(range(1, 201)).items()
    }
    assert scalars["lr/unet"] == {step: float(np.float32(step * 1e-5)) for step in range(1, 201)}


def test_tensorboard_is_up_to_date_after_each_step(folder: Path) -> None:
    tracker = tensorboard(folder)
    tracker.open()
    for step in (1, 2, 3):
        tracker.log(step, {"loss/current": 0.5})
        assert list(Events(folder / "project").scalars()["loss/current"]) == list(
            range(1, step + 1)
        )
    tracker.close()


def test_a_resumed_tensorboard_replaces_the_steps_that_are_repeated(folder: Path) -> None:
    for begun, last, scale in ((0, 57, 1.0), (50, 80, 2.0), (40, 60, 4.0)):
        tracker = tensorboard(folder, begun)
        tracker.open()
        log_steps(tracker, range(begun + 1, last + 1), scale)
        tracker.close()
    expected = curve(range(1, 41)) | curve(range(41, 61), 4.0)
    assert Events(folder / "project").scalars()["loss/current"] == pytest.approx(expected, rel=1e-6)


def test_a_rewound_tensorboard_replaces_the_steps_that_are_repeated(folder: Path) -> None:
    tracker = tensorboard(folder)
    tracker.open()
    log_steps(tracker, range(1, 31))
    tracker.go_back(20)
    log_steps(tracker, range(21, 26), 3.0)
    tracker.close()
    expected = curve(range(1, 21)) | curve(range(21, 26), 3.0)
    assert Events(folder / "project").scalars()["loss/current"] == pytest.approx(expected, rel=1e-6)


def test_tensorboard_shows_pictures_of_any_size_with_their_captions(folder: Path) -> None:
    pictures = [("a red star", gradient(40, 24)), ("a | b\nc", gradient(16, 32))]
    tracker = tensorboard(folder)
    tracker.open()
    tracker.log_pictures(7, "samples", pictures)
    tracker.log_pictures(7, "loss/by_time", [("", gradient(30, 20))])
    tracker.close()
    events = Events(folder / "project")
    images = events.images()
    assert images.keys() == {"samples/00", "samples/01", "loss/by_time"}
    for index, (_, picture) in enumerate(pictures):
        assert np.array_equal(np.asarray(images[f"samples/{index:02d}"][7]), np.asarray(picture))
    assert np.array_equal(np.asarray(images["loss/by_time"][7]), np.asarray(gradient(30, 20)))
    assert "00. a red star" in events.texts()["samples/captions"][7]


def test_tensorboard_shows_the_settings_as_text_and_to_compare_by(folder: Path) -> None:
    settings = {"learning_rate": 1e-4, "sdpa": True, "network_dim": 16, "optimizer_type": "AdamW"}
    tracker = tensorboard(folder)
    tracker.open()
    tracker.log_settings(0, settings)
    tracker.close()
    events = Events(folder / "project")
    assert all(
        f"| {name} | {value} |" in events.texts()["settings"][0] for name, value in settings.items()
    )
    assert events.hyperparameters() == settings
    assert [path.name for path in folder.iterdir()] == ["project"]
    assert all(path.is_file() for path in (folder / "project").iterdir())


def test_wandb_holds_what_was_logged(folder: Path) -> None:
    told: list[Message] = []
    tracker = wandb_tracker(folder, told, name="my run", notes="what it is for")
    tracker.open()
    log_steps(tracker, range(1, 201))
    tracker.log(200, {"loss/validation": 0.25})
    tracker.log_settings(0, {"learning_rate": 1e-4, "optimizer_type": "AdamW"})
    tracker.log_pictures(200, "samples", [("a red star", gradient(40, 24))])
    tracker.close()
    (run,) = wandb_folders(folder)
    rows = wandb_rows(run)
    assert {step: row["loss/current"] for step, row in rows.items()} == curve(range(1, 201))
    assert rows[200]["loss/validation"] == 0.25
    assert rows[200]["samples/captions"] == ["a red star"]
    (file,) = rows[200]["samples/filenames"]
    with Image.open(run / "files" / file) as image:
        assert np.array_equal(np.asarray(image), np.asarray(gradient(40, 24)))
    assert wandb_config(run) == {"learning_rate": 1e-4, "optimizer_type": "AdamW"}
    about = wandb_run(run)
    assert (about.run_id, about.project) == ("abc123", "project")
    assert (about.display_name, about.notes) == ("my run", "what it is for")
    (message,) = told
    assert message.level == "info" and f'wandb sync "{run}"' in message.text


def test_a_resumed_wandb_run_logs_no_step_twice(folder: Path) -> None:
    for begun, last in ((0, 57), (50, 55), (50, 80)):
        tracker = wandb_tracker(folder)
        tracker.open()
        log_steps(tracker, range(begun + 1, last + 1))
        tracker.close()
    runs = wandb_folders(folder)
    assert len({wandb_run(run).run_id for run in runs}) == 1
    rows = [(step, row["loss/current"]) for run in runs for step, row in wandb_rows(run).items()]
    assert dict(rows) == curve(range(1, 81)) and len(rows) == 80


def test_a_rewound_wandb_run_goes_on_where_it_was(folder: Path) -> None:
    tracker = wandb_tracker(folder)
    tracker.open()
    log_steps(tracker, range(1, 31))
    tracker.go_back(20)
    log_steps(tracker, range(21, 41), 3.0)
    tracker.close()
    (run,) = wandb_folders(folder)
    found = {step: row["loss/current"] for step, row in wandb_rows(run).items()}
    assert found == curve(range(1, 30)) | curve(range(30, 41), 3.0)


def test_wandb_is_up_to_date_within_seconds(folder: Path) -> None:
    import wandb

    if "x_transaction_log_flush_interval" not in wandb.Settings.model_fields:
        pytest.skip("this wandb only writes whole blocks of 32 KiB")
    tracker = wandb_tracker(folder)
    tracker.open()
    log_steps(tracker, range(1, 6))
    end = time.monotonic() + 60
    (run,) = wandb_folders(folder)
    while len(wandb_rows(run)) < 4:  # the last one waits for more of its step
        assert time.monotonic() < end
        time.sleep(0.1)
    tracker.close()


def test_wandb_says_nothing_of_the_machine_or_the_code(folder: Path) -> None:
    tracker = wandb_tracker(folder)
    tracker.open()
    tracker.log(1, {"loss/current": 0.5})
    tracker.close()
    (run,) = wandb_folders(folder)
    assert [path for path in (run / "files").rglob("*") if path.is_file()] == []
    about = wandb_run(run)
    assert not about.host and not about.git.remote_url
    assert sys.executable.encode() not in next(run.glob("*.wandb")).read_bytes()


def test_wandb_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = wandb_tracker(folder)
    tracker.open()
    tracker.log(1, {"loss/current": 0.5})
    tracker.log_pictures(1, "samples", [("", gradient(8, 8))])
    tracker.log_settings(0, {"learning_rate": 1e-4})
    tracker.close()
    assert list(folder.iterdir()) == []


def test_loggers_draw_no_random_numbers(folder: Path) -> None:
    def state() -> tuple[object, list[int], list[int]]:
        numbers: list[int] = np.random.get_state()[1].tolist()
        return random.getstate(), numbers, torch.get_rng_state().tolist()

    before = state()
    for tracker in (tensorboard(folder), wandb_tracker(folder)):
        tracker.open()
        log_steps(tracker, range(1, 4))
        tracker.log_pictures(3, "samples", [("", gradient(8, 8))])
        tracker.log_settings(0, {"network_dim": 2})
        tracker.close()
    assert state() == before


class Refusing(BaseHTTPRequestHandler):
    """A server of wandb's that takes no key."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:  # noqa: N802
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    def log_message(self, format: str, *values: object) -> None:
        """Prints nothing."""


@pytest.fixture
def refusing_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# Ends as a job does, without waiting for what wandb still tries.
PROCESS = """
import os, sys, types
from pathlib import Path
pack = types.ModuleType("pack"); pack.__path__ = ["."]; sys.modules["pack"] = pack
from accelerate import PartialState
from pack.engine.trackers import Wandb
PartialState(cpu=True)
tell = lambda message: sys.stdout.write(f"{message.level}: {message.text}\\n")
tracker = Wandb(Path(sys.argv[1]), "project", run_id="abc123", arguments={}, tell=tell)
tracker.open()
for step in range(1, 101):
    tracker.log(step, {"loss/current": 1 / step, "lr/unet": step * 1e-5})
sys.stdout.flush()
tracker.close()
os._exit(0)
"""


def log_in_process(folder: Path) -> list[str]:
    """The messages of a process that logs 100 steps; for what wandb does not come back from."""
    command = [sys.executable, "-c", PROCESS, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def log_here(folder: Path) -> list[str]:
    """The same without a process."""
    told: list[Message] = []
    tracker = wandb_tracker(folder, told)
    tracker.open()
    log_steps(tracker, range(1, 101))
    tracker.close()
    return [f"{message.level}: {message.text}" for message in told]


def log_in(patch: pytest.MonkeyPatch, url: str, key: str = "") -> None:
    patch.setenv("WANDB_BASE_URL", url)
    if key:
        patch.setenv("WANDB_API_KEY", key)


def assert_written_offline(folder: Path) -> None:
    """All 100 steps, and no key."""
    (run,) = wandb_folders(folder)
    found = {step: row["loss/current"] for step, row in wandb_rows(run).items()}
    assert found == curve(range(1, 101))
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 2
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_without_a_server_the_run_is_written_offline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, NOWHERE, KEY)
    warning, info = log_here(folder)
    assert f"warning: wandb: {NOWHERE} does not answer, so the run is written offline" in warning
    assert info.startswith("info: wandb writes offline")
    assert_written_offline(folder)


def test_a_login_in_netrc_counts(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, NOWHERE)
    file = tmp_path / "home" / ".netrc"
    file.write_text(f"machine 127.0.0.1:9\nlogin user\npassword {KEY}\n")
    file.chmod(0o600)
    assert f"{NOWHERE} does not answer" in log_here(folder)[0]
    assert_written_offline(folder)


@pytest.mark.parametrize("text", ["machine example.org login a password b", "machine"])
def test_without_a_login_no_server_is_asked(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    log_in(monkeypatch, NOWHERE)
    (tmp_path / "home" / ".netrc").write_text(text)
    (message,) = log_here(folder)
    assert message.startswith("info: wandb writes offline")
    assert_written_offline(folder)


def test_wandb_mode_offline_holds_for_who_is_logged_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, NOWHERE, KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (message,) = log_here(folder)
    assert message.startswith("info: wandb writes offline")
    assert_written_offline(folder)


@pytest.mark.parametrize("key", [KEY, "short"])
def test_a_server_that_refuses_costs_a_warning(
    folder: Path, refusing_server: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    log_in(monkeypatch, refusing_server, key)
    messages = log_in_process(folder)
    assert [line.partition(":")[0] for line in messages] == ["warning", "info"]
    assert "so the run is written offline" in messages[0]
    assert_written_offline(folder)
