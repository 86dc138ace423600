"""The difference between two models on disk, one published layer at a time.

They may be in different layouts and types: the makers' or diffusers', one file, a split set or a
folder, quantized or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint_layers import StoredModel, stored_model
from .errors import CheckpointError
from .layer_names import LayerNames
from .quantized_layout import QuantizedLayout, layout_of
from .weights import Checkpoint, open_checkpoint, pipeline_part


class Parameter(NamedTuple):
    """The "weight" or "bias" of a published layer; a bare parameter is a weight."""

    layer: str
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"


@dataclass(frozen=True)
class ModelOnDisk:
    """A transformer whose tensors are read when they are asked for."""

    checkpoint: Checkpoint
    layout: QuantizedLayout
    stored: StoredModel

    @property
    def path(self) -> Path:
        """The first of its files."""
        return self.checkpoint.paths[0]

    def parameters(self) -> list[Parameter]:
        """All that belong to layers of the family, in the file's order."""
        found: list[Parameter] = []
        for name, layer in self.stored.layers.items():
            found += [Parameter(name, "weight")] if layer.weight else []
            found += [Parameter(name, "bias")] if layer.bias else []
        return found

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Of the published tensor."""
        layer = self.stored.layers[parameter.layer]
        return layer.shape if parameter.kind == "weight" else (layer.bias[-1].end,)

    def read(self, parameter: Parameter, *, device: torch.device | str = "cpu") -> Tensor:
        """The published tensor in float32."""
        layer = self.stored.layers[parameter.layer]
        pieces = layer.weight if parameter.kind == "weight" else layer.bias
        parts = [
            self.layout.read(self.checkpoint, piece.key, torch.float32).to(device)
            for piece in pieces
        ]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if layer.halves_swapped:
            first, second = tensor.chunk(2)
            tensor = torch.cat([second, first])
        return tensor

    def left_over(self) -> list[str]:
        """Names of tensors that are of no layer of the family, nor say how one is stored."""
        used = {
            piece.key
            for layer in self.stored.layers.values()
            for piece in (*layer.weight, *layer.bias)
        }
        return [key for key in self.checkpoint.entries.keys() - self.layout.companions - used]


def open_model(path: Path, families: dict[str, LayerNames], architecture: str) -> ModelOnDisk:
    """A file, any part of a split set, a folder, or the folder of a whole pipeline.

    Raises:
        EngineError: it is no model of one of the families.
    """
    checkpoint = open_checkpoint(pipeline_part(path, "transformer"))
    layout = layout_of(checkpoint)
    return ModelOnDisk(checkpoint, layout, stored_model(checkpoint, layout, families, architecture))


class Change(NamedTuple):
    """A difference in float32, and its largest magnitude."""

    tensor: Tensor
    largest: float


def difference(
    tuned: ModelOnDisk,
    base: ModelOnDisk,
    parameter: Parameter,
    *,
    device: torch.device | str = "cpu",
) -> Change:
    """``tuned - base``.

    Raises:
        CheckpointError: the shapes differ, or a value is NaN or infinite.
    """
    shapes = [model.shape(parameter) for model in (tuned, base)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{tuned.path}: {parameter} has the shape {list(shapes[0])}, but in {base.path} it "
            f"has {list(shapes[1])}; the models are not of one kind, or this layer has to be "
            "excluded"
        )
    change = tuned.read(parameter, device=device)
    change -= base.read(parameter, device=device)
    # One pass, through which NaN comes too.
    lowest, highest = change.aminmax()
    largest = float(torch.maximum(-lowest, highest))
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{tuned.path}: {parameter} is NaN or infinite here or in {base.path}; the file is "
            "damaged"
        )
    return Change(change, largest)
