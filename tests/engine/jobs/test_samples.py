from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.engine import media
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.config import SamplesConfig
from pack.engine.events import Event, Message, Progress, Saved, silent
from pack.engine.jobs import generate, samples, train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.sample_plan import SamplePlan, prepare
from pack.engine.latent_file import read_latents
from pack.engine.signals import Stopped, StopSignals
from pack.engine.validation_history import read_validation
from pack.tests.engine.jobs import tiny
from PIL import Image
from torch import Tensor, nn

FLUX = FluxKontext()


class Run:
    """A model with adapters, and the samples of a run with it."""

    def __init__(self, settings: dict[str, Any], folder: Path, lines: list[str]) -> None:
        self.settings = settings | {"sample_lines": lines, "sample_every_n_steps": 2}
        self.plan = prepare(tiny.config(self.settings), FLUX, silent)
        self.files = RunFiles(folder, "tiny")
        self.transformer = FLUX.load_transformer(settings["dit"], dtype=torch.float32)
        self.network = tiny.put_lora(self.transformer, rank=2)
        self.transformer.train()
        self.events: list[Event] = []

    def draw(self, step: int, plan: SamplePlan | None = None) -> None:
        with StopSignals() as stop:
            samples.draw(
                plan or self.plan, self.transformer, self.files, step, self.events.append, stop
            )

    def latents(self, step: int, index: int) -> Tensor:
        found = read_latents(self.files.samples / f"tiny-step{step:08d}-{index:02d}.latent")
        assert found is not None
        return found

    def warnings(self) -> list[str]:
        messages = [event for event in self.events if isinstance(event, Message)]
        assert all(message.level == "warning" for message in messages)
        return [message.text for message in messages]

    def names(self) -> list[str]:
        return [file.path.name for file in samples.sample_files(self.files)]


LINES = ["a red star --w 48 --h 32 --s 3 --d 5", "a blue ring --w 32 --h 32 --s 2 --g 4 --fs 2"]


@pytest.fixture
def run(training: dict[str, Any], tmp_path: Path) -> Run:
    return Run(training | {"vae": training["vae"]}, tmp_path, LINES)


def test_samples_are_what_generate_draws(run: Run, tmp_path: Path) -> None:
    """Adapters that are still zero change nothing, so that every bit is the same."""
    run.draw(100)
    asked = [
        {"prompt": ["a red star"], "image_size": (48, 32), "infer_steps": 3, "seed": 5},
        {
            "prompt": ["a blue ring"],
            "image_size": (32, 32),
            "infer_steps": 2,
            "seed": 43,
            "embedded_cfg_scale": 4.0,
            "flow_shift": 2.0,
        },
    ]
    for index, changes in enumerate(asked):
        config = tiny.config(run.settings, changes, save_path=tmp_path / f"{index}")
        [expected] = generate.run(config, silent)
        path = run.files.samples / f"tiny-step00000100-{index:02d}.png"
        ours, theirs = Image.open(path), Image.open(expected)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        facts, others = (json.loads(image.info["lora_loom"]) for image in (ours, theirs))
        assert others.pop("loras") == []
        assert facts == others | {"lora": "tiny", "trained_steps": 100}


def test_the_latents_are_those_that_a_vae_decodes(run: Run) -> None:
    run.draw(1)
    autoencoder = FLUX.load_autoencoder(run.settings["vae"], dtype=torch.float32)
    for index in range(2):
        raw = run.latents(1, index)
        image = autoencoder.decode(FLUX.normalize_latents(raw)[:, :, None])[0]
        stored = media.to_tensor(
            media.load_image(run.files.samples / f"tiny-step00000001-{index:02d}.png")
        )
        assert (image - stored).abs().max() <= 1.01 * 2 / 255


def test_a_control_image_is_given_to_the_model(training: dict[str, Any], tmp_path: Path) -> None:
    control = tiny.write_image(tmp_path / "control.png", (96, 64))
    line = "a red star --w 48 --h 32 --s 2"
    run = Run(training, tmp_path, [line, f"{line} --d 42 --ci {control}"])
    run.draw(1)
    assert (run.latents(1, 0) - run.latents(1, 1)).abs().max() > 0.01
    config = tiny.config(
        training,
        prompt=["a red star"],
        image_size=(48, 32),
        infer_steps=2,
        control_image_path=[control],
        save_path=tmp_path / "generated",
    )
    [expected] = generate.run(config, silent)
    ours = run.files.samples / "tiny-step00000001-01.png"
    assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(expected)))


