"""Prompts -> pictures, with the settings that made each in its PNG.

Encoders, transformer and decoder are in memory one after the other, never together.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import hardware, prompts
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config, GenerateConfig
from ..errors import ConfigError, DataError
from ..events import Finished, Progress, Reporter, Saved, silent
from ..signals import Stopped, StopSignals
from . import step_cache
from .cache import load_text_encoders
from .model import check, load_transformer
from .picture import (
    SamplingSettings,
    check_size,
    control_pixels,
    initial_noise,
    load_autoencoder,
    picture_facts,
    sample,
    sampling_settings,
    save_picture,
)

__all__ = ["SamplingSettings", "initial_noise", "load_with_loras", "run", "sample"]


def run(config: Config, report: Reporter) -> list[Path]:
    """Write one PNG per prompt into ``save_path``; gives their paths.

    The noise of every prompt comes from ``seed`` alone, drawn on the CPU in float32, so the same
    settings give the same picture whatever else is generated.

    Raises:
        EngineError: a setting or file cannot be used.
        Stopped: a signal ended the job; finished pictures are written.
    """
    config.require("dit", "vae", "text_encoder1", "text_encoder2", "save_path")
    check(config, trains=False)
    step_cache.check(config)
    texts = _prompts(config.generate)
    hardware.use_threads(config.runtime.cpu_threads)
    width, height = config.generate.image_size
    finished: list[Tensor] = []
    with StopSignals() as stop:
        architecture = find_architecture(config.model.architecture, config.model.dit)
        check_size((width, height), architecture, f"image_size = {width} {height}")
        device = hardware.find_device(config.runtime.device)
        conditions = _text_conditions(config, architecture, texts, device)
        controls = _control_conditions(config, architecture, device)
        conditions = [item | controls for item in conditions]
        try:
            for latents in _sampled(config, architecture, conditions, device, report):
                finished.append(latents)
            stop.hold()
        except Stopped:
            if not finished:
                raise
        paths = _decode_all(config, architecture, texts, finished, device, report)
    report(Finished("generate", stopped=len(paths) < len(texts)))
    if len(paths) < len(texts):
        raise Stopped(f"stopped after {len(paths)} of {len(texts)} pictures, which are saved")
    return paths


def load_with_loras(
    config: Config, architecture: Architecture, device: torch.device, report: Reporter = silent
) -> nn.Module:
    """The transformer with every ``lora_weight`` merged at its multiplier."""
    return load_transformer(config, architecture, device, report, loras=config.generate.loras)


def _prompts(settings: GenerateConfig) -> list[str]:
    texts = list(settings.prompt)
    if settings.from_file:
        texts += prompts.read_lines(settings.from_file)
    if not texts:
        raise ConfigError("nothing to generate: give --prompt or --from_file with a prompt a line")
    return texts


def _text_conditions(
    config: Config, architecture: Architecture, texts: Sequence[str], device: torch.device
) -> list[dict[str, Tensor]]:
    """Conditions [1, ...] of each prompt; the encoders are gone afterwards."""
    encoders = load_text_encoders(config, architecture, device)
    length = config.dataset.text_max_length
    # One at a time: in a batch the last bits of an embedding may depend on the other texts.
    encoded = [architecture.encode_text(encoders, [text], length)[0] for text in texts]
    return [{name: tensor[None] for name, tensor in item.items()} for item in encoded]


def _control_conditions(
    config: Config, architecture: Architecture, device: torch.device
) -> dict[str, Tensor]:
    """Latents of the control images, each at about the area of the picture to make."""
    paths = config.generate.control_image_path
    if not paths:
        return {}
    autoencoder = load_autoencoder(config, architecture, device)
    width, height = config.generate.image_size
    controls: dict[str, Tensor] = {}
    for index, path in enumerate(paths):
        pixels = control_pixels(path, width * height, architecture)
        controls[f"control_latents_{index}"] = autoencoder.encode(pixels[None])
    return controls


def _sampled(
    config: Config,
    architecture: Architecture,
    conditions: Sequence[dict[str, Tensor]],
    device: torch.device,
    report: Reporter,
) -> Iterator[Tensor]:
    """Latents for each of the conditions."""
    width, height = config.generate.image_size
    transformer = load_with_loras(config, architecture, device, report)
    noise = initial_noise(architecture, width=width, height=height, seed=config.runtime.seed)
    sampling = sampling_settings(config.generate, architecture, (width, height))
    cache = step_cache.step_cache(config, architecture, transformer, sampling, report)
    clock = _Clock(len(conditions) * sampling.num_steps, report)
    for item in conditions:
        with cache.one_run():
            latents = sample(
                architecture,
                transformer,
                noise.to(device),
                {name: tensor.to(device) for name, tensor in item.items()},
                sampling,
                lambda step, latents: clock.tick(),
            )
        yield latents
    cache.finish()


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
    texts: Sequence[str],
    latents: Sequence[Tensor],
    device: torch.device,
    report: Reporter,
) -> list[Path]:
    """Write the pictures of the first prompts, as many as there are latents."""
    autoencoder = load_autoencoder(config, architecture, device)
    settings = config.generate
    assert settings.save_path is not None
    paths: list[Path] = []
    failed: list[str] = []
    for prompt, latent in zip(texts, latents, strict=False):
        if not latent.isfinite().all():
            failed.append(prompt)
            continue
        path = _free_path(settings.save_path, prompt, config.runtime.seed)
        facts = picture_facts(
            config,
            architecture,
            prompt=prompt,
            seed=config.runtime.seed,
            size=settings.image_size,
            sampling=sampling_settings(settings, architecture, settings.image_size),
            controls=settings.control_image_path,
        )
        facts["loras"] = [
            {"file": file.name, "multiplier": value} for file, value in settings.loras
        ]
        save_picture(path, autoencoder.decode(latent)[0], facts)
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
