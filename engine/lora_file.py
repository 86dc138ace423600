"""LoRA files in ComfyUI's native key space, checked as they are written and read.

Keys are ``diffusion_model.<published module name>.lora_A.weight`` [R, I], ``.lora_B.weight``
[O, R] and ``.alpha``, which ComfyUI's own loaders apply without renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from . import file_kinds
from .errors import CheckpointError, NotFiniteError
from .lora import LoRAWeights
from .weights import open_checkpoint, save_tensors

PREFIX = "diffusion_model."
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"

# Published name of each linear layer of a model -> (out features, in features).
LinearShapes = Mapping[str, tuple[int, int]]


def save_lora(
    path: Path,
    weights: Mapping[str, LoRAWeights],
    shapes: LinearShapes,
    *,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Write a LoRA; the file is either whole and sound or not there.

    Raises:
        NotFiniteError: a value is NaN or infinite.
        ValueError: a name or shape does not belong to the model (a bug of ours).
    """
    tensors: dict[str, Tensor] = {}
    for name, lora in weights.items():
        _check_shapes(name, lora, shapes)
        tensors[f"{PREFIX}{name}{_DOWN}"] = lora.down_RI.to("cpu", dtype)
        tensors[f"{PREFIX}{name}{_UP}"] = lora.up_OR.to("cpu", dtype)
        tensors[f"{PREFIX}{name}{_ALPHA}"] = torch.tensor(lora.alpha, dtype=torch.float32)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NotFiniteError(
                f"{path}: {key} became NaN or infinite, so the LoRA was not written; what was "
                "saved before is untouched, start again with a lower learning_rate"
            )
    save_tensors(path, tensors, metadata)


def load_lora(path: Path, shapes: LinearShapes) -> dict[str, LoRAWeights]:
    """Read a LoRA for a model with these layers, every key accounted for.

    Alpha is the rank when the file has none, as everywhere in this format.

    Raises:
        CheckpointError: the file is no LoRA, or a key or shape does not fit the model.
    """
    checkpoint = open_checkpoint(path)
    names = {
        key[len(PREFIX) : -len(_DOWN)]
        for key in checkpoint.entries
        if key.startswith(PREFIX) and key.endswith(_DOWN)
    }
    if not names:
        raise CheckpointError(
            f"{path}: expected a LoRA with keys like {PREFIX}...{_DOWN}, but this is "
            f"{file_kinds.describe(checkpoint.keys())}"
        )
    known = {f"{PREFIX}{name}{end}" for name in names for end in (_DOWN, _UP, _ALPHA)}
    if left_over := sorted(checkpoint.entries.keys() - known):
        raise CheckpointError(
            f"{path}: {left_over[0]!r} is not a key of a LoRA in ComfyUI's layout"
        )
    weights: dict[str, LoRAWeights] = {}
    for name in sorted(names):
        keys = [f"{PREFIX}{name}{end}" for end in (_DOWN, _UP, _ALPHA)]
        if keys[1] not in checkpoint.entries:
            raise CheckpointError(f"{path}: {keys[1]} is missing; the file is damaged")
        if name not in shapes:
            near = get_close_matches(name, list(shapes), n=1)
            hint = f"; the nearest layer is {near[0]!r}" if near else ""
            raise CheckpointError(
                f"{path}: the LoRA is for a layer {name!r} that this model does not have{hint}"
            )
        down = checkpoint.read(keys[0])
        alpha = checkpoint.read(keys[2]).item() if keys[2] in checkpoint.entries else down.shape[0]
        weights[name] = LoRAWeights(down, checkpoint.read(keys[1]), float(alpha))
        if problem := _shape_problem(name, weights[name], shapes):
            raise CheckpointError(f"{path}: {problem}; it was made for a model of another size")
    return weights


def _check_shapes(name: str, lora: LoRAWeights, shapes: LinearShapes) -> None:
    if name not in shapes:
        raise ValueError(f"{name} is no layer of the model")
    if problem := _shape_problem(name, lora, shapes):
        raise ValueError(problem)


def _shape_problem(name: str, lora: LoRAWeights, shapes: LinearShapes) -> str | None:
    out_features, in_features = shapes[name]
    found = (lora.up_OR.shape[0], lora.down_RI.shape[1])
    if found != (out_features, in_features) or lora.up_OR.shape[1] != lora.down_RI.shape[0]:
        return (
            f"{name} has a LoRA of shape {list(lora.up_OR.shape)} x {list(lora.down_RI.shape)}, "
            f"but the layer is {out_features} x {in_features}"
        )
    return None
