"""What a batch is trained towards, and the losses that it gives.

Three things are asked of the model at the same noise: to draw the image (or, for regularization
images, what it would have drawn without the adapters), and, where a caption has a second copy with
the word of the class, to keep doing for that copy what it did without the adapters (differential
output preservation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import flow, losses
from ..config import LossConfig
from ..dataset import CLASS_PREFIX, REGULARIZATION

# flow times [B] -> weights [B]
LossWeight = Callable[[Tensor], Tensor]
# Gives the context in which the model is as it was without adapters and gradients.
WithoutAdapters = Callable[[], AbstractContextManager[None]]
Batch = Mapping[str, Tensor]
_NO_CONDITIONS = ("latents", "mask", REGULARIZATION)


@dataclass(frozen=True)
class Objective:
    """How losses are measured and weighed.

    Args:
        measure: a name of `losses.MEASURES`.
        huber_c: the third argument of the measure.
        noise_offset: as ``offset`` of `flow.draw_noise`.
        unmasked_weight: weight of the loss where a mask is 0.
        prior_weight: weight of regularization images.
        prior_from_model: these are trained towards the model without adapters.
        preservation_weight: weight of the loss of the captions with the word of the class.
    """

    measure: str = "mse"
    huber_c: float = 0.1
    noise_offset: float = 0.0
    unmasked_weight: float = 0.0
    prior_weight: float = 1.0
    prior_from_model: bool = False
    preservation_weight: float = 1.0


PLAIN = Objective()


def objective_of(config: LossConfig) -> Objective:
    """The settings as the losses take them."""
    return Objective(
        measure=config.loss_type,
        huber_c=config.huber_c,
        noise_offset=config.noise_offset,
        unmasked_weight=config.unmasked_weight,
        prior_weight=config.prior_loss_weight,
        prior_from_model=config.regularization_target == "model",
        preservation_weight=config.preservation_weight,
    )


@dataclass(frozen=True)
class NoisyBatch:
    """A batch at its noise levels: what the model is given, and the velocity that is true.

    ``class_conditions`` are the conditions with the captions of the class, if the batch has them;
    ``mask`` is [B, 1, T, H, W].
    """

    noisy_BCTHW: Tensor
    velocity_BCTHW: Tensor
    t_B: Tensor
    conditions: Batch
    class_conditions: Batch | None
    mask: Tensor | None
    is_regularization: bool


def add_noise(
    batch: Batch,
    t_B: Tensor,
    *,
    guidance: float,
    generator: torch.Generator,
    noise_offset: float = 0.0,
) -> NoisyBatch:
    """Mix a batch with noise.

    Args:
        batch: "latents" [B, C, T, H, W], the architecture's conditions, and what `dataset` adds.
        t_B: flow times in [0, 1].
        guidance: value of the guidance embedding.
        generator: draws the noise; on the device of the latents.
        noise_offset: as ``offset`` of `flow.draw_noise`.
    """
    latents = batch["latents"].float()
    noise = flow.draw_noise(latents, generator=generator, offset=noise_offset)
    noisy, velocity = flow.mix(latents, noise, t_B)
    conditions = {
        name: tensor
        for name, tensor in batch.items()
        if name not in _NO_CONDITIONS and not name.startswith(CLASS_PREFIX)
    }
    conditions["guidance"] = torch.full_like(t_B, guidance)
    of_class = {
        name.removeprefix(CLASS_PREFIX): tensor
        for name, tensor in batch.items()
        if name.startswith(CLASS_PREFIX)
    }
    return NoisyBatch(
        noisy_BCTHW=noisy,
        velocity_BCTHW=velocity,
        t_B=t_B,
        conditions=conditions,
        class_conditions=conditions | of_class if of_class else None,
        mask=batch.get("mask"),
        is_regularization=REGULARIZATION in batch,
    )


def sample_losses(
    model: nn.Module,
    given: NoisyBatch,
    objective: Objective,
    without_adapters: WithoutAdapters | None = None,
) -> Tensor:
    """The loss [B] of each sample in float32, before any weight but that of its mask.

    Args:
        model: a `VelocityModel` or its DDP wrapper.
        without_adapters: needed for regularization images that are trained towards the model.
    """
    target = given.velocity_BCTHW
    if given.is_regularization and objective.prior_from_model:
        target = _unadapted(model, given, given.conditions, without_adapters)
    velocity = model(given.noisy_BCTHW, given.t_B, given.conditions).float()
    errors = losses.MEASURES[objective.measure](velocity, target, objective.huber_c)
    if given.mask is None:
        return losses.sample_means(errors)
    weight = losses.mask_weight(given.mask.float(), unmasked=objective.unmasked_weight)
    return losses.sample_means(errors, weight)


def weighted_mean(
    loss_B: Tensor, given: NoisyBatch, objective: Objective, time_weight: LossWeight | None
) -> Tensor:
    """What is minimised for the samples' losses."""
    if time_weight:
        loss_B = loss_B * time_weight(given.t_B)
    loss = loss_B.mean()
    return loss * objective.prior_weight if given.is_regularization else loss


def preservation_loss(
    model: nn.Module,
    given: NoisyBatch,
    objective: Objective,
    without_adapters: WithoutAdapters | None,
) -> Tensor:
    """How far the adapters change the velocity for the captions of the class; weighted.

    The whole picture counts, whatever the mask.
    """
    assert given.class_conditions is not None
    target = _unadapted(model, given, given.class_conditions, without_adapters)
    velocity = model(given.noisy_BCTHW, given.t_B, given.class_conditions).float()
    errors = losses.MEASURES[objective.measure](velocity, target, objective.huber_c)
    return errors.mean() * objective.preservation_weight


def _unadapted(
    model: nn.Module,
    given: NoisyBatch,
    conditions: Batch,
    without_adapters: WithoutAdapters | None,
) -> Tensor:
    assert without_adapters, "the model without adapters is needed"
    with without_adapters():
        return model(given.noisy_BCTHW, given.t_B, conditions).float()
