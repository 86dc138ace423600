from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pack.engine import training_state
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.architectures.flux_names import NAMES as FLUX_NAMES
from pack.engine.config_file import load_config
from pack.engine.errors import CheckpointError, EngineError
from pack.engine.events import Event, Saved
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.plan import Plan
from pack.engine.jobs.saving import RunSaver
from pack.engine.lora_file import read_lora
from pack.engine.networks.network import inject
from pack.engine.networks.settings import LayerSettings
from pack.engine.optimizers import ParameterGroup, create
from pack.engine.time_statistics import TimeStatistics
from pack.engine.weights import open_checkpoint
from pack.tests.engine.jobs import tiny
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import GradScaler

NAME = "double_blocks.0.img_attn.proj"


class Run:
    """A saver for one adapter whose values are all the same number."""

    def __init__(self, folder: Path, *, width: int = 4, **settings: Any) -> None:
        self.events: list[Event] = []
        model = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
        adapter = LayerSettings("lora", rank=2, alpha=2)
        network = inject(
            model, {NAME: (("0",), adapter)}, generator=torch.Generator().manual_seed(0)
        )
        group = ParameterGroup("lora", list(network.parameters()))
        optimizer = create("AdamW", [group], lr=0.1, arguments={}, allowed=())
        self.statistics = TimeStatistics(num_bins=4)
        self.shapes = {NAME: (width, width)}
        self.saver = RunSaver(
            config=tiny.config(output_dir=folder, output_name="run", **settings),
            architecture=FluxKontext(),
            files=RunFiles(folder, "run"),
            network=network,
            shapes=self.shapes,
            optimizer=optimizer,
            scaler=GradScaler("cpu", enabled=False),
            recipe={"network_dim": 2},
            data="data",
            num_items=1,
            plan=Plan(0, 4, 1, 10, lambda _: 1.0),
            statistics=lambda: self.statistics,
            averaged=nullcontext,
            extra=lambda: {"rewinds": 1},
            report=self.events.append,
        )
        self.fill(0.0)

    @torch.no_grad()
    def fill(self, value: float) -> None:
        for parameter in self.saver.network.parameters():
            parameter.fill_(value)

    def value(self, path: Path) -> float:
        """The number that a whole LoRA file is filled with."""
        weights = read_lora(path, [FLUX_NAMES], shapes=self.shapes).layers[NAME]
        assert isinstance(weights, LoRAWeights)
        found = torch.cat([weights.down.flatten(), weights.up.flatten()]).unique()
        assert found.numel() == 1
        return found.item()


def nothing() -> None:
    pass


def saved(run: Run) -> list[tuple[str, int | None]]:
    return [(Path(e.path).name, e.step) for e in run.events if isinstance(e, Saved)]


def test_lora_recipe_and_state_are_saved_in_this_order(tmp_path: Path) -> None:
    run = Run(tmp_path, save_precision="fp16", network_dim=2)
    run.fill(0.1)
    run.saver.save(7)
    assert saved(run) == [("run.safetensors", 7), ("run.toml", 7), ("run.state", 7)]

    files = run.saver.files
    assert load_config(files.recipe, {}, {}) == run.saver.config
    progress = training_state.read_progress(files.state)
    assert progress.step == 7 and progress.extra == {"rewinds": 1}
    checkpoint = open_checkpoint(files.lora)
    assert checkpoint.metadata["ss_steps"] == "7" and checkpoint.metadata["ss_epoch"] == "2"
    assert checkpoint.dtype(f"diffusion_model.{NAME}.lora_B.weight") == torch.float16
    # The state keeps what the file rounds.
    state = load_file(files.state)
    assert state[f"lora.{NAME}.B"][0, 0].item() == torch.tensor(0.1).item()


