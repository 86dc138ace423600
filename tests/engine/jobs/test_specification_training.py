"""What the specification says of logs, Schedule-Free optimizers and the rex schedule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pack.engine import optimizers
from pack.engine.config import Config
from pack.engine.jobs.plan import schedule_of
from pack.engine.jobs.tracking import Tracking, check
from pack.engine.optimizer_classes import ParameterGroup
from pack.tests.engine.specification_examples import settings_of
from pack.tests.engine.tracker_files import Events, log_out, wandb_folders, wandb_run

# Logs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, without any account at wandb."""
    import wandb
    from accelerate import PartialState

    PartialState(cpu=True)  # which a training has
    log_out(tmp_path / "home", monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wandb.teardown()


def log_a_step(command: str) -> None:
    """What a training with these options does for its logs."""
    config: Config = settings_of(f"{command} --output_dir out --output_name lora")
    check(config)
    with Tracking(config, lambda event: None, state={}) as tracking:
        tracking.log_step(1, loss=0.5, smoothed=0.5, learning_rates={"lora": 1e-4}, seconds=1.0)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("--logging_dir=logs", r"\d{14}"),
        ("--logging_dir=logs --log_prefix=lora_setting1_", r"lora_setting1_\d{14}"),
    ],
)
def test_logs_are_made_in_the_working_folder_in_one_of_their_date(
    here: Path, command: str, name: str
) -> None:
    """TensorBoard's, because nothing else is asked for."""
    log_a_step(command)
    (folder,) = (here / "logs").iterdir()
    assert re.fullmatch(name, folder.name)
    assert [path.name for path in folder.iterdir()] == ["network_train"]
    (file,) = (folder / "network_train").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    # What "tensorboard --logdir=logs" finds below the folder.
    assert Events(folder / "network_train").scalars()["loss/current"] == {1: 0.5}


@pytest.mark.parametrize(
    ("option", "project"),
    [("", "network_train"), ("--log_tracker_name my_project", "my_project")],
)
def test_the_name_of_the_tracker_is_the_project_in_wandb(
    here: Path, option: str, project: str
) -> None:
    log_a_step(f"--log_with wandb --logging_dir logs {option}")
    (folder,) = (here / "logs").iterdir()
    (run,) = wandb_folders(folder)
    assert wandb_run(run).project == project


# Schedule-Free


def test_the_example_of_schedule_free_reaches_the_librarys_class() -> None:
    import schedulefree

    config = settings_of(
        "--optimizer_type schedulefree.AdamWScheduleFree "
        '--optimizer_args "weight_decay=0.01" "betas=(0.9,0.95)"'
    ).optimizer
    optimizer = optimizers.create(
        config.optimizer_type,
        [ParameterGroup("lora", [torch.nn.Parameter(torch.zeros(2, 2))])],
        lr=config.learning_rate,
        arguments=config.arguments,
        allowed=(),
    )
    assert type(optimizer) is schedulefree.AdamWScheduleFree
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.01, (0.9, 0.95))
    assert not optimizers.uses_schedule(optimizer)


# Rex

STEPS = 200


def rates(command: str) -> list[float]:
    """What the learning rate is multiplied with at each step."""
    multiplier = schedule_of(settings_of(command).optimizer, STEPS, allowed=())
    return [multiplier(step) for step in range(STEPS)]


def paper(alpha: float, beta: float, lowest: float) -> list[float]:
    """Chen et al. 2021, arXiv:2107.04197: of what is left, ``z / (alpha + beta z)``."""
    left = [1 - step / STEPS for step in range(STEPS)]
    return [lowest + (1 - lowest) * z / (alpha + beta * z) for z in left]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--lr_scheduler rex", paper(0.1, 0.9, 0.01)),
        (
            '--lr_scheduler rex --lr_scheduler_args "rex_alpha=0.1" "rex_beta=0.9"',
            paper(0.1, 0.9, 0.01),
        ),
        ("--lr_scheduler rex --rex_alpha 0.5 --rex_beta 0.5", paper(0.5, 0.5, 0.01)),
        ("--lr_scheduler rex --lr_scheduler_min_lr_ratio 0.2", paper(0.1, 0.9, 0.2)),
    ],
)
def test_rex_is_the_formula_of_the_paper_with_the_defaults_of_the_specification(
    command: str, expected: list[float]
) -> None:
    assert rates(command) == pytest.approx(expected, rel=1e-12)


def test_the_warm_up_of_rex_rises_to_the_full_rate_without_a_jump() -> None:
    found = rates("--lr_scheduler rex --lr_warmup_steps 50")
    assert found[:50] == pytest.approx([0.01 + 0.99 * step / 50 for step in range(1, 51)])
    assert found[50] == 1 and found[50:] == sorted(found[50:], reverse=True)


def test_rex_is_like_a_polynomial_of_a_small_power_but_falls_more_gradually() -> None:
    """Both fall ever faster, and for nine tenths of the run rex is above."""
    lowest = "--lr_scheduler_min_lr_ratio 0"
    rex = rates(f"--lr_scheduler rex {lowest}")
    root = rates(f"--lr_scheduler polynomial --lr_scheduler_power 0.5 {lowest}")
    for curve in (rex, root):
        falls = [first - second for first, second in zip(curve, curve[1:], strict=False)]
        assert falls == sorted(falls)
    assert all(ours > other for ours, other in zip(rex[1:180], root[1:180], strict=True))
