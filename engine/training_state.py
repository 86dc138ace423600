"""What a run needs to continue as if it had never stopped: one safetensors file, no pickle.

Adapters and optimizer state are stored as they are (float32), everything else as JSON in the
metadata. Random draws are functions of the seed and the position, so none are stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .errors import CheckpointError
from .lora import LoRANetwork
from .weights import open_checkpoint, save_tensors

FORMAT = "lora_loom_state_1"


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``step`` optimizer steps are done.

    ``recipe`` holds the settings that decide the result, flat; a run may only be continued with
    the same ones. ``data`` identifies the training data.
    """

    step: int
    recipe: dict[str, Any]
    data: str


def save_state(
    path: Path, network: LoRANetwork, optimizer: Optimizer, scaler: GradScaler, progress: Progress
) -> None:
    """Write the state; the file is either whole or the previous one.

    Raises:
        CheckpointError: a value is NaN or infinite, so nothing could be continued from it.
    """
    tensors: dict[str, Tensor] = {}
    for name, adapter in network.adapters.items():
        tensors[f"lora.{name}.A"] = adapter.lora_A
        tensors[f"lora.{name}.B"] = adapter.lora_B
    numbers: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            place = tensors if isinstance(value, Tensor) else numbers
            place[f"optimizer.{index}.{key}"] = value
    header = {
        "format": FORMAT,
        "step": progress.step,
        "recipe": progress.recipe,
        "data": progress.data,
        "optimizer": numbers,
        "scaler": scaler.state_dict(),
    }
    cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    for name, tensor in cpu.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} became NaN or infinite, so the state was not written; what was "
                "saved before is untouched, start again with a lower learning_rate"
            )
    save_tensors(path, cpu, {"lora_loom": json.dumps(header)})


def read_progress(path: Path) -> Progress:
    """Only the position and recipe, without reading tensors.

    Raises:
        CheckpointError: the file is missing, damaged or no state of ours.
    """
    header = _header(open_checkpoint(path).metadata, path)
    return Progress(header["step"], header["recipe"], header["data"])


@torch.no_grad()
def load_state(
    path: Path, network: LoRANetwork, optimizer: Optimizer, scaler: GradScaler
) -> Progress:
    """Put a saved state into a network and optimizer of the same recipe.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    checkpoint = open_checkpoint(path)
    header = _header(checkpoint.metadata, path)
    for name, adapter in network.adapters.items():
        for part, parameter in (("A", adapter.lora_A), ("B", adapter.lora_B)):
            key = f"lora.{name}.{part}"
            if key not in checkpoint.entries or checkpoint.shape(key) != parameter.shape:
                raise CheckpointError(
                    f"{path}: the state does not hold {key} of shape {list(parameter.shape)}; it "
                    "belongs to another model or network"
                )
            parameter.copy_(checkpoint.read(key))
    state: dict[int, dict[str, Any]] = {}
    for key in checkpoint.entries:
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = checkpoint.read(key)
    for key, value in header["optimizer"].items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scaler.load_state_dict(header["scaler"])
    return Progress(header["step"], header["recipe"], header["data"])


def recipe_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as "name (was x, now y)"."""
    return [
        f"{key} (was {saved.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        header = json.loads(metadata["lora_loom"])
        if header["format"] != FORMAT:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(
            f"{path}: this is not a training state of LoRA Loom; give a file that ends in .state"
        ) from None
    return header
