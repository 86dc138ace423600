"""The demo, shortened; what a whole one reaches is in engine/demo/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.config_file import load_config
from pack.engine.demo import job
from pack.engine.demo.concept import HELD_OUT
from pack.engine.errors import ConfigError
from pack.engine.events import Event, Message, Progress, silent
from pack.engine.loss_history import read_history
from PIL import Image


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, job.Result, list[Event]]:
    output = tmp_path_factory.mktemp("demo") / "output"
    events: list[Event] = []
    return output, job.run(output, events.append, steps=40), events


@pytest.mark.slow
def test_forty_steps_already_lower_the_held_out_loss(
    demo: tuple[Path, job.Result, list[Event]],
) -> None:
    _, result, _ = demo

    assert result.loss[1] < 0.9 * result.loss[0]
    assert result.similarity[1] > result.similarity[0]
    assert 0 < result.step_seconds < result.seconds and result.peak_memory_mib > 100


@pytest.mark.slow
def test_it_leaves_the_grid_the_curve_and_a_run_as_any_other(
    demo: tuple[Path, job.Result, list[Event]],
) -> None:
    output, _, _ = demo

    for name in ("before_after.png", "loss_curve.png"):
        with Image.open(output / name) as image:
            assert image.format == "PNG" and image.width > 900
    for folder in ("before", "after"):
        assert len(list((output / folder).glob("*.png"))) == 4 * len(HELD_OUT)
    assert len(read_history(output / "loomling.loss_history.jsonl")) == 40
    assert load_config(output / "loomling.toml", {}, {}).training.max_train_steps == 40
    assert (output / "loomling.safetensors").exists()


@pytest.mark.slow
def test_it_tells_what_it_does_and_ends_with_the_table(
    demo: tuple[Path, job.Result, list[Event]],
) -> None:
    _, result, events = demo

    assert {event.task for event in events if isinstance(event, Progress)} == {
        "cache images",
        "cache captions",
        "train",
        "generate",
    }
    last = events[-1]
    assert isinstance(last, Message)
    assert f"{result.loss[0]:.4f}" in last.text and f"{result.loss[1]:.4f}" in last.text


@pytest.mark.slow
def test_a_second_demo_replaces_the_first(demo: tuple[Path, job.Result, list[Event]]) -> None:
    output, first, _ = demo

    second = job.run(output, silent, steps=1)

    assert second.loss[0] == first.loss[0] and second.loss[1] != first.loss[1]
    assert len(read_history(output / "loomling.loss_history.jsonl")) == 1
    assert len(list((output / "after").glob("*.png"))) == 4 * len(HELD_OUT)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")

    with pytest.raises(ConfigError, match="holds something else"):
        job.run(tmp_path, silent)

    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_less_than_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps 0"):
        job.run(tmp_path / "output", silent, steps=0)
