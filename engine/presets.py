"""Settings that are chosen together under one name. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What it is good for, in a few words, and the settings it stands for."""

    help: str
    settings: dict[str, Any]


MEMORY_PRESETS: dict[str, Preset] = {
    "balanced": Preset(
        "activations are computed again when they are needed: one more forward pass a step, "
        "far less memory",
        {"gradient_checkpointing": True},
    ),
    "fastest": Preset(
        "everything stays in memory; for small pictures or large GPUs",
        {"gradient_checkpointing": False},
    ),
}
