from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack.engine.architectures import ARCHITECTURES
from pack.engine.errors import CheckpointError, ConfigError, EngineError
from pack.engine.events import Event, Finished, Message, Saved
from pack.engine.jobs import show
from pack.engine.jobs.plan import schedule_of
from pack.engine.timesteps import CHOICES
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.conftest import StartJob
from PIL import Image

FAMILY = {"architecture": "flux_kontext"}
MODES = ["auto", *CHOICES]


def shown(**settings: Any) -> list[Event]:
    events: list[Event] = []
    assert show.run(tiny.config(settings), events.append)
    assert events.pop() == Finished("train")
    return events


def chart(**settings: Any) -> list[str]:
    """The lines of the only message."""
    (message,) = shown(**settings)
    assert isinstance(message, Message)
    return message.text.splitlines()


def picture(folder: Path, **settings: Any) -> Image.Image:
    (saved,) = shown(output_dir=folder, **settings)
    assert isinstance(saved, Saved) and saved.kind == "plot"
    assert [path for path in folder.iterdir()] == [Path(saved.path)]
    with Image.open(saved.path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def shares(lines: list[str]) -> dict[tuple[int, int], float]:
    """Share of the draws by range of noise levels, in thousandths."""
    rows = [re.match(r" *(\d+) - +(\d+) +([\d.]+)%", line) for line in lines]
    return {(int(row[1]), int(row[2])): float(row[3]) / 100 for row in rows if row}


def test_a_training_that_is_asked_to_show_nothing_goes_on() -> None:
    events: list[Event] = []
    assert not show.run(tiny.config(), events.append)
    assert events == []


# Noise levels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_shape", [False, True])
def test_the_shares_of_any_mode_are_those_of_random_draws(mode: str, keep_shape: bool) -> None:
    settings = {
        **FAMILY,
        "timestep_sampling": mode,
        "logit_mean": -1.0,
        "discrete_flow_shift": 3.0,
        "min_timestep": 300,
        "max_timestep": 900,
        "preserve_distribution_shape": keep_shape,
        "resolution": (512, 768),
    }
    found = shares(chart(show_timesteps="console", **settings))

    draws = torch.rand(50_000, generator=torch.Generator().manual_seed(1))
    sample = show.sample_times(tiny.config(settings).timesteps, ARCHITECTURES["flux_kontext"])
    t_N = sample(draws, 768 // 8, 512 // 8)
    assert list(found) == [(start, start + 30) for start in range(300, 900, 30)]
    for (start, end), share in found.items():
        drawn = ((t_N >= start / 1000) & (t_N < end / 1000)).double().mean().item()
        # Five deviations of a share of random draws, and half of the last digit that is shown.
        assert abs(share - drawn) <= 5 * (max(share, 1e-4) / 50_000) ** 0.5 + 5e-5


def test_uniform_times_have_equal_bars_over_the_whole_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    title, headings, *rows, median = chart(
        show_timesteps="console", timestep_sampling="uniform", **FAMILY
    )
    assert title == "uniform, pictures of 1024x1024"
    assert headings.split() == ["noise", "level", "share"]
    assert len(rows) == 20 and {len(row) for row in rows} == {60}
    assert median == "half of all are below 500 of 1000"


def test_the_weight_of_the_loss_stands_beside_the_share() -> None:
    lines = chart(
        show_timesteps="console",
        timestep_sampling="sigma",
        weighting_scheme="sigma_sqrt",
        min_timestep=400,
        max_timestep=600,
        **FAMILY,
    )
    weights = {line.split()[0]: line.split()[4] for line in lines[2:22]}
    assert weights["400"] == f"{0.405**-2:.2f}" and weights["590"] == f"{0.595**-2:.2f}"


def test_a_range_and_its_strata_are_told() -> None:
    lines = chart(
        show_timesteps="console",
        timestep_sampling="uniform",
        min_timestep=500,
        num_timestep_buckets=5,
        **FAMILY,
    )
    assert lines[-2:] == [
        "the range 500 to 1000 is squeezed from the whole",
        "each epoch draws equally often from 5 parts, which meet at 600 700 800 900",
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (999, 1000), (100, 121), (0, 999)])
def test_rows_are_whole_thousandths_that_make_up_any_range(low: int, high: int) -> None:
    found = shares(
        chart(
            show_timesteps="console",
            timestep_sampling="uniform",
            min_timestep=low,
            max_timestep=high,
            **FAMILY,
        )
    )
    edges = [low, *(end for _, end in found)]
    assert [start for start, _ in found] == edges[:-1] and edges[-1] == high
    assert sum(found.values()) == pytest.approx(1, abs=len(found) * 5e-5)


def test_without_a_model_it_is_said_for_which_family_it_is() -> None:
    said, _ = shown(show_timesteps="console")
    assert said == Message("neither architecture nor dit is given; this is shown for flux_kontext")


def test_the_family_is_found_from_the_model(model: Path) -> None:
    dit = tiny.model_settings(model)["dit"]
    assert chart(show_timesteps="console", dit=dit)[0].startswith("flux_shift")
    with pytest.raises(CheckpointError):
        shown(show_timesteps="console", dit=model / "nothing.safetensors")


@pytest.mark.parametrize("how", ["console", "image"])
def test_a_range_without_times_is_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(ConfigError, match="logsnr has no times between 0 and 0.001"):
        shown(
            show_timesteps=how,
            output_dir=tmp_path,
            timestep_sampling="logsnr",
            logit_mean=-90.0,
            logit_std=0.1,
            max_timestep=1,
            preserve_distribution_shape=True,
            **FAMILY,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_a_picture(tmp_path: Path, mode: str) -> None:
    image = picture(
        tmp_path,
        show_timesteps="image",
        timestep_sampling=mode,
        num_timestep_buckets=4,
        weighting_scheme="cosmap",
        **FAMILY,
    )
    red, _, blue = (np.asarray(image).astype(int)[..., channel] for channel in range(3))
    assert (blue - red > 60).sum() > 10_000  # the bars


def test_a_picture_is_named_after_the_run_and_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        picture(tmp_path, show_timesteps="image", output_name="mine", **FAMILY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.timesteps.png"]


def test_without_a_folder_the_picture_is_in_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown(show_timesteps="image", **FAMILY)
    assert [path.name for path in tmp_path.iterdir()] == ["training.timesteps.png"]


def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot be written"):
        shown(show_timesteps="image", output_dir=tmp_path / "file", **FAMILY)


# Learning rates

SCHEDULE: dict[str, Any] = {
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 4,
    "learning_rate": 2e-3,
}


def rows(lines: list[str]) -> dict[int, float]:
    """The learning rate by step, counted from 1."""
    cells = [line.split()[:2] for line in lines[2:]]
    return {int(step.replace(",", "")): float(rate) for step, rate in cells}


def test_the_rate_of_every_step_of_a_short_run_is_told() -> None:
    lines = chart(show_lr_scheduler="console", max_train_steps=12, **SCHEDULE)
    schedule = schedule_of(tiny.config(SCHEDULE).optimizer, 12, allowed=())
    assert lines[0] == "cosine, 12 steps"
    assert rows(lines) == pytest.approx(
        {step + 1: 2e-3 * schedule(step) for step in range(12)},
        rel=5e-3,  # three digits are shown
    )


def test_a_long_run_is_told_at_even_distances_with_its_first_and_last_step() -> None:
    found = list(rows(chart(show_lr_scheduler="console", max_train_steps=10**8)))
    assert (found[0], found[-1], len(found)) == (1, 10**8, 20)
    distances = {second - first for first, second in zip(found, found[1:], strict=False)}
    assert max(distances) - min(distances) <= 1


@pytest.mark.parametrize("steps", [1, 1600, 10**8])
def test_a_schedule_of_any_length_has_a_picture(tmp_path: Path, steps: int) -> None:
    image = picture(tmp_path, show_lr_scheduler="image", max_train_steps=steps, lr_scheduler="rex")
    assert image.size == (960, 540)


def test_a_class_is_shown_before_it_is_trained_with() -> None:
    said, text = shown(
        show_lr_scheduler="console",
        max_train_steps=10,
        lr_scheduler_type="OneCycleLR",
        lr_scheduler_args=["max_lr=1e-3", "total_steps=10"],
    )
    assert isinstance(said, Message) and "momentum" in said.text
    assert isinstance(text, Message) and text.text.startswith("OneCycleLR, 10 steps\n")


def test_a_schedule_free_optimizer_is_shown_with_the_rates_that_it_uses() -> None:
    said, text = shown(
        show_lr_scheduler="console",
        max_train_steps=5,
        optimizer_type="AdamWScheduleFree",
        learning_rate=0.1,
        lr_scheduler="cosine",
        lr_warmup_steps=2,
    )
    assert isinstance(said, Message) and "uses no lr_scheduler" in said.text
    assert isinstance(text, Message)
    assert rows(text.text.splitlines()) == {1: 0.05, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.1}


def test_an_optimizer_that_finds_its_rates_itself_has_none_to_show() -> None:
    (line,) = chart(
        show_lr_scheduler="console",
        optimizer_type="Adafactor",
        optimizer_args=["relative_step=True"],
    )
    assert line == "Adafactor finds its learning rates itself; there is nothing to show"


def test_both_are_shown_if_both_are_asked_for(tmp_path: Path) -> None:
    events = shown(show_timesteps="image", show_lr_scheduler="image", output_dir=tmp_path, **FAMILY)
    names = [Path(event.path).name for event in events if isinstance(event, Saved)]
    assert names == ["training.timesteps.png", "training.lr_scheduler.png"]


def test_a_run_of_epochs_is_as_long_as_its_data(training: dict[str, Any]) -> None:
    """Five images, two a batch, in two sizes: three batches an epoch."""
    lines = chart(show_lr_scheduler="console", max_train_epochs=4, **training)
    assert lines[0] == "constant, 12 steps"


def test_a_run_of_epochs_over_data_that_is_not_cached_is_a_sentence(
    training: dict[str, Any], tmp_path: Path
) -> None:
    changed = training | {"cache_directory": tmp_path}
    with pytest.raises(ConfigError, match="run the cache job first, or give max_train_steps"):
        shown(show_lr_scheduler="console", max_train_epochs=4, **changed)
    assert not list(tmp_path.iterdir())


def test_the_shell_shows_and_does_not_train(tmp_path: Path, start_job: StartJob) -> None:
    config = tiny.config(
        show_timesteps="console", show_lr_scheduler="image", output_dir=tmp_path / "out"
    )
    job = start_job("train", config)
    assert job.wait() == 0, job.log.read_text()
    printed = job.log.read_text().splitlines()
    assert "flux_shift, pictures of 1024x1024" in printed
    assert len(shares(printed)) == 20
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training.lr_scheduler.png"]