def test_files_are_told_with_their_step(run: Run) -> None:
    run.draw(7)
    saved = [event for event in run.events if isinstance(event, Saved)]
    folder = run.files.samples
    assert saved == [
        Saved(str(folder / f"tiny-step00000007-{index:02d}.{extension}"), kind, 7)
        for extension, kind in (("latent", "latents"), ("png", "image"))
        for index in range(2)
    ]
    done = [event.done for event in run.events if isinstance(event, Progress)]
    assert done == [1, 2] and not run.warnings()


def test_without_a_vae_there_are_latents_only(training: dict[str, Any], tmp_path: Path) -> None:
    Run(training, tmp_path, LINES)  # fills the cache
    run = Run(training | {"vae": None}, tmp_path, LINES)
    run.draw(2)
    assert run.names() == [f"tiny-step00000002-{index:02d}.latent" for index in range(2)]


def states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, tuple(keys), *rest), torch.get_rng_state().tolist()


class Dropped(nn.Module):
    """A layer that drops some of what it gets, as adapters may."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.dropout, self.layer = nn.Dropout(0.5), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.dropout(x))


def test_nothing_is_dropped_from_samples_and_the_training_goes_on_as_before(run: Run) -> None:
    run.draw(1)
    for adapted in [name for name, _ in run.transformer.named_modules() if name.endswith("to_q")]:
        layer = run.transformer.get_submodule(adapted)
        run.transformer.set_submodule(adapted, Dropped(layer))
    run.transformer.train()
    run.transformer.get_submodule("proj_out").eval()
    modes = [module.training for module in run.transformer.modules()]
    before = states()
    run.draw(2)
    assert torch.equal(run.latents(1, 0), run.latents(2, 0))
    assert states() == before
    assert [module.training for module in run.transformer.modules()] == modes


def trained(run: Run, *, draws: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters and optimizer state after a few steps that use the global generator."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(run.network.parameters(), lr=1e-2)
    conditions = {"text_embeds": torch.ones(1, 8, 64), "pooled": torch.ones(1, 64)}
    conditions["guidance"] = torch.ones(1)
    for step in range(1, 4):
        noise = torch.randn(1, 16, 1, 4, 6)
        FLUX.predict_velocity(
            run.transformer, noise, torch.rand(1), conditions
        ).square().mean().backward()
        if draws:
            run.draw(step)
        optimizer.step()
        optimizer.zero_grad()
    return [value.detach() for value in run.network.parameters()], optimizer.state_dict()


def test_a_training_with_samples_ends_with_the_same_bits(
    training: dict[str, Any], tmp_path: Path
) -> None:
    with_samples, without = (Run(training, tmp_path / name, LINES) for name in "ab")
    first, first_state = trained(with_samples, draws=True)
    second, second_state = trained(without, draws=False)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert any(parameter.abs().max() > 0 for parameter in first)
    for index, entries in first_state["state"].items():
        for name, value in entries.items():
            assert torch.equal(value, second_state["state"][index][name])
    # The adapters had an effect on what was drawn.
    assert not torch.equal(with_samples.latents(1, 0), with_samples.latents(3, 0))


SCHEDULE: dict[str, Any] = {
    "sample_lines": LINES,
    "sample_every_n_steps": 2,
    "sample_at_first": True,
    "validation_split": 0.2,
    "validate_every_n_steps": 1,
    "max_train_steps": 4,
}


def test_a_run_that_draws_and_one_that_does_not_leave_the_same_lora(
    training: dict[str, Any], tmp_path: Path
) -> None:
    off = {"sample_every_n_steps": None, "sample_at_first": False}
    for name, changes in (("with", {}), ("without", off)):
        train.run(tiny.config(training, SCHEDULE, changes, output_dir=tmp_path / name), silent)
    first, second = (RunFiles(tmp_path / name, "tiny") for name in ("with", "without"))
    tiny.assert_same_file(first.lora, second.lora)
    tiny.assert_same_file(first.state, second.state)
    assert first.validation.read_bytes() == second.validation.read_bytes()
    assert [file.step for file in samples.sample_files(first)] == [0] * 4 + [2] * 4 + [4] * 4
    assert samples.sample_files(second) == []


def test_a_run_that_goes_on_draws_the_same_samples_as_one_that_was_not_stopped(
    training: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = (RunFiles(tmp_path / name, "tiny") for name in ("whole", "parts"))
    settings = training | SCHEDULE
    train.run(tiny.config(settings, output_dir=whole.folder), silent)
    train.run(tiny.config(settings, output_dir=parts.folder, max_train_steps=3), silent)
    later = parts.samples / "tiny-step00000004-00.png"
    later.touch()  # as a run that was killed before it saved its state leaves it
    train.run(tiny.config(settings, output_dir=parts.folder, resume=True), silent)
    names = [file.path.name for file in samples.sample_files(whole)]
    assert names == [file.path.name for file in samples.sample_files(parts)] and len(names) == 12
    for name in names:
        assert (whole.samples / name).read_bytes() == (parts.samples / name).read_bytes()
    assert read_validation(whole.validation) == read_validation(parts.validation)


def stop_at_first(event: Event) -> None:
    if isinstance(event, Progress) and event.task == "samples":
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_leaves_what_is_finished(run: Run) -> None:
    with StopSignals() as stop, pytest.raises(Stopped):
        samples.draw(run.plan, run.transformer, run.files, 2, stop_at_first, stop)
    assert run.names() == ["tiny-step00000002-00.latent"]
    assert run.transformer.training and not samples.are_drawn(run.plan, run.files, 2)


def test_a_signal_that_is_held_ends_the_drawing_and_nothing_else(run: Run) -> None:
    with StopSignals() as stop:
        stop.hold()
        samples.draw(run.plan, run.transformer, run.files, 2, stop_at_first, stop)
        assert stop.requested
    assert run.names() == ["tiny-step00000002-00.latent"]


def test_nan_in_a_sample_is_told_and_not_written(run: Run) -> None:
    with torch.no_grad():
        run.transformer.get_parameter("proj_out.weight")[0] = torch.nan
    run.draw(2)
    assert run.names() == [] and len(run.warnings()) == 2
    assert run.warnings()[0].startswith("the sample of sample_lines, line 1 came out as NaN")


def test_a_vae_that_does_not_fit_into_memory_leaves_the_latents(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(samples, "load_autoencoder", full)
    run.draw(2)
    assert samples.are_drawn(run.plan, run.files, 2) and len(run.names()) == 2
    [warning] = run.warnings()
    assert "not enough memory" in warning and str(run.files.samples) in warning
    assert run.transformer.training


def test_a_full_disk_ends_no_training(run: Run) -> None:
    with tiny.file_size_limit(100):
        run.draw(2)
    [warning] = run.warnings()
    assert warning.startswith("samples after step 2 are missing: ") and run.names() == []


def test_a_cache_that_was_deleted_meanwhile_ends_no_training(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(training | {"cache_directory": tmp_path / "cache"}, tmp_path, LINES)
    run.plan.pictures[1].caption.path.unlink()
    run.draw(2)
    [warning] = run.warnings()
    assert run.plan.pictures[1].caption.path.name in warning
    assert run.names() == ["tiny-step00000002-00.latent"]


def test_samples_of_later_steps_go_and_those_of_other_runs_stay(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "tiny")
    assert samples.sample_files(files) == []
    samples.remove_after(files, 0)
    folder = tiny.folder(files.samples)
    own = [
        f"tiny-step{step:08d}-{index:02d}.{extension}"
        for step in (0, 10, 200, 10**8)
        for index in (0, 1, 100)
        for extension in ("latent", "png")
    ]
    others = ["tiny2-step00000200-00.png", "my tiny-step00000200-00.png", "tiny-step00000200.png"]
    leftovers = [".tiny-step00000200-00.png.77.tmp", ".tiny2-step00000200-00.png.77.tmp"]
    for name in (*own, *others, *leftovers):
        (folder / name).touch()
    assert [file.path.name for file in samples.sample_files(files)] == own
    samples.remove_after(files, 10)
    assert [(file.step, file.index) for file in samples.sample_files(files)] == [
        (step, index) for step in (0, 10) for index in (0, 1, 100) for _ in range(2)
    ]
    samples.remove_after(files, -1)
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([*others, leftovers[1]])


EVERY = st.none() | st.integers(1, 7)


@given(EVERY, EVERY, st.booleans(), st.integers(0, 40), st.integers(1, 5))
def test_samples_are_due_when_their_step_or_epoch_comes(
    steps: int | None, epochs: int | None, first: bool, step: int, epoch_steps: int
) -> None:
    settings = SamplesConfig(
        sample_every_n_steps=steps, sample_every_n_epochs=epochs, sample_at_first=first
    )
    # An epoch of so many steps ends where the step can be divided by them.
    ended = range(step // epoch_steps, step // epoch_steps + (step % epoch_steps == 0))
    by_step = set(range(0, 50, steps)) if steps else set()
    by_epoch = set(range(0, 50, epochs * epoch_steps)) if epochs else set()
    expected = first if step == 0 else step in by_step | by_epoch
    assert samples.due(settings, step, ended) == expected
