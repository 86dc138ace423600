"""What one process does; `test_train_processes.py` has signals, kills and several processes."""

from __future__ import annotations

import contextlib
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.config_file import load_config
from pack.engine.dataset import epoch_batches
from pack.engine.errors import ConfigError, EngineError
from pack.engine.events import Event, Finished, Message, Progress, Saved
from pack.engine.jobs import cache, train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.lora_file import read_lora
from pack.engine.loss_history import Step, read_history
from pack.engine.signals import Stopped
from pack.engine.training_state import read_progress
from pack.engine.weights import open_checkpoint, save_tensors
from pack.tests.engine.jobs import tiny
from safetensors.torch import load_file

FLUX = FluxKontext()


def run(*settings: dict[str, Any], **changes: Any) -> list[Event]:
    events: list[Event] = []
    train.run(tiny.config(*settings, **changes), events.append)
    return events


def stop_after(step: int, events: list[Event]) -> Callable[[Event], None]:
    """A reporter through which SIGTERM arrives when a step is told."""

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.task == "train" and event.done == step:
            signal.raise_signal(signal.SIGTERM)

    return report


def run_and_stop(step: int, *settings: dict[str, Any], **changes: Any) -> list[Event]:
    events: list[Event] = []
    with pytest.raises(Stopped, match=f"stopped after step {step} of"):
        train.run(tiny.config(*settings, **changes), stop_after(step, events))
    return events


