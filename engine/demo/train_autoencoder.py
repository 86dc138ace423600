"""Trains the tiny model's autoencoder: TAESD's architecture with 16 latent channels.

Between encoder and decoder the latents are normalised with fixed statistics, which are measured
again on the base model's pictures a few times during training (the decoder's first layer is
adapted, so its input does not jump) and in the end folded into the encoder's last convolution.
The encoder itself then gives latents of zero mean and unit variance. Batch statistics would not
do: a batch of flat pictures is too far from the average, and training stalls.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import seeds
from ..media import to_tensor
from .pictures import Picture
from .scenes import draw_scene

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
_LEARNING_RATE = 1e-3
_LATENT_NOISE = 0.15  # about what the base model gets wrong
_MEASURE_AT = (0.05, 0.2, 0.4, 0.6, 0.8)  # shares of all steps
# Most of training is on cut-out quarters, four times as many per step. The rest is on whole
# pictures, in which most places are further from a border than in any quarter.
_CROP = 32
_WHOLE_FROM = 0.8  # share of all steps


class _LatentNorm(nn.Module):
    """``(latents - mean) / std`` per channel, with statistics that are set from outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = torch.zeros(1, channels, 1, 1)
        self.std = torch.ones(1, channels, 1, 1)

    def forward(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std


def train_autoencoder(
    pictures: Sequence[Picture], *, steps: int, batch_size: int = 3, seed: int = 0
) -> nn.Module:
    """A diffusers ``AutoencoderTiny`` whose latents are normalised for ``pictures``.

    Half of every batch are jittered ``pictures``, half are `scenes.draw_scene`. ``batch_size``
    counts whole pictures.
    """
    from diffusers import AutoencoderTiny

    torch.manual_seed(seeds.derive(seed, "autoencoder"))
    model: Any = AutoencoderTiny(latent_channels=LATENT_CHANNELS)
    _initialise(model)
    model = model.to(memory_format=torch.channels_last)
    norm = _LatentNorm(LATENT_CHANNELS)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    chance = random.Random(seeds.derive(seed, "autoencoder pictures"))
    measure_at = {int(steps * share) for share in _MEASURE_AT}
    average = 0.0
    for step in range(steps):
        if step in measure_at:
            _measure(model, norm, pictures, chance)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * one_cycle(step / steps)
        if step < _WHOLE_FROM * steps:
            images = _crop(_batch(pictures, chance, 4 * batch_size), chance)
        else:
            images = _batch(pictures, chance, batch_size)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):  # nearly twice as fast where the CPU has it
            latents = norm(model.encoder(images))
            restored = model.decoder(latents + _LATENT_NOISE * torch.randn_like(latents))
        loss, error = _loss(restored.float(), images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = 0.99 * average + 0.01 * error.item()
        if step % 200 == 199 or step == steps - 1:
            logger.info("autoencoder step %d of %d: error %.4f", step + 1, steps, average)
    _measure(model, norm, pictures, chance)
    _fold(model, norm)
    return model.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)


def images_of(pictures: Sequence[Picture], chance: random.Random | None) -> Tensor:
    """Drawn pictures as a batch [B, 3, H, W] in [-1, 1]; jittered if ``chance`` is given."""
    return torch.stack([to_tensor(picture.draw(chance)) for picture in pictures])


def _batch(pictures: Sequence[Picture], chance: random.Random, size: int) -> Tensor:
    num_scenes = size // 2
    base = images_of(chance.choices(pictures, k=size - num_scenes), chance)
    scenes = torch.stack([to_tensor(draw_scene(chance)) for _ in range(num_scenes)])
    return torch.cat([base, scenes])


def _crop(images: Tensor, chance: random.Random) -> Tensor:
    """A square of `_CROP` pixels from each image, at a random place."""
    crops: list[Tensor] = []
    for image in images:
        top, left = (chance.randint(0, size - _CROP) for size in image.shape[-2:])
        crops.append(image[:, top : top + _CROP, left : left + _CROP])
    return torch.stack(crops)


def _loss(restored: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """What is minimised, and the mean absolute error of pixels in [-1, 1].

    Squared error finds the colours early, absolute error and the error of differences between
    neighbours make edges crisp.
    """
    error = restored - images
    absolute = error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.square().mean() + 0.5 * absolute + 0.25 * edges, absolute.detach()


def one_cycle(progress: float) -> float:
    """Rise over the first 5 %, then a half cosine down to 1 %."""
    if progress < 0.05:
        return progress / 0.05
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def _initialise(model: nn.Module) -> None:
    """He initialisation with weak residual branches; the default one starts very slowly."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        branch = getattr(module, "conv", None)
        if isinstance(branch, nn.Sequential):
            last: Any = branch[-1]
            last.weight.data.mul_(0.2)


@torch.no_grad()
def _measure(
    model: Any, norm: _LatentNorm, pictures: Sequence[Picture], chance: random.Random
) -> None:
    """Set the statistics to those of some pictures and let the decoder expect the new ones."""
    batches = [chance.choices(pictures, k=64) for _ in range(8)]
    latents = torch.cat([model.encoder(images_of(batch, chance)) for batch in batches])
    mean = latents.mean(dim=(0, 2, 3)).view(1, -1, 1, 1)
    std = latents.std(dim=(0, 2, 3)).view(1, -1, 1, 1)
    first = model.decoder.layers[0]
    move = (mean - norm.mean) / norm.std
    first.bias.add_((first.weight * move).sum(dim=(1, 2, 3)))
    first.weight.mul_(std / norm.std)
    norm.mean, norm.std = mean, std


@torch.no_grad()
def _fold(model: Any, norm: _LatentNorm) -> None:
    """Make the encoder's last convolution do what ``norm`` did."""
    last = model.encoder.layers[-1]
    last.weight.div_(norm.std.view(-1, 1, 1, 1))
    last.bias.sub_(norm.mean.flatten()).div_(norm.std.flatten())
