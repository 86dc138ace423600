"""The model families, by name."""

from __future__ import annotations

from pathlib import Path

from .. import file_kinds
from ..errors import CheckpointError
from ..weights import open_checkpoint, pipeline_part
from .base import Architecture
from .flux_kontext import FluxKontext

ARCHITECTURES: dict[str, Architecture] = {"flux_kontext": FluxKontext()}


def find_architecture(name: str, dit: Path | None) -> Architecture:
    """The family that ``name`` says, or with "auto" the one that the file ``dit`` belongs to.

    Raises:
        CheckpointError: the file is no transformer of a family we know; says what it is.
    """
    if name != "auto":
        return ARCHITECTURES[name]
    if dit is None:
        raise CheckpointError(
            "architecture is 'auto' but no diffusion model file (dit) was given to find it from; "
            f"set architecture to one of {', '.join(ARCHITECTURES)}"
        )
    checkpoint = open_checkpoint(pipeline_part(dit, "transformer"))
    for architecture in ARCHITECTURES.values():
        if architecture.recognises(checkpoint):
            return architecture
    raise CheckpointError(
        f"{dit}: this is {file_kinds.describe(checkpoint.keys())}, not a diffusion model of a "
        f"supported family ({', '.join(ARCHITECTURES)})"
    )
