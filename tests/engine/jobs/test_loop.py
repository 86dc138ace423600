"""What a run does when it goes wrong, measures, draws, or is told something, from end to end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import ConfigError, EngineError
from pack.engine.events import Event, Message, Saved
from pack.engine.jobs import train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.step import OptimizerStep
from pack.engine.loss_history import Step, read_history
from pack.engine.training_state import read_progress
from pack.engine.validation_history import read_validation
from pack.engine.weights import open_checkpoint
from pack.tests.engine.jobs import tiny

# With these the loss is NaN in the third step, and with half the rate in none.
TOO_FAST: dict[str, Any] = {
    "optimizer_type": "torch.optim.SGD",
    "learning_rate": 10.0,
    "network_alpha": 1e5,
    "max_grad_norm": 0.0,
}


def run(*settings: dict[str, Any], **changes: Any) -> list[Event]:
    events: list[Event] = []
    train.run(tiny.config(*settings, **changes), events.append)
    return events


def warnings(events: list[Event]) -> list[str]:
    return [e.text for e in events if isinstance(e, Message) and e.level == "warning"]


def history(folder: Path) -> list[Step]:
    return read_history(RunFiles(folder, "tiny").history)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(step.step, step.loss, step.learning_rate) for step in history(folder)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return tiny.contents(path)[0]


def test_a_run_that_diverges_goes_back_and_on_with_half_the_rate(
    training: dict[str, Any], tmp_path: Path
) -> None:
    fast = training | TOO_FAST
    events = run(fast, output_dir=tmp_path / "fast", max_train_steps=8)
    assert warnings(events) == [
        "the loss became nan at step 3, so the run went back to step 0 and goes on with 0.5 times "
        "the learning rate"
    ]
    # As if it had had half the rate from the beginning.
    run(fast, learning_rate=5.0, output_dir=tmp_path / "slow", max_train_steps=8)
    assert losses(tmp_path / "fast") == losses(tmp_path / "slow")
    first, second = (tensors(RunFiles(tmp_path / name, "tiny").state) for name in ("fast", "slow"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def failing(calls: range, factor: float, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The model gives nonsense in these calls, counted from 0."""
    predict, count = FluxKontext.predict_velocity, itertools.count()

    def predict_or_fail(*arguments: Any) -> torch.Tensor:
        velocity = predict(*arguments)
        is_trial = velocity.is_meta  # for the estimate of the memory
        return velocity * factor if not is_trial and next(count) in calls else velocity

    monkeypatch.setattr(FluxKontext, "predict_velocity", predict_or_fail)
    return monkeypatch