def test_loras_of_steps_and_epochs_are_saved_when_they_are_due(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=4, save_every_n_epochs=2)
    flushed: list[int] = []
    for step in range(1, 9):
        # Two epochs end in every third step.
        ended = range(step // 3 * 2 - 1, step // 3 * 2 + 1) if step % 3 == 0 else range(0)
        run.saver.save_if_due(step, ended, before=lambda step=step: flushed.append(step))
    assert saved(run) == [
        ("run-000002.safetensors", 3),
        ("run.state", 3),
        ("run-step00000004.safetensors", 4),
        ("run.state", 4),
        ("run-000004.safetensors", 6),
        ("run.state", 6),
        ("run-step00000008.safetensors", 8),
        ("run.state", 8),
    ]
    assert flushed == [3, 4, 6, 8]


def kept(folder: Path) -> set[str]:
    return {path.name.removeprefix("run-") for path in folder.glob("run-*")}


def test_only_the_last_loras_are_kept(tmp_path: Path) -> None:
    # By step it is the distance that counts, by epoch the number: as in kohya's scripts.
    run = Run(
        tmp_path,
        save_every_n_steps=10,
        save_last_n_steps=30,
        save_every_n_epochs=2,
        save_last_n_epochs=2,
    )
    for step in range(1, 51):
        ended = range(step // 5, step // 5 + 1) if step % 5 == 0 else range(0)
        run.saver.save_if_due(step, ended, before=nothing)
    steps = {f"step000000{step}.safetensors" for step in (20, 30, 40, 50)}
    assert kept(tmp_path) == steps | {"000008.safetensors", "000010.safetensors"}


def test_states_beside_the_loras_have_a_number_of_their_own(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=1, save_state=True, save_last_n_steps_state=1)
    for step in range(1, 5):
        run.saver.save_if_due(step, range(0), before=nothing)
    loras = {f"step0000000{step}.safetensors" for step in (1, 2, 3, 4)}
    assert kept(tmp_path) == loras | {"step00000003.state", "step00000004.state"}
    state = tmp_path / "run-step00000003.state"
    assert training_state.read_progress(state).step == 3
    assert run.saver.files.is_own_state(state)


def test_what_was_not_written_by_number_is_never_removed(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=1, save_last_n_steps=1)
    others = ["run-step1.safetensors", "run2-step00000001.safetensors", "run-best.safetensors"]
    for name in others:
        (tmp_path / name).touch()
    for step in range(1, 9):
        run.saver.save_if_due(step, range(0), before=nothing)
    assert all((tmp_path / name).exists() for name in others)


def test_everything_is_saved_at_once_when_the_user_asks(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.saver.save_if_due(3, range(0), before=nothing, now=True)
    assert saved(run) == [("run.safetensors", 3), ("run.toml", 3), ("run.state", 3)]


def test_a_state_that_may_be_part_of_an_explosion_waits(tmp_path: Path) -> None:
    run = Run(tmp_path, autosave_minutes=10.0)
    run.saver.last_save = time.monotonic() - 601
    run.saver.save_if_due(1, range(0), before=nothing, autosave=False)
    assert saved(run) == []
    run.saver.save_if_due(2, range(0), before=nothing)
    assert saved(run) == [("run.state", 2)]


def test_the_lora_is_the_averaged_one_and_the_state_the_one_in_training(tmp_path: Path) -> None:
    run = Run(tmp_path)

    @contextmanager
    def averaged() -> Iterator[None]:
        run.fill(1.0)
        yield
        run.fill(0.5)

    run.saver.averaged = averaged
    run.fill(0.5)
    run.saver.save(1)
    assert run.value(run.saver.files.lora) == 1.0
    assert load_file(run.saver.files.state)[f"lora.{NAME}.B"].unique().item() == 0.5


def test_the_loss_at_each_noise_level_is_there_to_be_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.statistics.add(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 2.0, 8.0]))
    run.saver.save(1)
    assert json.loads(run.saver.files.loss_by_time.read_text()) == {
        "edges": [0, 0.25, 0.5, 0.75, 1],
        "mean": [1.5, None, None, 8.0],
        "count": [2, 0, 0, 1],
    }


@pytest.mark.parametrize(("minutes", "waited", "due"), [(10, 601, 1), (10, 599, 0), (0, 9999, 0)])
def test_the_state_is_saved_after_some_minutes(
    tmp_path: Path, minutes: float, waited: float, due: int
) -> None:
    run = Run(tmp_path, autosave_minutes=float(minutes))
    run.saver.last_save = time.monotonic() - waited
    for step in (1, 2):
        run.saver.save_if_due(step, range(0), before=nothing)
    assert saved(run) == [("run.state", 1)] * due


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_replace_good_files(tmp_path: Path, value: float) -> None:
    run = Run(tmp_path)
    run.saver.save(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run.fill(value)
    for save in (
        lambda: run.saver.save(2),
        lambda: run.saver.save_state(run.saver.files.state, 2),
    ):
        with pytest.raises(CheckpointError, match="became NaN or infinite"):
            save()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize(("what", "width"), [("lora", 1024), ("recipe", 4), ("state", 1024)])
def test_a_full_disk_is_one_sentence_and_keeps_the_file(
    tmp_path: Path, what: str, width: int
) -> None:
    run = Run(tmp_path, width=width)
    run.saver.save(1)
    files = run.saver.files
    path = {"lora": files.lora, "recipe": files.recipe, "state": files.state}[what]
    before = path.read_bytes()
    # Less than the adapter of the wide layer takes, and less than the recipe.
    with tiny.file_size_limit(8192), pytest.raises(EngineError) as caught:
        run.saver.save_state(run.saver.files.state, 2) if what == "state" else run.saver.save(2)
    assert f"{path}: the file cannot be written" in str(caught.value)
    assert "File too large" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def save_forever(run: Run) -> NoReturn:
    try:
        for value in itertools.cycle((1.0, 2.0)):
            run.fill(value)
            run.saver.save_lora(run.saver.files.lora, 1)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is forked")
def test_a_file_whose_writer_is_killed_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    run = Run(tmp_path, width=1024)
    run.saver.save(0)
    values: set[float] = set()
    left = 0
    for attempt in range(10):
        writer = os.fork()
        if not writer:
            save_forever(run)
        time.sleep(0.05 + 0.01 * attempt)
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
        values.add(run.value(run.saver.files.lora))
        left += len(list(tmp_path.glob(".*.tmp")))
        run.saver.files.remove_leftovers()
    # That some were killed while they wrote shows that this is put to the test.
    assert values & {1.0, 2.0} and left
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.loss_by_time.json",
        "run.safetensors",
        "run.state",
        "run.toml",
    ]
