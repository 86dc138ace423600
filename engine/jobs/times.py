"""The training times that the settings ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import timesteps
from ..architectures.base import Architecture
from ..config import Config, TimestepConfig
from ..dataset import CachedItem
from ..errors import ConfigError
from .step import SampleTimes


def sampling_of(config: TimestepConfig, architecture: Architecture) -> str:
    """``timestep_sampling``, with the family's own choice for auto."""
    name = config.timestep_sampling
    return architecture.default_timestep_sampling if name == "auto" else name


def sample_times(config: TimestepConfig, architecture: Architecture) -> SampleTimes:
    """Uniform draws -> flow times."""
    name, settings = sampling_of(config, architecture), timestep_settings(config)

    def sample(draws_B: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return timesteps.sample_times(name, draws_B, settings, latent_size=(height, width))

    return sample


def timestep_settings(config: TimestepConfig) -> timesteps.TimestepSettings:
    """The settings as the distributions take them."""
    return timesteps.TimestepSettings(
        scale=config.sigmoid_scale,
        shift=config.discrete_flow_shift,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        mode_scale=config.mode_scale,
        weighting=config.weighting_scheme,
        low=config.min_timestep / 1000,
        high=config.max_timestep / 1000,
        keep_shape=config.preserve_distribution_shape,
    )


def check_times(config: Config, architecture: Architecture, items: Sequence[CachedItem]) -> None:
    """Before anything is loaded: is there a time to train at?

    Raises:
        ConfigError: the range holds none.
    """
    sample = sample_times(config.timesteps, architecture)
    sizes = {shape[-2:] for item in items for name, shape in item.shapes if name == "latents"}
    try:
        for height, width in sizes:
            sample(torch.tensor([0.5]), height, width)
    except ValueError as error:
        raise ConfigError(
            f"min_timestep, max_timestep: {error}; widen the range, or turn "
            "preserve_distribution_shape off"
        ) from None
