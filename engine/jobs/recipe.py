"""The settings that decide the result of a training; a run is only continued with the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import training_state
from ..architectures.base import Architecture
from ..config import FIELDS, Config, NetworkConfig, QuantizationConfig
from ..errors import ConfigError
from ..weights import fingerprint

_OF_TRAINING = ("gradient_accumulation_steps", "mixed_precision")
_OF_COMPILER = ("dynamo_backend", "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic")


def recipe_of(config: Config, architecture: Architecture, num_processes: int) -> dict[str, Any]:
    """What decides the result, by flat name."""
    named = (*_OF_TRAINING, *_OF_COMPILER, "batch_size", "seed")
    return {
        "architecture": architecture.name,
        **_network(config.network),
        **_quantization(config.quantization),
        **config.optimizer.model_dump(mode="json"),
        **config.timesteps.model_dump(mode="json"),
        **config.loss.model_dump(mode="json"),
        **{name: config.value(name) for name in named},
        "num_processes": num_processes,
    }


def _quantization(wanted: QuantizationConfig) -> dict[str, Any]:
    """What decides the weights; the rest says where and for which job."""
    others = {"fp8", "fp8_base", "quantized_cache"}
    return wanted.model_dump(mode="json", exclude=others)


def _network(network: NetworkConfig) -> dict[str, Any]:
    """Files by what is in them, and arguments in one spelling."""
    given = network.arguments.model_dump(exclude_defaults=True, exclude={"verbose"})
    start = network.network_weights
    return {
        **network.model_dump(mode="json"),
        "network_args": [f"{name}={value!r}" for name, value in sorted(given.items())],
        "network_weights": None if start is None else fingerprint(start),
        "base_weights": [fingerprint(path) for path, _ in network.base_loras],
        "base_weights_multiplier": [multiplier for _, multiplier in network.base_loras],
    }


def saved_progress(state: Path, recipe: dict[str, Any]) -> training_state.Progress:
    """What a saved state, which must be of the same recipe, says of itself.

    Raises:
        CheckpointError: the file is no state.
        ConfigError: it was made with other settings.
    """
    saved = training_state.read_progress(state)
    # A setting that came with a later version had its default before.
    defaults = {name: FIELDS[name].default for name in recipe if name in FIELDS}
    differences = training_state.recipe_differences(defaults | saved.recipe, recipe)
    if differences:
        raise ConfigError(
            f"{state}: the run was made with other settings: {'; '.join(differences)}; "
            "restore them, or start a new run under another output_name"
        )
    return saved
