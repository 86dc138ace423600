"""One picture: its size, noise, sampling, decoding, and the file that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import flow, hardware, media, samplers
from ..architectures.base import Architecture
from ..atomic_file import replacing
from ..autoencoders import ImageAutoencoder
from ..config import Config, GenerateConfig
from ..errors import ConfigError
from .outputs import explained


@dataclass(frozen=True)
class SamplingSettings:
    """``num_steps`` model calls along a time grid moved towards noise by ``shift``."""

    num_steps: int
    shift: float
    guidance: float


def sampling_settings(
    settings: GenerateConfig, architecture: Architecture, size: tuple[int, int]
) -> SamplingSettings:
    """The settings for pictures of this size; the shift is the family's if none is asked for."""
    scale = architecture.pixels_per_latent
    own = architecture.timestep_shift(size[1] // scale, size[0] // scale)
    return SamplingSettings(
        settings.infer_steps, settings.flow_shift or own, settings.embedded_cfg_scale
    )


def initial_noise(architecture: Architecture, *, width: int, height: int, seed: int) -> Tensor:
    """Noise [1, C, 1, h, w] for a picture of this many pixels; the numbers ComfyUI draws too."""
    scale = architecture.pixels_per_latent
    shape = (1, architecture.latent_channels, 1, height // scale, width // scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    architecture: Architecture,
    transformer: nn.Module,
    noise: Tensor,
    conditions: dict[str, Tensor],
    settings: SamplingSettings,
    on_step: samplers.OnStep | None = None,
) -> Tensor:
    """Latents [B, C, 1, h, w] from noise of that shape and the conditions of a batch."""
    batch = noise.shape[0]
    conditions = conditions | {
        "guidance": torch.full((batch,), settings.guidance, device=noise.device)
    }

    def velocity(latents: Tensor, t: float) -> Tensor:
        t_B = torch.full((batch,), t, device=latents.device)
        return architecture.predict_velocity(transformer, latents, t_B, conditions)

    times = flow.sampling_times(settings.num_steps, settings.shift)
    return samplers.euler(velocity, noise, times, on_step)


def check_size(size: tuple[int, int], architecture: Architecture, where: str) -> None:
    """Check that the family can draw pictures of this width and height.

    Raises:
        ConfigError: begins with ``where``, names the nearest size that it can.
    """
    step = architecture.pixel_multiple
    if any(side % step for side in size):
        width, height = (max(step, round(side / step) * step) for side in size)
        raise ConfigError(
            f"{where}: both sides must be multiples of {step}; the nearest is {width} {height}"
        )


def control_pixels(path: Path, area: int, architecture: Architecture) -> Tensor:
    """Pixels [3, H, W] of a control image in its own shape, at about ``area`` pixels.

    Raises:
        DataError: the file cannot be read as an image.
    """
    image = media.load_image(path)
    ratio = (area / (image.width * image.height)) ** 0.5
    step = architecture.pixel_multiple
    width, height = (max(step, round(side * ratio / step) * step) for side in image.size)
    return media.to_tensor(media.resize_to_bucket(image, (width, height)))


def load_autoencoder(
    config: Config, architecture: Architecture, device: torch.device
) -> ImageAutoencoder:
    """The configured VAE."""
    assert config.model.vae is not None
    dtype = hardware.stored_or(config.model.vae_dtype)
    return architecture.load_autoencoder(config.model.vae, dtype=dtype, device=device)


def save_picture(path: Path, pixels_CHW: Tensor, facts: Mapping[str, object]) -> None:
    """Write a PNG with what it was made from in its text ``lora_loom``.

    Raises:
        EngineError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("lora_loom", json.dumps(facts, ensure_ascii=False))
    image = media.to_image(pixels_CHW)
    with explained(path), replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def picture_facts(
    config: Config,
    architecture: Architecture,
    *,
    prompt: str,
    seed: int,
    size: tuple[int, int],
    sampling: SamplingSettings,
    controls: Sequence[Path],
) -> dict[str, object]:
    """What a picture is made from, for `save_picture`; without the LoRAs."""
    return {
        "prompt": prompt,
        "seed": seed,
        "architecture": architecture.name,
        "model": config.model.dit.name if config.model.dit else None,
        "width": size[0],
        "height": size[1],
        "steps": sampling.num_steps,
        "sampler": "euler",
        "guidance": sampling.guidance,
        "flow_shift": sampling.shift,
        "mixed_precision": config.training.mixed_precision,
        "control_images": [path.name for path in controls],
    }
