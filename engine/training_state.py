"""What a run needs to continue as if it had never stopped: one safetensors file, no pickle.

Adapters and optimizer state are stored as they are, everything else as JSON in the metadata.
Random draws are functions of the seed and the position, so none are stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from . import optimizer_state
from .errors import CheckpointError, NotFiniteError
from .networks.network import Network
from .weights import Checkpoint, open_checkpoint, save_tensors

FORMAT = "lora_loom_state_2"
_FORMAT_1 = "lora_loom_state_1"  # of AdamW only, with nothing of its groups
_EXTRA = "extra."


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``step`` optimizer steps are done.

    ``recipe`` holds the settings that decide the result, flat; a run may only be continued with
    the same ones. ``data`` identifies the training data. ``extra`` is what else a continued run
    must know, as JSON.
    """

    step: int
    recipe: dict[str, Any]
    data: str
    extra: dict[str, Any] = field(default_factory=dict)


def save_state(
    path: Path,
    network: Network,
    optimizer: Optimizer,
    scaler: GradScaler,
    progress: Progress,
    *,
    extra_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state; the file is either whole or the previous one.

    An optimizer that averages is saved where it trains, so outside of `optimizers.evaluating`.

    Args:
        extra_tensors: stored as they are; `load_state` gives them back.

    Raises:
        NotFiniteError: what is trained is NaN or infinite, so nothing could be continued from it.
    """
    tensors = _adapter_tensors(network)
    try:
        packed = optimizer_state.pack(optimizer, tensors)
    except TypeError as error:
        raise CheckpointError(
            f"{path}: the state of {type(optimizer).__name__} was not written, because {error}; "
            "use another optimizer_type"
        ) from None
    header = {
        "format": FORMAT,
        "step": progress.step,
        "recipe": progress.recipe,
        "data": progress.data,
        "extra": progress.extra,
        "optimizer_class": type(optimizer).__name__,
        "optimizer": packed,
        "scaler": scaler.state_dict(),
    }
    cpu = _on_cpu(tensors)
    for name, tensor in cpu.items():
        if not _is_finite(tensor):
            raise NotFiniteError(
                f"{path}: {name} became NaN or infinite, so the state was not written; what was "
                "saved before is untouched, start again with a lower learning_rate"
            )
    extra = {f"{_EXTRA}{name}": tensor for name, tensor in (extra_tensors or {}).items()}
    save_tensors(path, {**cpu, **_on_cpu(extra)}, {"lora_loom": json.dumps(header)})


def read_progress(path: Path) -> Progress:
    """Only the position, recipe and extra values, without reading tensors.

    Raises:
        CheckpointError: the file is missing, damaged or no state of ours.
    """
    return _progress(_header(open_checkpoint(path).metadata, path))


@torch.no_grad()
def load_state(
    path: Path, network: Network, optimizer: Optimizer, scaler: GradScaler
) -> tuple[Progress, dict[str, Tensor]]:
    """Put a saved state into a network and optimizer of the same recipe.

    Returns:
        The position, and the extra tensors by name.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network or optimizer.
    """
    checkpoint = open_checkpoint(path)
    header = _header(checkpoint.metadata, path)
    if header["optimizer_class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{path}: the state is of the optimizer {header['optimizer_class']}, not "
            f"{type(optimizer).__name__}; set the optimizer_type that it was made with"
        )
    for key, parameter in _adapter_tensors(network).items():
        if key not in checkpoint.entries or checkpoint.shape(key) != parameter.shape:
            raise CheckpointError(
                f"{path}: the state does not hold {key} of shape {list(parameter.shape)}; it "
                "belongs to another model or network"
            )
        parameter.copy_(checkpoint.read(key))
    _load_optimizer(path, checkpoint, header, optimizer)
    scaler.load_state_dict(header["scaler"])
    extra = {
        key.removeprefix(_EXTRA): checkpoint.read(key)
        for key in checkpoint.entries
        if key.startswith(_EXTRA)
    }
    return _progress(header), extra


def recipe_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as "name (was x, now y)"."""
    return [
        f"{key} (was {saved.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def _adapter_tensors(network: Network) -> dict[str, Tensor]:
    return {f"lora.{name}": tensor for name, tensor in network.named_tensors().items()}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares memory with another, as the file wants it."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        cpu = tensor.detach().cpu()
        memory = cpu.untyped_storage().data_ptr()
        found[name] = cpu.clone() if memory in taken else cpu
        taken.add(memory)
    return found


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # FP8 cannot be asked
    return bool(wide.isfinite().all())


def _load_optimizer(
    path: Path, checkpoint: Checkpoint, header: Mapping[str, Any], optimizer: Optimizer
) -> None:
    tensors = {
        key: checkpoint.read(key) for key in checkpoint.entries if key.startswith("optimizer.")
    }
    packed = header["optimizer"]
    if header["format"] == _FORMAT_1:
        packed = _packed_of_format_1(packed, tensors, len(optimizer.param_groups))
    try:
        optimizer_state.unpack(optimizer, packed, tensors)
    except (ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path}: the state does not fit the optimizer ({error}); it belongs to another model "
            "or network"
        ) from None


def _packed_of_format_1(
    numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], num_groups: int
) -> Any:
    """The older layout, "optimizer.INDEX.KEY" for every tensor and number, in the newer one."""
    state: dict[int, list[Any]] = {}
    for name, value in [*((key, {"tensor": key}) for key in tensors), *numbers.items()]:
        _, index, key = name.split(".", 2)
        state.setdefault(int(index), []).append([key, value])
    by_index = [[index, {"dict": entries}] for index, entries in state.items()]
    groups = [{"dict": []}] * num_groups
    return {"dict": [["state", {"dict": by_index}], ["groups", groups], ["more", {"dict": []}]]}


def _progress(header: Mapping[str, Any]) -> Progress:
    return Progress(header["step"], header["recipe"], header["data"], header["extra"])


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        header = json.loads(metadata["lora_loom"])
        if header["format"] not in (FORMAT, _FORMAT_1):
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(
            f"{path}: this is not a training state of LoRA Loom; give a file that ends in .state"
        ) from None
    return {"extra": {}, "optimizer_class": "AdamW", **header}
