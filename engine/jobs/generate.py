"""Prompts -> pictures, with the settings that made each in its PNG.

Encoders, transformer and decoder are in memory one after the other, never together.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import flow, hardware, lora, lora_file, media, samplers
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..atomic_file import replacing
from ..autoencoders import ImageAutoencoder
from ..config import Config, GenerateConfig
from ..errors import ConfigError, DataError
from ..events import Finished, Progress, Reporter, Saved
from ..signals import Stopped, StopSignals
from .cache import load_text_encoders
from .outputs import explained


def run(config: Config, report: Reporter) -> list[Path]:
    """Write one PNG per prompt into ``save_path``; gives their paths.

    The noise of every prompt comes from ``seed`` alone, drawn on the CPU in float32, so the same
    settings give the same picture whatever else is generated.

    Raises:
        EngineError: a setting or file cannot be used.
        Stopped: a signal ended the job; finished pictures are written.
    """
    config.require("dit", "vae", "text_encoder1", "text_encoder2", "save_path")
    prompts = _prompts(config.generate)
    hardware.use_threads(config.runtime.cpu_threads)
    width, height = config.generate.image_size
    finished: list[Tensor] = []
    with StopSignals() as stop:
        architecture = find_architecture(config.model.architecture, config.model.dit)
        _check_size(width, height, architecture)
        device = hardware.find_device(config.runtime.device)
        conditions = _text_conditions(config, architecture, prompts, device)
        controls = _control_conditions(config, architecture, device)
        conditions = [item | controls for item in conditions]
        try:
            for latents in _sampled(config, architecture, conditions, device, report):
                finished.append(latents)
            stop.hold()
        except Stopped:
            if not finished:
                raise
        paths = _decode_all(config, architecture, prompts, finished, device, report)
    report(Finished("generate", stopped=len(paths) < len(prompts)))
    if len(paths) < len(prompts):
        raise Stopped(f"stopped after {len(paths)} of {len(prompts)} pictures, which are saved")
    return paths


@dataclass(frozen=True)
class SamplingSettings:
    """``num_steps`` model calls along a time grid moved towards noise by ``shift``."""

    num_steps: int
    shift: float
    guidance: float


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


def load_with_loras(config: Config, architecture: Architecture, device: torch.device) -> nn.Module:
    """The transformer with every ``lora_weight`` merged at its multiplier."""
    assert config.model.dit is not None
    dtype = hardware.DTYPES[config.training.mixed_precision]
    transformer = architecture.load_transformer(config.model.dit, dtype=dtype, device=device)
    linears = architecture.published_linears(transformer)
    shapes = lora.linear_shapes(transformer, linears)
    for path, multiplier in config.generate.loras:
        lora.merge(transformer, linears, lora_file.load_lora(path, shapes), multiplier=multiplier)
    return transformer


def _prompts(settings: GenerateConfig) -> list[str]:
    prompts = list(settings.prompt)
    if settings.from_file:
        try:
            lines = settings.from_file.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{settings.from_file}: the prompts cannot be read: {error}") from None
        prompts += [line.strip() for line in lines if line.strip() and line.lstrip()[0] != "#"]
    if not prompts:
        raise ConfigError("nothing to generate: give --prompt or --from_file with a prompt a line")
    return prompts


def _check_size(width: int, height: int, architecture: Architecture) -> None:
    step = architecture.pixel_multiple
    if width % step or height % step:
        nearest = (
            f"{max(step, round(width / step) * step)} {max(step, round(height / step) * step)}"
        )
        raise ConfigError(
            f"image_size = {width} {height}: both sides must be multiples of {step}; "
            f"the nearest is {nearest}"
        )


def _text_conditions(
    config: Config, architecture: Architecture, prompts: Sequence[str], device: torch.device
) -> list[dict[str, Tensor]]:
    """Conditions [1, ...] of each prompt; the encoders are gone afterwards."""
    encoders = load_text_encoders(config, architecture, device)
    length = config.dataset.text_max_length
    # One at a time: in a batch the last bits of an embedding may depend on the other texts.
    encoded = [architecture.encode_text(encoders, [prompt], length)[0] for prompt in prompts]
    return [{name: tensor[None] for name, tensor in item.items()} for item in encoded]


def _control_conditions(
    config: Config, architecture: Architecture, device: torch.device
) -> dict[str, Tensor]:
    """Latents of the control images, each at about the area of the picture to make."""
    paths = config.generate.control_image_path
    if not paths:
        return {}
    autoencoder = _autoencoder(config, architecture, device)
    width, height = config.generate.image_size
    controls: dict[str, Tensor] = {}
    for index, path in enumerate(paths):
        image = media.load_image(path)
        ratio = (width * height / (image.width * image.height)) ** 0.5
        step = architecture.pixel_multiple
        size = tuple(max(step, round(side * ratio / step) * step) for side in image.size)
        pixels = media.to_tensor(media.resize_to_bucket(image, (size[0], size[1])))
        controls[f"control_latents_{index}"] = autoencoder.encode(pixels[None])
    return controls


def _autoencoder(
    config: Config, architecture: Architecture, device: torch.device
) -> ImageAutoencoder:
    assert config.model.vae is not None
    dtype = hardware.stored_or(config.model.vae_dtype)
    return architecture.load_autoencoder(config.model.vae, dtype=dtype, device=device)


def _sampled(
    config: Config,
    architecture: Architecture,
    conditions: Sequence[dict[str, Tensor]],
    device: torch.device,
    report: Reporter,
) -> Iterator[Tensor]:
    """Latents for each of the conditions."""
    settings = config.generate
    width, height = settings.image_size
    transformer = load_with_loras(config, architecture, device)
    noise = initial_noise(architecture, width=width, height=height, seed=config.runtime.seed)
    sampling = SamplingSettings(
        settings.infer_steps, _shift(config, architecture), settings.embedded_cfg_scale
    )
    clock = _Clock(len(conditions) * settings.infer_steps, report)
    for item in conditions:
        yield sample(
            architecture,
            transformer,
            noise.to(device),
            {name: tensor.to(device) for name, tensor in item.items()},
            sampling,
            lambda step, latents: clock.tick(),
        )


def _shift(config: Config, architecture: Architecture) -> float:
    """The shift that is asked for, or the family's for the size of the picture."""
    width, height = config.generate.image_size
    scale = architecture.pixels_per_latent
    own = architecture.timestep_shift(height // scale, width // scale)
    return config.generate.flow_shift or own


class _Clock:
    """Reports sampling steps with the time left."""

    def __init__(self, total: int, report: Reporter) -> None:
        self._total, self._report, self._done = total, report, 0
        self._first = 0.0

    def tick(self) -> None:
        now = time.perf_counter()
        self._first = self._first or now
        self._done += 1
        seconds = (now - self._first) / (self._done - 1) if self._done > 1 else None
        self._report(
            Progress(
                "generate",
                self._done,
                self._total,
                step_seconds=seconds,
                eta_seconds=None if seconds is None else seconds * (self._total - self._done),
            )
        )


def _decode_all(
    config: Config,
    architecture: Architecture,
    prompts: Sequence[str],
    latents: Sequence[Tensor],
    device: torch.device,
    report: Reporter,
) -> list[Path]:
    """Write the pictures of the first prompts, as many as there are latents."""
    autoencoder = _autoencoder(config, architecture, device)
    folder = config.generate.save_path
    assert folder is not None
    paths: list[Path] = []
    failed: list[str] = []
    for prompt, latent in zip(prompts, latents, strict=False):
        if not latent.isfinite().all():
            failed.append(prompt)
            continue
        image = media.to_image(autoencoder.decode(latent)[0])
        path = _free_path(folder, prompt, config.runtime.seed)
        with explained(path), replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=_png_info(config, architecture, prompt))
        report(Saved(str(path), "image"))
        paths.append(path)
    if failed:
        raise DataError(
            f"the model gave NaN or infinite latents for {', '.join(map(repr, failed))}; try "
            "mixed_precision = 'no' or a lower LoRA multiplier"
        )
    return paths


def _free_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name a person recognises, with a number when it is taken."""
    # 50 letters are at most 200 of the 255 bytes that a name may have.
    words = re.sub(r"[^\w]+", "_", prompt).strip("_")[:50] or "picture"
    number = 1
    while (path := folder / f"{words}_{seed}_{number:02d}.png").exists():
        number += 1
    return path


def _png_info(config: Config, architecture: Architecture, prompt: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    settings = config.generate
    facts = {
        "prompt": prompt,
        "seed": config.runtime.seed,
        "architecture": architecture.name,
        "model": config.model.dit.name if config.model.dit else None,
        "width": settings.image_size[0],
        "height": settings.image_size[1],
        "steps": settings.infer_steps,
        "sampler": "euler",
        "guidance": settings.embedded_cfg_scale,
        "flow_shift": _shift(config, architecture),
        "mixed_precision": config.training.mixed_precision,
        "loras": [{"file": path.name, "multiplier": value} for path, value in settings.loras],
        "control_images": [path.name for path in settings.control_image_path],
    }
    info = PngInfo()
    info.add_text("lora_loom", json.dumps(facts, ensure_ascii=False))
    return info
