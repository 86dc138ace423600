"""Whole trainings with each of the losses: what it is for happens, and resuming stays exact."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.dataset import CachedItem, load_item
from pack.engine.events import Event, Progress, silent
from pack.engine.jobs import cache, train
from pack.engine.jobs.generate import load_with_loras
from pack.engine.jobs.objective import add_noise
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.step import VelocityModel
from pack.engine.loss_history import read_history
from pack.engine.signals import Stopped
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.conftest import StartJob
from pack.tests.engine.jobs.test_train_processes import start_two
from PIL import Image
from safetensors.torch import load_file

FLUX = FluxKontext()


@pytest.fixture
def data(model: Path, tmp_path: Path) -> dict[str, Any]:
    """Three images of stars with masks, and others for regularization and validation."""
    images = tiny.folder(tmp_path / "images")
    for index, caption in enumerate(("a red star", "one star", "a star on the left")):
        tiny.write_image(images / f"{index}.png", (48, 48), caption)
    Image.new("L", (48, 48), 90).save(tiny.folder(tmp_path / "masks") / "1.png")
    return tiny.model_settings(model) | {
        "image_directory": images,
        "cache_directory": tmp_path / "cache",
        "resolution": (48, 48),
        "network_dim": 4,
        "learning_rate": 1e-2,
        "output_name": "tiny",
        "save_precision": "fp32",
    }


def run(output: Path, *settings: Mapping[str, Any], **changes: Any) -> Path:
    """Trains; gives the LoRA."""
    train.run(tiny.config(*settings, changes, output_dir=output), silent)
    return RunFiles(output, "tiny").lora


def change(
    settings: Mapping[str, Any], lora: Path, items: Sequence[CachedItem], prefix: str = ""
) -> float:
    """Mean squared change of the velocity by a LoRA, at fixed noise, for some cached images.

    ``prefix`` chooses the second text instead of the first.
    """
    config = tiny.config(settings)
    device = torch.device("cpu")
    with_lora = tiny.config(settings, lora_weight=[lora])
    models = [
        VelocityModel(FLUX, load_with_loras(each, FLUX, device)) for each in (config, with_lora)
    ]
    total = 0.0
    for index, item in enumerate(items):
        batch = {name: tensor[None] for name, tensor in load_item(item).items()}
        for t in (0.3, 0.6, 0.9):
            given = add_noise(
                batch,
                torch.tensor([t]),
                guidance=1.0,
                generator=torch.Generator().manual_seed(index),
            )
            conditions = given.class_conditions if prefix else given.conditions
            with torch.no_grad():
                base, tuned = (model(given.noisy_BCTHW, given.t_B, conditions) for model in models)
            total += (tuned - base).square().mean().item()
    return total / len(items) / 3


def test_preservation_keeps_the_class_closer_to_the_base_model(
    data: dict[str, Any], tmp_path: Path
) -> None:
    words = {"trigger_word": "star", "preservation_class": "ring"}
    plain = run(tmp_path / "plain", data, max_train_steps=30)
    kept = run(tmp_path / "kept", data, words, max_train_steps=30, preservation_weight=2.0)
    items = cache.cached_data(tiny.config(data, words), FLUX, silent).train
    of_class = [change(data, lora, items, prefix="class") for lora in (plain, kept)]
    of_trigger = [change(data, lora, items) for lora in (plain, kept)]
    # Measured: 2.7 and 0.34 for the class, 2.7 and 2.3 for what is trained.
    assert of_class[1] < 0.3 * of_class[0]
    assert of_trigger[1] > 0.6 * of_trigger[0]


def test_regularization_towards_the_model_keeps_its_images_as_they_are(
    data: dict[str, Any], tmp_path: Path
) -> None:
    kept = {"regularization_directory": tiny.write_images(tmp_path / "reg", *[(64, 32)] * 3)}
    settings = data | kept
    plain = run(tmp_path / "plain", data, max_train_steps=20)
    prior = run(
        tmp_path / "prior",
        settings,
        regularization_target="model",
        prior_loss_weight=3.0,
        max_train_steps=40,  # every other batch is of regularization images
    )
    items = cache.cached_data(tiny.config(settings), FLUX, silent).train
    others = [item for item in items if item.is_regularization]
    assert len(others) == 3
    changes = [change(data, lora, others) for lora in (plain, prior)]
    assert changes[1] < 0.3 * changes[0]  # measured: 2.6 and 0.28


def test_what_is_masked_out_teaches_nothing(data: dict[str, Any], tmp_path: Path) -> None:
    masks = tiny.folder(tmp_path / "black")
    for index in range(3):
        Image.new("L", (48, 48)).save(masks / f"{index}.png")
    lora = run(tmp_path / "out", data, mask_directory=masks, max_train_steps=4)
    ups = [tensor for name, tensor in load_file(lora).items() if "lora_B" in name]
    assert len(ups) == 24 and not any(tensor.any() for tensor in ups)
    assert [step.loss for step in read_history(RunFiles(tmp_path / "out", "tiny").history)] == [
        0
    ] * 4
    lora = run(
        tmp_path / "half", data, mask_directory=masks, unmasked_weight=0.5, max_train_steps=4
    )
    # A mask that is the same everywhere is none.
    plain = run(tmp_path / "plain", data, max_train_steps=4)
    for name, tensor in load_file(plain).items():
        torch.testing.assert_close(load_file(lora)[name], tensor, rtol=1e-4, atol=1e-5)


def everything(tmp_path: Path) -> dict[str, Any]:
    return {
        "mask_directory": tmp_path / "masks",
        "unmasked_weight": 0.1,
        "regularization_directory": tiny.write_images(tmp_path / "reg", (48, 48), (64, 32)),
        "regularization_target": "model",
        "prior_loss_weight": 0.7,
        "trigger_word": "star",
        "preservation_class": "ring",
        "loss_type": "huber",
        "noise_offset": 0.1,
        "weighting_scheme": "cosmap",
        "validation_split": 0.3,
        "gradient_accumulation_steps": 2,
        "num_timestep_buckets": 3,
        "max_train_steps": 10,
    }


@pytest.mark.parametrize("stop_at", [1, 6])
def test_a_run_with_everything_continues_bit_for_bit(
    data: dict[str, Any], tmp_path: Path, stop_at: int
) -> None:
    settings = data | everything(tmp_path)
    run(tmp_path / "whole", settings)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "train" and event.done == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train.run(tiny.config(settings, output_dir=tmp_path / "parts"), stop)
    run(tmp_path / "parts", settings, resume=True)
    whole, parts = (RunFiles(tmp_path / name, "tiny") for name in ("whole", "parts"))
    tiny.assert_same_file(whole.lora, parts.lora)
    tiny.assert_same_file(whole.state, parts.state)
    assert whole.loss_by_time.read_text() == parts.loss_by_time.read_text()


def test_checkpointing_changes_nothing_with_everything(
    data: dict[str, Any], tmp_path: Path
) -> None:
    settings = data | everything(tmp_path)
    plain = run(tmp_path / "plain", settings)
    checkpointed = run(tmp_path / "checkpointed", settings, gradient_checkpointing=True)
    for name, tensor in load_file(plain).items():
        assert torch.equal(load_file(checkpointed)[name], tensor), name


def test_two_processes_equal_one_with_twice_the_accumulation_with_everything(
    data: dict[str, Any], tmp_path: Path, start_job: StartJob
) -> None:
    """Batches of one process may have a second term while those of the other have none."""
    # A large epsilon, so that AdamW does not make steps of full size out of rounding errors.
    settings = data | everything(tmp_path) | {"optimizer_args": ["eps=1e-3"], "max_train_steps": 6}
    cache.run(tiny.config(settings), silent)
    jobs = start_two(start_job, tiny.config(settings, output_dir=tmp_path / "two"))
    assert [job.wait() for job in jobs] == [0, 0], [job.log.read_text() for job in jobs]
    run(tmp_path / "one", settings, gradient_accumulation_steps=4)
    two, one = (load_file(RunFiles(tmp_path / name, "tiny").lora) for name in ("two", "one"))
    for name, tensor in one.items():
        # Float32 sums in another order; B has got to about 0.1.
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
