from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack.engine import trackers
from pack.engine.config import FIELDS, Config
from pack.engine.errors import ConfigError
from pack.engine.events import Event, Message
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.tracking import Tracking, check, loggable_settings
from pack.engine.loss_history import read_history
from pack.engine.setting_words import base_types
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.conftest import StartJob
from pack.tests.engine.tracker_files import (
    Events,
    log_out,
    wandb_config,
    wandb_folders,
    wandb_rows,
)
from PIL import Image

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
def config(tmp_path: Path) -> Config:
    """Logs with TensorBoard."""
    return tiny.config(logging_dir=tmp_path / "logs", output_dir=tmp_path, output_name="tiny")


def changed(config: Config, **changes: Any) -> Config:
    logging = config.logging.model_dump() | changes
    return config.model_copy(update={"logging": type(config.logging)(**logging)})


def log_steps(tracking: Tracking, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        tracking.log_step(
            step,
            loss=scale / step,
            smoothed=scale / step + 1,
            learning_rates={"unet": step * 1e-5, "unet_plus": step * 1e-4},
            seconds=0.125,
            gradient_norm=2.0 * step,
            memory_mib=512.0,
        )


def track(config: Config, steps: range, state: dict[str, str] | None = None) -> dict[str, str]:
    """A run of these steps; gives its state."""
    with Tracking(config, lambda event: None, step=steps.start - 1, state=state or {}) as tracking:
        log_steps(tracking, steps)
        return tracking.state()


def run_folder(config: Config) -> Path:
    assert config.logging.logging_dir
    (folder,) = config.logging.logging_dir.iterdir()
    return folder


def curves(config: Config) -> dict[str, dict[int, float]]:
    return Events(run_folder(config) / config.logging.log_tracker_name).scalars()


def test_every_number_has_its_curve(config: Config) -> None:
    with Tracking(config, lambda event: None, state={}) as tracking:
        log_steps(tracking, range(1, 9))
        tracking.log_validation(8, 0.75)
        tracking.log_epoch(8, 0.5)
    steps = range(1, 9)
    expected = {
        "loss/current": {step: 1 / step for step in steps},
        "loss/average": {step: 1 / step + 1 for step in steps},
        "lr/unet": {step: step * 1e-5 for step in steps},
        "lr/unet_plus": {step: step * 1e-4 for step in steps},
        "grad_norm": {step: 2.0 * step for step in steps},
        "time/step_seconds": dict.fromkeys(steps, 0.125),
        "memory/peak_mib": dict.fromkeys(steps, 512.0),
        "loss/validation": {8: 0.75},
        "loss/epoch": {8: 0.5},
    }
    found = curves(config)
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert found[name] == pytest.approx(points, rel=2**-23), name  # float32


def test_what_is_not_known_has_no_curve(config: Config) -> None:
    with Tracking(config, lambda event: None, state={}) as tracking:
        tracking.log_step(1, loss=1.0, smoothed=1.0, learning_rates={"all": 1e-4}, seconds=1.0)
    assert curves(config).keys() == {"loss/current", "loss/average", "lr/all", "time/step_seconds"}


def test_both_loggers_get_the_same(config: Config) -> None:
    config = changed(config, log_with="all", log_tracker_name="my project")
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    with Tracking(config, lambda event: None, state={}) as tracking:
        log_steps(tracking, range(1, 6))
        tracking.log_images(5, [("a star", picture), ("a ring", picture)])
        tracking.log_loss_by_time(5, picture)
    folder = run_folder(config)
    (run,) = wandb_folders(folder)
    rows = wandb_rows(run)
    for name, points in curves(config).items():
        assert {step: row[name] for step, row in rows.items()} == pytest.approx(points, rel=2**-23)
    images = Events(folder / "my project").images()
    assert images.keys() == {"samples/00", "samples/01", "loss/by_time"}
    assert rows[5]["samples/captions"] == ["a star", "a ring"]
    for file in (*rows[5]["samples/filenames"], *rows[5]["loss/by_time/filenames"]):
        with Image.open(run / "files" / file) as image:
            assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_the_folder_is_named_after_prefix_and_time(config: Config) -> None:
    config = changed(config, log_prefix="lora_setting1_")
    begun = time.time()
    states = [track(config, range(1, 2)) for _ in range(3)]
    names = sorted(path.name for path in config.logging.logging_dir.iterdir())  # pyright: ignore
    assert names == sorted(state["folder"] for state in states) and len(set(names)) == 3
    times = [re.fullmatch(r"lora_setting1_(\d{14})(_\d)?", name) for name in names]
    stamps = [time.mktime(time.strptime(found[1], "%Y%m%d%H%M%S")) for found in times if found]
    assert len(stamps) == 3
    assert all(int(begun) <= stamp <= time.time() for stamp in stamps)


@pytest.mark.parametrize("log_with", ["tensorboard", "wandb", "all"])
def test_a_resumed_run_goes_on_with_its_curves(config: Config, log_with: str) -> None:
    config = changed(config, log_with=log_with)
    state = track(config, range(1, 31))
    assert track(config, range(21, 41), state) == state
    folder = run_folder(config)
    expected = pytest.approx({step: 1 / step for step in range(1, 41)}, rel=2**-23)
    if log_with != "wandb":
        assert curves(config)["loss/current"] == expected
    if log_with != "tensorboard":
        rows = [part for run in wandb_folders(folder) for part in wandb_rows(run).items()]
        assert len(rows) == 40
        assert {step: row["loss/current"] for step, row in rows} == expected


def test_a_run_that_went_back_shows_its_second_try(config: Config) -> None:
    with Tracking(config, lambda event: None, state={}) as tracking:
        log_steps(tracking, range(1, 31))
        tracking.rewind(20)
        log_steps(tracking, range(21, 26), 0.5)
    expected = {step: (1 if step <= 20 else 0.5) / step for step in range(1, 26)}
    assert curves(config)["loss/current"] == pytest.approx(expected, rel=2**-23)


def test_a_resumed_run_whose_folder_is_gone_gets_a_new_one(config: Config) -> None:
    state = track(config, range(1, 3))
    run_folder(config).rename(config.output.output_dir / "elsewhere")  # pyright: ignore
    again = track(config, range(3, 6), state)
    assert run_folder(config).name == again["folder"] and again["wandb_id"] == state["wandb_id"]
    assert list(curves(config)["loss/current"]) == [3, 4, 5]


def test_without_a_logger_nothing_is_done(tmp_path: Path) -> None:
    config = tiny.config(output_dir=tmp_path / "out", output_name="tiny")
    check(config)
    events: list[Event] = []
    with Tracking(config, events.append, state={}) as tracking:
        log_steps(tracking, range(1, 3))
        tracking.rewind(1)
        assert not tracking.is_active and tracking.state() == {}
    assert events == [] and not (tmp_path / "out").exists()
    assert Tracking(config, events.append, state={"folder": "f"}).state() == {"folder": "f"}


@pytest.mark.parametrize("where", ["output_dir", "WANDB_DIR"])
def test_wandb_alone_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    place = tmp_path / "out"
    if where == "WANDB_DIR":
        place = tmp_path / "runs"
        monkeypatch.setenv("WANDB_DIR", str(place))
    config = tiny.config(output_dir=tmp_path / "out", output_name="tiny", log_with="wandb")
    check(config)
    state = track(config, range(1, 5))
    track(config, range(5, 9), state)
    rows = [wandb_rows(run) for run in wandb_folders(place)]
    assert sorted(step for part in rows for step in part) == list(range(1, 9))
    assert state.keys() == {"wandb_id"}


def test_the_settings_are_logged_if_that_is_wanted(config: Config) -> None:
    quiet = changed(config, log_with="all")
    track(quiet, range(1, 2))
    folder = run_folder(quiet)
    assert Events(folder / "network_train").texts() == {}
    assert wandb_config(wandb_folders(folder)[0]) == {}

    config = changed(quiet, logging_dir=folder.parent.with_name("more"), log_config=True)
    track(config, range(1, 2))
    folder = run_folder(config)
    expected = loggable_settings(config)
    assert wandb_config(wandb_folders(folder)[0]) == expected
    found = Events(folder / "network_train").hyperparameters()
    assert found == expected


def test_no_file_or_folder_is_among_the_logged_settings(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    paths: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if Path in base_types(field.annotation):
            paths[name] = [secret] if list in base_types(field.annotation) else secret
    assert len(paths) > 10
    config = tiny.config(paths, sample_lines=[f"a star --ci {secret}"], network_dim=7)
    logged = loggable_settings(config)
    assert "secret" not in str(logged)
    assert logged["network_dim"] == 7 and logged["learning_rate"] == 1e-4
    assert logged["resolution"] == "[1024, 1024]"
    assert all(type(value) in (bool, int, float, str) for value in logged.values())


def test_the_key_is_in_no_file(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = changed(config, log_with="all", log_config=True)
    events: list[Event] = []
    with Tracking(config, events.append, state={}) as tracking:
        log_steps(tracking, range(1, 5))
        assert KEY not in str(tracking.state())
    files = [path for path in run_folder(config).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".wandb", ".log"} and len(files) > 3
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in str(events) and "does not answer" in str(events)


def test_a_server_that_never_answers_keeps_no_step_waiting(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_SERVER_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        events: list[Event] = []
        with Tracking(changed(config, log_with="all"), events.append, state={}) as tracking:
            begun = time.monotonic()
            log_steps(tracking, range(1, 101))
            assert time.monotonic() - begun < 1
        assert "does not answer, so the run is written offline" in str(events)
    assert len(curves(config)["loss/current"]) == 100
    assert len(wandb_rows(wandb_folders(run_folder(config))[0])) == 100


# TensorBoard's own thread says it, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_a_full_disk_costs_one_warning_and_no_step(config: Config) -> None:
    events: list[Event] = []
    with Tracking(config, events.append, state={}) as tracking:
        log_steps(tracking, range(1, 11))
        with tiny.file_size_limit(20_000):
            for step in range(11, 3001):
                log_steps(tracking, range(step, step + 1))
                if any(isinstance(e, Message) and e.level == "warning" for e in events):
                    break
                time.sleep(0.001)
            else:
                pytest.fail("the disk took all of it")
        log_steps(tracking, range(step + 1, step + 10))
    warnings = [e.text for e in events if isinstance(e, Message) and e.level == "warning"]
    assert warnings == [
        "tensorboard cannot log any more (File too large); the training goes on without it"
    ]
    found = curves(config)["loss/current"]
    assert found == pytest.approx({step: 1 / step for step in found}, rel=2**-23)
    assert list(found) == list(range(1, len(found) + 1)) and len(found) >= 10


@pytest.mark.parametrize("log_with", ["tensorboard", "all"])
def test_tensorboard_without_a_folder_is_refused(tmp_path: Path, log_with: str) -> None:
    config = tiny.config(output_dir=tmp_path, output_name="tiny", log_with=log_with)
    with pytest.raises(ConfigError, match=f"log_with: {log_with} .* logging_dir is missing; name"):
        check(config)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_pip_line(
    config: Config, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    check(changed(config, log_with="all"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=f"{package} is not installed; .* -m pip install {package}$"
    ):
        check(changed(config, log_with=package))


def test_a_folder_of_the_name_is_no_package(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check(changed(config, log_with="wandb"))


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "logs"):
        with pytest.raises(ConfigError, match=f"logging_dir: {folder} takes no logs"):
            check(changed(config, logging_dir=folder))


def test_a_wrong_tracker_config_is_refused_early(tmp_path: Path, config: Config) -> None:
    with pytest.raises(ConfigError, match=r"log_tracker_config: .*none\.toml cannot be read"):
        check(changed(config, log_tracker_config=tmp_path / "none.toml"))


def test_a_tracker_config_reaches_the_loggers(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text('[tensorboard]\nfilename_suffix = ".mine"\n', "utf-8")
    track(changed(config, log_tracker_config=path), range(1, 2))
    (file,) = (run_folder(config) / "network_train").iterdir()
    assert file.name.endswith(".mine")


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot kill like this")
def test_a_training_that_is_killed_and_resumed_has_whole_curves(
    training: dict[str, Any], tmp_path: Path, start_job: StartJob
) -> None:
    settings = training | {
        "output_dir": tmp_path / "killed",
        "logging_dir": tmp_path / "logs",
        "log_with": "all",
        "save_every_n_steps": 4,
        "resume": True,
    }
    environment = {"HOME": str(tmp_path / "home")}
    history = RunFiles(tmp_path / "killed", "tiny").history
    for num_lines in (6, 11):
        job = start_job("train", tiny.config(settings, max_train_steps=10**6), environment)
        job.wait_for_lines(history, num_lines)
        job.send(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    last = read_history(history)[-1].step + 8
    job = start_job("train", tiny.config(settings, max_train_steps=last), environment)
    assert job.wait() == 0, job.log.read_text()
    losses = {step.step: step.loss for step in read_history(history)}
    assert list(losses) == list(range(1, last + 1))

    config = tiny.config(settings)
    assert curves(config)["loss/current"] == pytest.approx(losses, rel=2**-23)
    rows = [part for run in wandb_folders(run_folder(config)) for part in wandb_rows(run).items()]
    found = {step: row["loss/current"] for step, row in rows}
    assert len(found) == len(rows)
    # What wandb had not written when it was killed is missing.
    assert found == {step: losses[step] for step in found}
    assert found.keys() >= set(range(last - 7, last + 1))
