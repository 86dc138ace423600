"""Training in real processes: signals, kills, launchers and several processes at once."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.config import Config
from pack.engine.config_file import to_toml
from pack.engine.events import silent
from pack.engine.jobs import train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.loss_history import read_history
from pack.engine.training_state import read_progress
from pack.tests.conftest import ROOT
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.conftest import Job, StartJob
from safetensors.torch import load_file

STOPPED = 3
# More than any of these runs gets to do before it is stopped, however slow the machine is.
ENDLESS = 100_000


def steps_saved(folder: Path) -> int:
    return read_progress(RunFiles(folder, "tiny").state).step


def curve(folder: Path) -> list[tuple[int, int, float, float, float]]:
    """All of the loss history but the times."""
    steps = read_history(RunFiles(folder, "tiny").history)
    return [(s.step, s.epoch, s.loss, s.learning_rate, s.t) for s in steps]


def assert_same_run(first: Path, second: Path) -> None:
    """All LoRAs and states bit for bit, the history but its times, and no other file."""
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            # What was kept on the way says how long the run should have become then.
            length = ["ss_max_train_steps", "ss_num_epochs"]
            tiny.assert_same_file(first / name, second / name, but=length)
    assert curve(first) == curve(second)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_continues_to_the_same_bits(
    training: dict[str, Any], tmp_path: Path, start_job: StartJob, number: signal.Signals
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    job = start_job("train", tiny.config(training, output_dir=stopped, max_train_steps=ENDLESS))
    job.wait_for_lines(RunFiles(stopped, "tiny").history, 3)
    job.send(number)
    assert job.wait() == STOPPED
    step = steps_saved(stopped)
    assert step >= 3
    assert f"stopped after step {step} of {ENDLESS}; everything is saved" in job.log.read_text()
    assert (stopped / "tiny.safetensors").exists()

    settings = {**training, "max_train_steps": step + 3}
    again = tiny.config(settings, output_dir=stopped, resume=True)
    assert start_job("train", again).wait() == 0
    train.run(tiny.config(settings, output_dir=whole), silent)
    assert_same_run(whole, stopped)


def assert_nothing_is_broken(folder: Path, every: int) -> None:
    """Each file can be read, and no step is lost that was followed by a save."""
    files = RunFiles(folder, "tiny")
    steps = [step.step for step in read_history(files.history)]
    assert steps == list(range(1, len(steps) + 1))
    for path in folder.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    saved = steps_saved(folder) if files.state.exists() else 0
    # The line of a step is written before what it saves; of the last one the save may be missing.
    assert saved >= max(0, len(steps) - 1) // every * every
    numbered = [files.lora_at_step(step) for step in range(every, saved + 1, every)]
    assert all(path.exists() for path in numbered)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_with_the_same_bits(
    training: dict[str, Any], tmp_path: Path, start_job: StartJob
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {**training, "save_every_n_steps": 2, "resume": True}
    history = RunFiles(killed, "tiny").history
    chance = random.Random(0)
    for _ in range(10):
        before = history.read_bytes().count(b"\n") if history.exists() else 0
        job = start_job("train", tiny.config(settings, output_dir=killed, max_train_steps=ENDLESS))
        # Up to three new steps, or while it still loads.
        job.wait_for_lines(history, before - 2 + chance.randrange(6))
        time.sleep(chance.uniform(0, 0.1))
        job.send(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        assert_nothing_is_broken(killed, every=2)

    settings["max_train_steps"] = steps_saved(killed) + 3
    assert start_job("train", tiny.config(settings, output_dir=killed)).wait() == 0
    train.run(tiny.config(settings, output_dir=whole), silent)
    assert_same_run(whole, killed)


def start_two(start_job: StartJob, config: Config) -> list[Job]:
    """Two processes that train together, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        start_job("train", config, environment | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


def two(training: dict[str, Any], folder: Path, steps: int, **changes: Any) -> Config:
    # A large epsilon, so that AdamW does not make steps of full size out of rounding errors.
    settings = {"optimizer_args": ["eps=1e-3"], "gradient_accumulation_steps": 2}
    return tiny.config(training, settings, output_dir=folder, max_train_steps=steps, **changes)


def assert_equals_one_process(training: dict[str, Any], folder: Path, alone: Path) -> None:
    """To rounding, the run in ``folder`` is that of one process with twice the accumulation."""
    config = two(training, alone, steps_saved(folder))
    doubled = config.training.model_copy(update={"gradient_accumulation_steps": 4})
    train.run(config.model_copy(update={"training": doubled}), silent)
    for line, expected in zip(curve(folder), curve(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    states = [load_file(RunFiles(place, "tiny").state) for place in (folder, alone)]
    for name, tensor in states[1].items():
        if name.startswith("lora."):
            # Float32 sums in another order; B has got to about 0.1.
            torch.testing.assert_close(states[0][name], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one_with_twice_the_accumulation_though_one_is_stopped(
    training: dict[str, Any], tmp_path: Path, start_job: StartJob
) -> None:
    folder = tmp_path / "two"
    first, second = start_two(start_job, two(training, folder, ENDLESS))
    first.wait_for_lines(RunFiles(folder, "tiny").history, 3)
    # Only the process that does not save is asked, so both have to agree to stop.
    second.send(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (STOPPED, STOPPED)
    assert steps_saved(folder) >= 3
    assert second.log.read_text().count("train:") == 0  # one progress bar, not two

    jobs = start_two(start_job, two(training, folder, steps_saved(folder) + 3, resume=True))
    assert [job.wait() for job in jobs] == [0, 0]
    assert_equals_one_process(training, folder, tmp_path / "one")


def launch(launcher: list[str], config: Config, file: Path) -> subprocess.Popen[str]:
    file.write_text(to_toml(config), "utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "engine", "train", "--config_file", str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
def test_stopping_only_the_launcher_of_two_processes_loses_nothing(
    training: dict[str, Any], tmp_path: Path
) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folder = tmp_path / "two"
    history = RunFiles(folder, "tiny").history
    with launch(torchrun, two(training, folder, ENDLESS), tmp_path / "config.toml") as process:
        while process.poll() is None and not (history.exists() and history.read_bytes()):
            time.sleep(0.01)
        process.terminate()
        output = process.communicate()[0]
    assert "everything is saved, continue with --resume" in output, output
    assert steps_saved(folder) >= 1

    again = two(training, folder, steps_saved(folder) + 3, resume=True)
    with launch(torchrun, again, tmp_path / "config.toml") as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert_equals_one_process(training, folder, tmp_path / "one")


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_lora(training: dict[str, Any], tmp_path: Path) -> None:
    settings = {**training, "max_train_steps": 3}
    train.run(tiny.config(settings, output_dir=tmp_path / "alone"), silent)

    config = tiny.config(settings, output_dir=tmp_path / "launched")
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    with launch(launcher, config, tmp_path / "config.toml") as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert_same_run(tmp_path / "alone", tmp_path / "launched")