def history(folder: Path) -> list[Step]:
    return read_history(RunFiles(folder, "tiny").history)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that says what the last process did."""
    status = RunFiles(folder, "tiny").status
    return {path.name: path.read_bytes() for path in folder.iterdir() if path != status}


def curve(folder: Path) -> list[tuple[int, int, float, float, float]]:
    """All of the history but the times."""
    return [(s.step, s.epoch, s.loss, s.learning_rate, s.t) for s in history(folder)]


def assert_same_run(first: Path, second: Path) -> None:
    tiny.assert_same_file(RunFiles(first, "tiny").lora, RunFiles(second, "tiny").lora)
    tiny.assert_same_file(RunFiles(first, "tiny").state, RunFiles(second, "tiny").state)
    assert curve(first) == curve(second)


def test_a_run_leaves_lora_recipe_state_and_history(
    training: dict[str, Any], tmp_path: Path
) -> None:
    files = RunFiles(tmp_path, "tiny")
    (tmp_path / f".{files.lora.name}.123.tmp").write_text("of a run that was killed")
    events = run(training, output_dir=tmp_path, max_train_steps=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny.loss_by_time.json",
        "tiny.loss_history.jsonl",
        "tiny.safetensors",
        "tiny.state",
        "tiny.status.json",
        "tiny.toml",
    ]
    assert [event for event in events if isinstance(event, Saved)] == [
        Saved(str(files.lora), "lora", 2),
        Saved(str(files.recipe), "recipe", 2),
        Saved(str(files.state), "state", 2),
    ]
    assert events[-1] == Finished("train")
    assert load_config(files.recipe, {}, {}) == tiny.config(
        training, output_dir=tmp_path, max_train_steps=2
    )


def test_the_lora_has_every_target_under_its_published_name(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=2, network_alpha=2.0)

    transformer = FLUX.load_transformer(training["dit"], dtype=torch.float32)
    shapes = tiny.layer_shapes(transformer)
    weights = read_lora(tmp_path / "tiny.safetensors", [FLUX.layer_names], shapes=shapes).layers
    blocks = [
        f"double_blocks.{index}.{stream}_{layer}"
        for index in range(2)
        for stream in ("img", "txt")
        for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ] + [f"single_blocks.{index}.{layer}" for index in range(4) for layer in ("linear1", "linear2")]
    assert weights.keys() == set(blocks)
    for name, adapter in weights.items():
        assert isinstance(adapter, LoRAWeights) and (adapter.rank, adapter.alpha) == (4, 2)
        assert adapter.shape == shapes[name] and adapter.up.any()
        assert adapter.up.dtype == torch.bfloat16
    metadata = open_checkpoint(tmp_path / "tiny.safetensors").metadata
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "2"
    assert metadata["ss_timestep_sampling"] == "flux_shift"


def test_training_on_one_image_lowers_its_loss(training: dict[str, Any], tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images", (32, 32))
    data = {"image_directory": images, "resolution": (32, 32)}
    run(training, data, output_dir=tmp_path, max_train_steps=60)

    losses = [step.loss for step in history(tmp_path)]
    # Steps differ in time and noise, so their medians are compared.
    assert statistics.median(losses[-15:]) < 0.6 * statistics.median(losses[:5])


def test_steps_are_told_with_their_time_from_the_second_on(
    training: dict[str, Any], tmp_path: Path
) -> None:
    events = run(training, output_dir=tmp_path, max_train_steps=3)

    told = [event for event in events if isinstance(event, Progress) and event.task == "train"]
    assert [(event.done, event.total) for event in told] == [(1, 3), (2, 3), (3, 3)]
    assert [event.loss for event in told] == [step.loss for step in history(tmp_path)]
    assert told[0].step_seconds is None and told[0].eta_seconds is None
    assert told[1].step_seconds and told[1].eta_seconds == told[1].step_seconds
    assert told[2].step_seconds and told[2].eta_seconds == 0


@pytest.mark.parametrize(("warmup", "steps"), [(3, 3), (0.5, 3), ("50%", 3), (0, 0)])
def test_the_learning_rate_rises_in_equal_steps(
    training: dict[str, Any], tmp_path: Path, warmup: Any, steps: int
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=6, lr_warmup_steps=warmup)

    rising = [1e-2 * (step + 1) / 3 for step in range(steps)]
    rates = [step.learning_rate for step in history(tmp_path)]
    assert rates == pytest.approx(rising + [1e-2] * (6 - steps))


def test_an_epoch_uses_every_image_as_often_as_it_repeats(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_epochs=2, num_repeats=2)

    # 3 images twice in batches of two, and 2 images twice in batches of two.
    assert [step.epoch for step in history(tmp_path)] == [1] * 5 + [2] * 5


def test_loras_of_epochs_are_kept_though_steps_do_not_end_with_them(
    training: dict[str, Any], tmp_path: Path
) -> None:
    events = run(
        training,
        output_dir=tmp_path,
        max_train_epochs=4,
        gradient_accumulation_steps=2,
        save_every_n_epochs=1,
    )

    # Three batches an epoch, two a step: epoch 1 ends within step 2, which the second begins.
    saved = [event for event in events if isinstance(event, Saved) and event.kind == "lora"]
    numbered = [(Path(event.path).name, event.step) for event in saved]
    assert numbered == [
        ("tiny-000001.safetensors", 2),
        ("tiny-000002.safetensors", 3),
        ("tiny-000003.safetensors", 5),
        ("tiny-000004.safetensors", 6),
        ("tiny.safetensors", 6),
    ]
    tiny.assert_same_file(tmp_path / "tiny-000004.safetensors", tmp_path / "tiny.safetensors")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_float32_adapters(
    training: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=2, mixed_precision=precision)
    run(training, output_dir=tmp_path / "exact", max_train_steps=2)

    state = load_file(tmp_path / "tiny.state")
    trained = {name: tensor for name, tensor in state.items() if not name.startswith("extra.")}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in state.items() if name.endswith(".B"))
    # bfloat16 has 8 bits, and about thirty layers round to them one after the other.
    losses = [step.loss for step in history(tmp_path)]
    assert losses == pytest.approx([step.loss for step in history(tmp_path / "exact")], rel=0.02)


def test_checkpointing_changes_no_bit(training: dict[str, Any], tmp_path: Path) -> None:
    for folder, on in ((tmp_path / "a", False), (tmp_path / "b", True)):
        run(training, output_dir=folder, max_train_steps=2, gradient_checkpointing=on)

    first, second = (load_file(tmp_path / name / "tiny.state") for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_another_seed_gives_another_run(training: dict[str, Any], tmp_path: Path) -> None:
    for seed in (1, 2):
        run(training, output_dir=tmp_path / f"{seed}", max_train_steps=1, seed=seed)
    assert curve(tmp_path / "1") != curve(tmp_path / "2")


def test_control_images_take_part(training: dict[str, Any], tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images", (32, 32))
    data = {"image_directory": images, "resolution": (32, 32), "max_train_steps": 1}
    for colour in ("black", "white"):
        tiny.Image.new("RGB", (32, 32), colour).save(tiny.folder(tmp_path / colour) / "0.png")
        run(training, data, control_directory=tmp_path / colour, output_dir=tmp_path / colour)
    run(training, data, output_dir=tmp_path / "none")

    losses = {history(tmp_path / name)[0].loss for name in ("black", "white", "none")}
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("settings", "stop", "total"),
    [
        ({}, 4, 7),
        ({"gradient_accumulation_steps": 2, "lr_warmup_steps": 5}, 4, 7),
        ({"mixed_precision": "fp16", "gradient_checkpointing": True}, 2, 3),
    ],
    ids=["plain", "steps across epochs, in warm-up", "fp16"],
)
def test_a_stopped_run_continues_to_the_same_bits(
    training: dict[str, Any], tmp_path: Path, settings: dict[str, Any], stop: int, total: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = {**training, **settings, "max_train_steps": total}
    run(settings, output_dir=whole)
    events = run_and_stop(stop, settings, output_dir=stopped)
    assert events[-1] == Finished("train", stopped=True)
    assert read_progress(stopped / "tiny.state").step == stop
    metadata = open_checkpoint(stopped / "tiny.safetensors").metadata
    assert metadata["ss_steps"] == str(stop)

    run(settings, output_dir=stopped, resume=True)
    assert_same_run(whole, stopped)


def test_more_steps_continue_a_finished_run(training: dict[str, Any], tmp_path: Path) -> None:
    run(training, output_dir=tmp_path / "whole", max_train_steps=5)
    run(training, output_dir=tmp_path / "longer", max_train_steps=3)
    events = run(training, output_dir=tmp_path / "longer", max_train_steps=5, resume=True)
    assert Message("continuing after step 3 of 5") in events
    assert_same_run(tmp_path / "whole", tmp_path / "longer")


def test_a_state_that_is_named_starts_another_run_from_there(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path / "whole", max_train_steps=5)
    run(training, output_dir=tmp_path / "first", max_train_steps=3)
    state = tmp_path / "first" / "tiny.state"
    before = state.read_bytes()

    second = {"output_dir": tmp_path / "second", "resume": state}
    run_and_stop(4, training, second, max_train_steps=5)
    assert [step.step for step in history(tmp_path / "second")] == [4]
    run(training, second, resume=True, max_train_steps=5)
    assert state.read_bytes() == before
    for name in ("tiny.safetensors", "tiny.state"):
        tiny.assert_same_file(tmp_path / "whole" / name, tmp_path / "second" / name)


def test_resuming_a_finished_run_returns_at_once(training: dict[str, Any], tmp_path: Path) -> None:
    run(training, output_dir=tmp_path, max_train_steps=2)
    before = contents(tmp_path)

    # That the model is not even opened shows that this costs next to nothing.
    nowhere = tmp_path / "nowhere.safetensors"
    again = {**training, "dit": nowhere, "architecture": "flux_kontext"}
    events = run(again, output_dir=tmp_path, max_train_steps=2, resume=True)
    assert events[-1] == Finished("train")
    assert any("is finished: 2 of 2 steps" in e.text for e in events if isinstance(e, Message))
    assert contents(tmp_path) == before


def test_a_finished_run_whose_lora_is_missing_or_older_writes_it(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=2, save_every_n_steps=1)
    lora_path = tmp_path / "tiny.safetensors"
    for older in (None, tmp_path / "tiny-step00000001.safetensors"):
        lora_path.unlink()
        if older:
            lora_path.write_bytes(older.read_bytes())
        run(training, output_dir=tmp_path, max_train_steps=2, save_every_n_steps=1, resume=True)
        tiny.assert_same_file(tmp_path / "tiny-step00000002.safetensors", lora_path)


def test_a_run_is_not_continued_with_other_settings(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=1)
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(
            training,
            output_dir=tmp_path,
            max_train_steps=2,
            resume=True,
            network_dim=8,
            learning_rate=1e-3,
        )
    assert "learning_rate (was 0.01, now 0.001)" in str(caught.value)
    assert "network_dim (was 4, now 8)" in str(caught.value)
    assert contents(tmp_path) == before


def test_changed_data_are_warned_of(training: dict[str, Any], tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images", (48, 48), (48, 48))
    data = {"image_directory": images, "output_dir": tmp_path / "run"}
    run(training, data, max_train_steps=1)
    (images / "0.txt").write_text("something else")
    events = run(training, data, max_train_steps=2, resume=True)
    warnings = [e for e in events if isinstance(e, Message) and e.level == "warning"]
    assert len(warnings) == 1 and "training data changed" in warnings[0].text


def test_nothing_is_overwritten_unless_that_is_wanted(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=3)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="already holds tiny.safetensors"):
        run(training, output_dir=tmp_path, max_train_steps=2)
    assert contents(tmp_path) == before

    run(training, output_dir=tmp_path, max_train_steps=2, overwrite=True)
    assert [step.step for step in history(tmp_path)] == [1, 2]
    assert read_progress(tmp_path / "tiny.state").step == 2


def test_a_loss_that_is_nan_ends_the_run_and_keeps_the_last_good_state(
    training: dict[str, Any], tmp_path: Path
) -> None:
    images = tiny.write_images(tmp_path / "images", *[(48, 48)] * 4)
    data = {"image_directory": images, "batch_size": 1}
    cached = tiny.config(training, data)
    cache.run(cached, lambda event: None)
    items = cache.cached_items(cached, FLUX, lambda event: None)
    [third] = epoch_batches(items, batch_size=1, seed=cached.runtime.seed, epoch=0)[2]
    stored = items[third].latents
    broken = {name: tensor * float("nan") for name, tensor in load_file(stored).items()}
    save_tensors(stored, broken, open_checkpoint(stored).metadata)

    with pytest.raises(EngineError, match="the loss became nan at step 3"):
        run(training, data, output_dir=tmp_path, max_train_steps=4, save_every_n_steps=1)
    assert read_progress(tmp_path / "tiny.state").step == 2
    assert [step.step for step in history(tmp_path)] == [1, 2]
    assert not (tmp_path / "tiny-step00000003.safetensors").exists()


def test_what_was_trained_is_saved_when_memory_runs_out(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(training, output_dir=tmp_path / "whole", max_train_steps=3)
    calls = 0
    predict = FluxKontext.predict_velocity

    def fail_in_the_third_step(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        is_trial = arguments[2].is_meta  # for the estimate of the memory
        calls += not is_trial
        if calls == 3 and not is_trial:
            raise torch.OutOfMemoryError("no memory")
        return predict(*arguments)

    # A CPU has no error of its own for this.
    monkeypatch.setattr(FluxKontext, "predict_velocity", fail_in_the_third_step)
    with pytest.raises(EngineError, match="out of memory in step 3; everything before it is saved"):
        run(training, output_dir=tmp_path / "small", max_train_steps=3)
    run(
        training,
        output_dir=tmp_path / "small",
        max_train_steps=3,
        resume=True,
        gradient_checkpointing=True,
    )
    tiny.assert_same_file(tmp_path / "whole" / "tiny.state", tmp_path / "small" / "tiny.state")


def test_a_signal_while_the_end_is_written_changes_nothing(
    training: dict[str, Any], tmp_path: Path
) -> None:
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Saved) and event.kind == "lora":
            signal.raise_signal(signal.SIGINT)

    train.run(tiny.config(training, output_dir=tmp_path, max_train_steps=2), report)
    assert events[-1] == Finished("train")
    assert read_progress(tmp_path / "tiny.state").step == 2


def test_a_signal_in_a_library_that_catches_errors_stops_the_run(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = FluxKontext.predict_velocity

    def swallow(*arguments: Any) -> torch.Tensor:
        if arguments[2].is_meta:  # for the estimate of the memory
            return predict(*arguments)
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was swallowed")

    monkeypatch.setattr(FluxKontext, "predict_velocity", swallow)
    with pytest.raises(Stopped, match="stopped after step 0 of 2; there was nothing to save"):
        run(training, output_dir=tmp_path, max_train_steps=2)
    assert list(contents(tmp_path)) == ["tiny.loss_history.jsonl"]


@pytest.mark.timeout(60)
def test_cache_files_that_change_while_the_run_starts_end_it(
    training: dict[str, Any], tmp_path: Path
) -> None:
    images = tiny.write_images(tmp_path / "images", (48, 48), (48, 48))
    config = tiny.config(
        training, image_directory=images, output_dir=tmp_path, max_train_steps=2, resume=True
    )

    def change_one_file(event: Event) -> None:
        if isinstance(event, Message) and "starting at step 0" in event.text:
            stored = cache.plan(config, FLUX).entries[0].latents
            save_tensors(stored, {"latents": torch.zeros(16, 1, 4, 4)}, {})

    # The thread that reads ahead meets the error; the run must not wait for it forever.
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        train.run(config, change_one_file)


def test_a_run_is_finished_only_when_nothing_is_left_to_do(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | {"output_dir": tmp_path, "resume": True, "max_train_steps": 2}
    assert not train.is_finished(tiny.config(settings))
    run(settings)
    assert train.is_finished(tiny.config(settings))
    assert not train.is_finished(tiny.config(settings, max_train_steps=3))
    with pytest.raises(ConfigError, match=r"network_dim \(was 4, now 5\)"):
        train.is_finished(tiny.config(settings, network_dim=5))
    RunFiles(tmp_path, "tiny").lora.unlink()
    assert not train.is_finished(tiny.config(settings))


def test_a_run_is_not_finished_when_a_caption_changed(
    training: dict[str, Any], tmp_path: Path
) -> None:
    images = tiny.write_images(tmp_path / "images", (32, 32))
    settings = training | {
        "image_directory": images,
        "cache_directory": tmp_path / "cache",
        "output_dir": tmp_path,
        "resume": True,
        "max_train_steps": 1,
    }
    run(settings)
    assert train.is_finished(tiny.config(settings))
    (images / "0.txt").write_text("something else")
    assert not train.is_finished(tiny.config(settings))


CONTROLLED = {
    "timestep_sampling": "qinglong_flux",
    "logit_mean": -6.0,
    "logit_std": 2.0,
    "min_timestep": 200,
    "max_timestep": 900,
    "preserve_distribution_shape": True,
    "num_timestep_buckets": 4,
    "weighting_scheme": "cosmap",
}


def test_stratified_and_weighed_runs_continue_to_the_same_bits(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | CONTROLLED | {"max_train_steps": 7}
    run(settings, output_dir=tmp_path / "whole")
    run_and_stop(3, settings, output_dir=tmp_path / "stopped")
    run(settings, output_dir=tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert all(0.2 <= step.t <= 0.9 for step in history(tmp_path / "whole"))


def test_a_range_without_times_is_told_before_anything_is_loaded(
    training: dict[str, Any], tmp_path: Path
) -> None:
    narrow = {"timestep_sampling": "sigmoid", "sigmoid_scale": 0.01, "min_timestep": 900}
    with pytest.raises(
        ConfigError, match="sigmoid has no times between 0.9 and 1; widen the range"
    ):
        run(training | narrow, preserve_distribution_shape=True, output_dir=tmp_path)
    assert not contents(tmp_path)


def test_the_rate_of_every_step_follows_the_schedule(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "learning_rate": 1e-3}
    run(training, settings, lr_scheduler_min_lr_ratio=0.2, output_dir=tmp_path, max_train_steps=6)
    rates = [step.learning_rate for step in history(tmp_path)]
    assert rates == pytest.approx([6e-4, 1e-3, 1e-3, 8e-4, 6e-4, 4e-4])
