from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack.engine.errors import ConfigError
from pack.tests.nodes.stand_ins import FolderPaths

SOCKETS = (
    *("model", "dataset", "lora", "optimizer", "lr_scheduler", "timesteps", "options"),
    *("loss", "validation", "samples", "logging", "compile", "metadata"),
)
WIDGETS = {"output_name": "cats", "max_train_steps": 10, "network_dim": 4, "save_every_n_steps": 0}


@pytest.fixture
def training(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("training")


def test_the_settings_of_all_inputs_make_one_config(training: Any, comfyui: FolderPaths) -> None:
    inputs = {
        **WIDGETS,
        "model": {"dit": Path("/m/flux.safetensors"), "gradient_checkpointing": True},
        "dataset": {"image_directory": Path("/d"), "batch_size": 2},
        "optimizer": {"max_grad_norm": 0.0},
        "options": None,  # not connected
    }
    config = training.config("Train LoRA", "continue", inputs)
    assert config.model.dit == Path("/m/flux.safetensors")
    assert config.training.gradient_checkpointing and config.dataset.batch_size == 2
    assert (config.optimizer.max_grad_norm, config.output.save_every_n_steps) == (0.0, None)
    assert config.output.output_dir == comfyui.base / "output/loras"


@pytest.mark.parametrize("socket", SOCKETS)
def test_the_widgets_of_the_node_and_its_folder_win(
    training: Any, comfyui: FolderPaths, socket: str
) -> None:
    others = {"network_dim": 8, "output_dir": Path("/elsewhere"), "resume": Path("/x.state")}
    config = training.config("Train LoRA", "continue", {**WIDGETS, socket: others})
    assert config.network.network_dim == 4 and config.output.resume is True
    assert config.output.output_dir == comfyui.base / "output/loras"


@pytest.mark.parametrize(
    ("choice", "resume", "overwrite"), [("continue", True, False), ("replace", False, True)]
)
def test_an_existing_run_is_continued_or_replaced(
    training: Any, choice: str, resume: bool, overwrite: bool
) -> None:
    output = training.config("Train LoRA", choice, WIDGETS).output
    assert (output.resume, output.overwrite) == (resume, overwrite)


def test_a_wrong_widget_is_named_with_its_node(training: Any) -> None:
    with pytest.raises(ConfigError, match=r'^Train LoRA: output_name = "a/b": expected a file'):
        training.config("Train LoRA", "continue", {**WIDGETS, "output_name": "a/b"})


def test_a_lora_without_a_name_is_refused(training: Any) -> None:
    with pytest.raises(ConfigError, match="^Train LoRA: output_name is empty; "):
        training.config("Train LoRA", "continue", {**WIDGETS, "output_name": ""})


def test_a_lora_that_was_written_again_is_another(training: Any, comfyui: FolderPaths) -> None:
    assert training.last_change("cats") is None
    path = comfyui.base / "output/loras/cats.safetensors"
    path.touch()
    first = training.last_change("cats")
    assert first == training.last_change("cats") is not None
    os.utime(path, ns=(1, 1))
    assert training.last_change("cats") != first
    assert training.last_change(None) is None  # as long as it is linked
