"""Random trainings that are killed at random moments and continued, against ones left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from pack.engine.events import silent
from pack.engine.jobs import cache, train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.loss_history import read_history
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.conftest import StartJob

_RUNS = 10
_KILLS = 5
_STEPS = 14
# Each is one way to train; a run takes one value of each line at random.
_CHOICES: list[list[dict[str, Any]]] = [
    [
        {},
        {"optimizer_args": ["weight_decay=0.1"]},
        {"optimizer_type": "Adafactor"},
        {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=True"]},
        {"optimizer_type": "AdamWScheduleFree"},
        {"optimizer_type": "RAdamScheduleFree"},
        {"optimizer_type": "SGDScheduleFree"},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0},
        {"optimizer_type": "Lion", "learning_rate": 1e-3},
        {"optimizer_type": "Muon"},
        {"optimizer_type": "torch.optim.SGD", "optimizer_args": ["momentum=0.9"]},
    ],
    [
        {},
        {"lr_scheduler": "rex", "lr_warmup_steps": 3},
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:5,0.1'"]},
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=3", "gamma=0.5"]},
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=0.02", "total_steps=14"]},
    ],
    [
        {},
        {"timestep_sampling": "logsnr", "num_timestep_buckets": 3},
        {"timestep_sampling": "sigma", "weighting_scheme": "mode"},
        {"timestep_sampling": "uniform", "weighting_scheme": "sigma_sqrt"},
        {
            "timestep_sampling": "qinglong_flux",
            "min_timestep": 200,
            "max_timestep": 900,
            "preserve_distribution_shape": True,
            "num_timestep_buckets": 5,
        },
    ],
    [{}, {"loss_type": "huber", "noise_offset": 0.1}, {"loss_type": "l1"}],
    [{}, {"alpha_mask": True, "unmasked_weight": 0.3}],
    [{}, {"trigger_word": "red", "preservation_class": "some"}],
    [{}, {"batch_size": 1}, {"batch_size": 3, "num_repeats": 2}],
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3}],
    [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}],
    [{}, {"max_grad_norm": 0.0}],
    [
        {},
        {"validation_split": 0.3, "validate_every_n_steps": 2, "keep_best": True},
        {"validation_split": 0.3, "early_stop_patience": 3},
    ],
    [
        {},
        {
            "sample_lines": ["a star --w 32 --h 32 --s 2", "a ring --w 48 --h 32 --s 1 --d 7"],
            "sample_every_n_steps": 3,
            "sample_at_first": True,
        },
    ],
    [
        {"save_every_n_steps": 1},
        {"save_every_n_steps": 2, "save_last_n_steps": 4, "save_state": True},
        {"save_every_n_epochs": 1, "save_last_n_epochs": 2},
        {"autosave_minutes": 1e-4},
    ],
]


def random_settings(chance: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for choices in _CHOICES:
        settings |= chance.choice(choices)
    return settings


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, without the times that steps took."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in each.items() if key != "seconds"} for each in records]


def assert_same_run(first: Path, second: Path) -> None:
    """All that is trained, measured and drawn, bit for bit; and there is nothing else."""
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*"))
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*"))
    for name in names:
        one, other = first / name, second / name
        if name.endswith((".safetensors", ".state")):
            tiny.assert_same_file(one, other)
        elif name.endswith(".jsonl"):
            assert lines(one) == lines(other), name
        elif name.endswith((".latent", ".loss_by_time.json")):
            assert one.read_bytes() == other.read_bytes(), name


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings with images of two sizes, some of them partly transparent."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("random")
    images = tiny.write_images(folder, *[(48, 48), (64, 32)] * 4)
    for path in sorted(images.glob("*.png"))[::2]:
        with Image.open(path) as image:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(path)
    return {
        **tiny.model_settings(model),
        "image_directory": images,
        "resolution": (48, 48),
        "batch_size": 2,
        "network_dim": 2,
        "learning_rate": 1e-2,
        "output_name": "tiny",
        "max_train_steps": _STEPS,
        "divergence_factor": 0.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(_RUNS))
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    data: dict[str, Any], tmp_path: Path, start_job: StartJob, seed: int
) -> None:
    chance = random.Random(seed)
    settings = data | random_settings(chance)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cache.run(tiny.config(settings), silent)
    train.run(tiny.config(settings, output_dir=whole), silent)
    total = len(read_history(RunFiles(whole, "tiny").history))

    history = RunFiles(killed, "tiny").history
    config = tiny.config(settings, output_dir=killed, resume=True)
    ends: list[int] = []
    for kill in range(_KILLS):
        job = start_job("train", config)
        job.wait_for_lines(history, (kill * total) // _KILLS + chance.randrange(1, 4))
        time.sleep(chance.uniform(0, 0.05))
        if job.poll() is None:
            job.send(signal.SIGKILL)
        ends.append(job.wait())
    assert ends[:2] == [-signal.SIGKILL] * 2 and {*ends} <= {0, -signal.SIGKILL}
    job = start_job("train", config)
    assert job.wait() == 0, job.log.read_text()
    assert_same_run(whole, killed)