def test_it_goes_back_to_what_is_saved_and_a_continued_run_remembers(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = training | {"save_every_n_steps": 3}
    with monkeypatch.context() as whole:
        failing(range(4, 5), float("nan"), whole)
        events = run(settings, output_dir=tmp_path / "whole", max_train_steps=8)
    assert "at step 5, so the run went back to step 3 and" in warnings(events)[0]
    state = RunFiles(tmp_path / "whole", "tiny").state
    assert read_progress(state).extra["rewinds"] == 1
    assert [rate for _, _, rate in losses(tmp_path / "whole")] == [0.01] * 3 + [0.005] * 5

    with monkeypatch.context() as half:
        failing(range(4, 5), float("nan"), half)
        run(settings, output_dir=tmp_path / "halves", max_train_steps=6)
    again = run(settings, output_dir=tmp_path / "halves", max_train_steps=8, resume=True)
    assert not warnings(again)
    tiny.assert_same_file(RunFiles(tmp_path / "halves", "tiny").state, state)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_a_state_that_goes_wrong_at_once_is_not_good(
    training: dict[str, Any], tmp_path: Path
) -> None:
    # After the second step the weights are finite, but so large that the third gives NaN.
    fast = training | TOO_FAST | {"save_every_n_steps": 1, "save_state": True}
    events = run(fast, output_dir=tmp_path, max_train_steps=8)
    places = [text.partition("went back to ")[2].partition(" and")[0] for text in warnings(events)]
    assert places[:2] == ["step 2", "step 1"]
    assert len(history(tmp_path)) == 8


def test_weights_that_are_not_finite_are_never_saved(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, count = OptimizerStep.update, itertools.count(1)

    def update_or_break(take_step: OptimizerStep) -> torch.Tensor:
        norm = update(take_step)
        if next(count) == 4:
            with torch.no_grad():
                take_step.parameters[0].fill_(float("inf"))
        return norm

    monkeypatch.setattr(OptimizerStep, "update", update_or_break)
    events = run(training, output_dir=tmp_path, max_train_steps=6, save_every_n_steps=2)
    assert "became NaN or infinite at step 4, so the run went back to step 2" in warnings(events)[0]
    assert read_progress(RunFiles(tmp_path, "tiny").state).step == 6


def test_a_run_that_shall_stop_keeps_the_last_good_state(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(range(4, 5), float("nan"), monkeypatch)
    settings = training | {"save_every_n_steps": 3, "on_divergence": "stop"}
    with pytest.raises(EngineError) as caught:
        run(settings, output_dir=tmp_path, max_train_steps=8)
    assert str(caught.value) == (
        "the loss became nan at step 5, so the run went back; step 3 was good and is saved. Start "
        "again with a lower learning_rate"
    )
    files = RunFiles(tmp_path, "tiny")
    assert read_progress(files.state).step == 3
    assert open_checkpoint(files.lora).metadata["ss_steps"] == "3"
    assert [step.step for step in history(tmp_path)] == [1, 2, 3]


def test_a_run_that_stops_before_anything_good_says_so(
    training: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="so the run went back; there was nothing good to save"):
        run(training | TOO_FAST, output_dir=tmp_path, max_train_steps=8, on_divergence="stop")
    assert not RunFiles(tmp_path, "tiny").lora.exists()


def test_three_times_are_enough(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = FluxKontext.predict_velocity
    monkeypatch.setattr(
        FluxKontext, "predict_velocity", lambda *arguments: predict(*arguments) * float("nan")
    )
    events: list[Event] = []
    config = tiny.config(training, output_dir=tmp_path, max_train_steps=8)
    with pytest.raises(EngineError, match="the loss became nan at step 1"):
        train.run(config, events.append)
    rates = [text.partition("goes on with ")[2] for text in warnings(events)]
    assert rates == [f"{rate} times the learning rate" for rate in (0.5, 0.25, 0.125)]


def test_an_explosion_is_undone(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(range(25, 36), 30.0, monkeypatch)
    # The state of step 30 is one of an explosion that is not noticed yet.
    settings = training | {"save_every_n_steps": 10, "save_state": True}
    events = run(settings, output_dir=tmp_path / "bad", max_train_steps=60)
    [warning] = warnings(events)
    assert warning.startswith("the loss of 20 steps rose to") and "went back to step 20" in warning
    # The loss of the last step and of all that followed is that of a good model again.
    assert max(step.loss for step in history(tmp_path / "bad")[-20:]) < 10


def test_the_validation_ends_a_run_that_gets_no_better(
    training: dict[str, Any], tmp_path: Path
) -> None:
    # It overfits three images at a high rate, so the others get worse.
    settings = {
        **training,
        "validation_split": 0.4,
        "validate_every_n_steps": 5,
        "early_stop_patience": 2,
        "keep_best": True,
        "learning_rate": 0.05,
    }
    events = run(settings, output_dir=tmp_path, max_train_steps=500)
    files = RunFiles(tmp_path, "tiny")
    measured = read_validation(files.validation)
    steps = [each.step for each in measured]
    assert steps == list(range(5, steps[-1] + 1, 5)) and steps[-1] < 500
    assert history(tmp_path)[-1].step == steps[-1] == read_progress(files.state).step
    best = min(measured, key=lambda each: each.loss)
    assert best is measured[-3]  # two were not better
    assert open_checkpoint(files.best).metadata["ss_steps"] == str(best.step)
    assert any("ended after step" in e.text for e in events if isinstance(e, Message))

    # Continued, it is finished; and nothing else happens.
    again = run(settings, output_dir=tmp_path, max_train_steps=500, resume=True)
    assert any("is finished" in event.text for event in again if isinstance(event, Message))
    assert not [event for event in again if isinstance(event, Saved)]
    assert train.is_finished(
        tiny.config(settings, output_dir=tmp_path, max_train_steps=500, resume=True)
    )


def test_the_last_step_is_measured_too(training: dict[str, Any], tmp_path: Path) -> None:
    settings = training | {"validation_split": 0.4, "validate_every_n_steps": 3}
    run(settings, output_dir=tmp_path, max_train_steps=4)
    assert [each.step for each in read_validation(RunFiles(tmp_path, "tiny").validation)] == [3, 4]


@pytest.mark.parametrize("name", ["early_stop_patience", "keep_best", "validate_every_n_steps"])
def test_measuring_needs_something_to_measure(
    training: dict[str, Any], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs images to measure"):
        run(training, {name: True if name == "keep_best" else 1}, output_dir=tmp_path)


def test_averaging_optimizers_give_another_lora_than_they_train(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(
        training,
        optimizer_type="AdamWScheduleFree",
        output_dir=tmp_path,
        max_train_steps=5,
        save_precision="fp32",
    )
    files = RunFiles(tmp_path, "tiny")
    state, lora = tensors(files.state), tensors(files.lora)
    name = next(key for key in lora if key.endswith("lora_B.weight"))
    trained = state[
        f"lora.{name.removeprefix('diffusion_model.').removesuffix('.lora_B.weight')}.B"
    ]
    assert trained.shape == lora[name].shape and not torch.equal(trained, lora[name])


def test_the_loss_at_each_noise_level_counts_every_sample(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, batch_size=1, output_dir=tmp_path, max_train_steps=7)
    stored = json.loads(RunFiles(tmp_path, "tiny").loss_by_time.read_text())
    steps = history(tmp_path)
    assert sum(stored["count"]) == len(steps) == 7
    for index, (mean, count) in enumerate(zip(stored["mean"], stored["count"], strict=True)):
        low, high = stored["edges"][index : index + 2]
        inside = [step.loss for step in steps if low <= step.t < high]
        assert len(inside) == count
        assert mean == (pytest.approx(sum(inside) / count, rel=1e-5) if count else None)
