"""Draws with the tiny model as it lies on disk, and scores what it drew.

Everything runs in float32 through the same code that loads and samples large models.
"""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from .. import media, seeds
from ..architectures.flux_kontext import FluxKontext, FluxTextEncoders
from ..autoencoders import ImageAutoencoder
from ..jobs.generate import SamplingSettings, initial_noise, sample
from . import measure
from .pictures import SIDE, Picture, all_pictures

logger = logging.getLogger(__name__)

ARCHITECTURE = FluxKontext()
# Where the parts lie in the model's folder.
TRANSFORMER = Path("transformer", "flux1-kontext-tiny.safetensors")
AUTOENCODER = Path("vae", "ae.safetensors")
T5, T5_TOKENIZER = Path("text_encoder_2"), Path("tokenizer_2")
CLIP, CLIP_TOKENIZER = Path("text_encoder"), Path("tokenizer")

_NUM_STEPS = 24
_GUIDANCE = 2.5  # the model does not depend on it
_MAX_TOKENS = 512  # the tokenizer's own limit is smaller


@dataclass(frozen=True)
class TinyModel:
    """All parts, loaded."""

    transformer: nn.Module
    autoencoder: ImageAutoencoder
    text_encoders: FluxTextEncoders


@dataclass(frozen=True)
class Score:
    """How well pictures fit what they should show.

    ``colours`` and ``backgrounds`` are the shares with the right one; ``overlaps`` are
    intersections over union with the ideal shapes, one per picture.
    """

    colours: float
    backgrounds: float
    overlaps: list[float]

    @property
    def median_overlap(self) -> float:
        """Half of the pictures have at least this intersection over union."""
        return statistics.median(self.overlaps)


def load_model(folder: Path) -> TinyModel:
    """The tiny model of `make` from its folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    dtype = torch.float32
    return TinyModel(
        ARCHITECTURE.load_transformer(folder / TRANSFORMER, dtype=dtype),
        ARCHITECTURE.load_autoencoder(folder / AUTOENCODER, dtype=dtype),
        ARCHITECTURE.load_text_encoders(
            folder / T5,
            folder / CLIP,
            folder / T5_TOKENIZER,
            folder / CLIP_TOKENIZER,
            dtype=dtype,
        ),
    )


def draw(
    model: TinyModel,
    captions: Sequence[str],
    *,
    seed: int,
    controls: Sequence[Image.Image] = (),
    num_steps: int = _NUM_STEPS,
) -> list[Image.Image]:
    """One picture per caption, the noise of the i-th from ``seed + i``.

    ``controls`` are empty or one picture per caption that the caption asks to change.
    """
    noise = torch.cat(
        [
            initial_noise(ARCHITECTURE, width=SIDE, height=SIDE, seed=seed + index)
            for index in range(len(captions))
        ]
    )
    encoded = ARCHITECTURE.encode_text(model.text_encoders, list(captions), _MAX_TOKENS)
    conditions = {name: torch.stack([item[name] for item in encoded]) for name in encoded[0]}
    if controls:
        pixels = torch.stack([media.to_tensor(control) for control in controls])
        conditions["control_latents_0"] = model.autoencoder.encode(pixels)
    shift = ARCHITECTURE.timestep_shift(*noise.shape[-2:])
    settings = SamplingSettings(num_steps, shift, _GUIDANCE)
    latents = sample(ARCHITECTURE, model.transformer, noise, conditions, settings)
    return [media.to_image(pixels) for pixels in model.autoencoder.decode(latents)]


def held_out_pictures(count: int, *, seed: int) -> list[Picture]:
    """A random choice of the combinations that the base model was never trained on."""
    held_out = [picture for picture in all_pictures() if picture.held_out]
    return random.Random(seeds.derive(seed, "held-out pictures")).sample(held_out, count)


def score(images: Sequence[Image.Image], pictures: Sequence[Picture]) -> Score:
    """Compare drawn ``images`` with the ``pictures`` that they should show."""
    pairs = list(zip(images, pictures, strict=True))
    colours = sum(measure.colour_name(i, p.background) == p.colour for i, p in pairs)
    backgrounds = sum(measure.background_name(i) == p.background for i, p in pairs)
    overlaps = [measure.overlap(image, picture) for image, picture in pairs]
    return Score(colours / len(pairs), backgrounds / len(pairs), overlaps)
