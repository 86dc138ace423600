"""Trains the tiny model's transformer together with its text encoders, from scratch."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import flow, seeds
from ..architectures.flux_kontext import FluxKontext
from . import text
from .pictures import Picture, edit
from .train_autoencoder import images_of, one_cycle

logger = logging.getLogger(__name__)

_EDGE = 1e-7  # draws are kept this far from 0 and 1, where the quantile is infinite
ARCHITECTURE = FluxKontext()
_LEARNING_RATE = 2e-3
_EDIT_SHARE = 0.2  # of all steps; these have a control image
_NUM_TEMPLATES = 3


@dataclass(frozen=True)
class BaseModel:
    """The trained parts, float32."""

    transformer: nn.Module
    t5: nn.Module
    clip: nn.Module
    t5_tokenizer: Any
    clip_tokenizer: Any


def build_model(pictures: Sequence[Picture], seed: int) -> BaseModel:
    """Untrained parts: 2 double and 4 single blocks of width 128 with one head."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seeds.derive(seed, "base"))
    captions = [p.caption(index % _NUM_TEMPLATES) for index, p in enumerate(pictures)]
    chance = random.Random(seeds.derive(seed, "base captions"))
    captions += [found[1] for p in pictures[::7] if (found := edit(p, chance))]
    t5_tokenizer, clip_tokenizer = text.t5_tokenizer(captions), text.clip_tokenizer(captions)
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )
    # Zero outputs at the start, as the published training code of this family of models does.
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return BaseModel(
        transformer,
        text.t5_model(len(t5_tokenizer)),
        text.clip_model(len(clip_tokenizer)),
        t5_tokenizer,
        clip_tokenizer,
    )


def train_base(
    autoencoder: nn.Module,
    pictures: Sequence[Picture],
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
) -> BaseModel:
    """Flow matching on the autoencoder's latents of ``pictures``."""
    model = build_model(pictures, seed)
    latents = _encode(autoencoder, pictures, seed)
    parts = (model.transformer, model.t5, model.clip)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    batches = _Batches(pictures, latents, batch_size, seed)
    generator = seeds.generator(seed, "base draws")
    average = 1.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * one_cycle(step / steps)
        target, captions, control = batches.draw()
        with torch.autocast("cpu", torch.bfloat16):  # half the time where the CPU has it
            conditions = _encode_text(model, captions)
            conditions["guidance"] = torch.empty(len(captions)).uniform_(1, 5, generator=generator)
            if control is not None:
                conditions["control_latents_0"] = control
            loss = _loss(model.transformer, target, conditions, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average = 0.99 * average + 0.01 * loss.item()
        if step % 200 == 199 or step == steps - 1:
            logger.info("base step %d of %d: flow loss %.4f", step + 1, steps, average)
    for part in parts:
        part.requires_grad_(False).eval()
    return model


def _loss(
    transformer: nn.Module,
    latents: Tensor,
    conditions: dict[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Flow-matching loss at times drawn as for fine-tuning this family."""
    draws_B = torch.rand(latents.shape[0], generator=generator)
    # As flux_shift, but in float32: the stored model comes out again bit for bit.
    normal_B = torch.special.ndtri(draws_B.clamp(_EDGE, 1 - _EDGE))
    shift = ARCHITECTURE.timestep_shift(*latents.shape[-2:])
    t_B = flow.shift_time(torch.sigmoid(normal_B), shift)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = flow.noisy_latents(latents, noise, t_B)
    velocity = ARCHITECTURE.predict_velocity(transformer, noisy, t_B, conditions)
    return nn.functional.mse_loss(velocity.float(), flow.velocity_target(latents, noise))


def _encode_text(model: BaseModel, captions: list[str]) -> dict[str, Tensor]:
    """As `text_encoders` does, but with gradients."""
    ids = [
        tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        for tokenizer, length in (
            (model.t5_tokenizer, text.T5_TOKENS),
            (model.clip_tokenizer, text.CLIP_TOKENS),
        )
    ]
    return {
        "text_embeds": model.t5(ids[0]).last_hidden_state,
        "pooled": model.clip(ids[1]).pooler_output,
    }


@torch.no_grad()
def _encode(autoencoder: Any, pictures: Sequence[Picture], seed: int) -> Tensor:
    """Latents [pictures, C, 1, h, w] of jittered drawings."""
    chance = random.Random(seeds.derive(seed, "base pictures"))
    parts: list[Tensor] = []
    for start in range(0, len(pictures), 64):
        images = images_of(pictures[start : start + 64], chance)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(autoencoder.encoder(images).float()[:, :, None])
    logger.info("encoded %d pictures", len(pictures))
    return torch.cat(parts)


class _Batches:
    """Random batches of latents and captions, some with a control image to change."""

    def __init__(
        self, pictures: Sequence[Picture], latents: Tensor, batch_size: int, seed: int
    ) -> None:
        self._pictures = pictures
        self._latents = latents
        self._batch_size = batch_size
        self._position = {picture: index for index, picture in enumerate(pictures)}
        self._chance = random.Random(seeds.derive(seed, "base batches"))

    def draw(self) -> tuple[Tensor, list[str], Tensor | None]:
        """Target latents [B, C, 1, h, w], captions, and control latents of an editing batch."""
        if self._chance.random() < _EDIT_SHARE:
            return self._edits()
        chosen = self._chance.choices(self._pictures, k=self._batch_size)
        captions = [p.caption(self._chance.randrange(_NUM_TEMPLATES)) for p in chosen]
        return self._latents_of(chosen), captions, None

    def _edits(self) -> tuple[Tensor, list[str], Tensor]:
        before: list[Picture] = []
        after: list[Picture] = []
        captions: list[str] = []
        while len(before) < self._batch_size:
            picture = self._chance.choice(self._pictures)
            if found := edit(picture, self._chance):
                before.append(picture)
                after.append(found[0])
                captions.append(found[1])
        return self._latents_of(after), captions, self._latents_of(before)

    def _latents_of(self, chosen: Sequence[Picture]) -> Tensor:
        return self._latents[[self._position[picture] for picture in chosen]]
