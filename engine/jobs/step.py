"""One optimizer step of flow-matching training, and the loss it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from .. import flow, seeds
from ..architectures.base import Architecture

# (uniform draws [B], latent height, latent width) -> flow times [B]
SampleTimes = Callable[[Tensor, int, int], Tensor]
# (index of the batch in the run, its size B) -> uniform draws [B]
DrawTimes = Callable[[int, int], Tensor]
# flow times [B] -> weights [B]
LossWeight = Callable[[Tensor], Tensor]
Batch = Mapping[str, Tensor]


class VelocityModel(nn.Module):
    """A transformer behind its architecture, as one module that DDP can wrap."""

    def __init__(self, architecture: Architecture, transformer: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.transformer = transformer

    def forward(self, noisy_BCTHW: Tensor, t_B: Tensor, conditions: Batch) -> Tensor:
        return self.architecture.predict_velocity(self.transformer, noisy_BCTHW, t_B, conditions)


@dataclass(frozen=True)
class StepResult:
    """Means over the optimizer step, still on the device so that nothing waits for them."""

    loss: Tensor
    t: Tensor


@dataclass
class OptimizerStep:
    """Everything an optimizer step needs; called with its batches it changes the adapters.

    Args:
        model: gives velocities; its trainable parameters are ``parameters``.
        draw_times: the draws that ``sample_times`` gets.
        guidance: value of the guidance embedding during training.
        seed: the run's seed; the noise depends on it and on each batch's index only.
        loss_weight: weighs each sample's loss; None weighs all alike.
        no_sync: gives the context for all batches but the last (DDP).
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    scaler: GradScaler
    draw_times: DrawTimes
    sample_times: SampleTimes
    guidance: float
    max_grad_norm: float
    seed: int
    loss_weight: LossWeight | None = None
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, batches: Sequence[tuple[int, Batch]]) -> StepResult:
        """Accumulate the gradient over (index, batch) pairs and update once."""
        result = self.accumulate(batches, len(batches))
        self.update()
        return result

    def accumulate(self, batches: Iterable[tuple[int, Batch]], num_batches: int) -> StepResult:
        """The mean gradient over ``num_batches`` (index, batch) pairs; parameters do not change.

        One batch is taken at a time, so that memory does not grow with their number.
        """
        losses: list[Tensor] = []
        times: list[Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in batches:
            last = len(losses) == num_batches - 1
            with nullcontext() if last else self.no_sync():
                loss, t_B = self._loss(index, batch)
                self.scaler.scale(loss / num_batches).backward()
            losses.append(loss.detach())
            times.append(t_B.mean())
        assert len(losses) == num_batches
        return StepResult(torch.stack(losses).mean(), torch.stack(times).mean())

    def update(self) -> None:
        """Clip the gradient and change the parameters."""
        if self.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _loss(self, index: int, batch: Batch) -> tuple[Tensor, Tensor]:
        latents = batch["latents"]
        draws_B = self.draw_times(index, latents.shape[0])
        t_B = self.sample_times(draws_B, *latents.shape[-2:])
        t_B = t_B.to(latents.device, non_blocking=True)  # else the CPU waits for the GPU here
        generator = seeds.generator(self.seed, "noise", index, latents.device)
        loss = flow_loss(
            self.model,
            batch,
            t_B,
            guidance=self.guidance,
            generator=generator,
            weight=self.loss_weight,
        )
        return loss, t_B


def flow_loss(
    model: nn.Module,
    batch: Batch,
    t_B: Tensor,
    *,
    guidance: float,
    generator: torch.Generator,
    weight: LossWeight | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity at the given times, in float32.

    Args:
        model: a `VelocityModel` or its DDP wrapper.
        batch: "latents" [B, C, T, H, W] and the architecture's conditions.
        t_B: flow times in [0, 1].
        guidance: value of the guidance embedding.
        generator: draws the noise; on the device of the latents.
        weight: gives each sample's weight from its time; None weighs all alike.
    """
    latents = batch["latents"].float()
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    conditions = {name: tensor for name, tensor in batch.items() if name != "latents"}
    conditions["guidance"] = torch.full_like(t_B, guidance)
    velocity = model(flow.noisy_latents(latents, noise, t_B), t_B, conditions)
    target = flow.velocity_target(latents, noise)
    if weight is None:
        return F.mse_loss(velocity.float(), target)
    errors = F.mse_loss(velocity.float(), target, reduction="none")
    return (errors.flatten(1).mean(1) * weight(t_B)).mean()


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    times: Sequence[float],
    guidance: float,
    seed: int,
) -> float:
    """Mean flow loss over all batches at fixed times and noise, comparable between models."""
    losses: list[Tensor] = []
    for index, batch in enumerate(batches):
        latents = batch["latents"]
        for t in times:
            generator = seeds.generator(seed, f"held-out {t}", index, latents.device)
            t_B = torch.full((latents.shape[0],), t, device=latents.device)
            losses.append(flow_loss(model, batch, t_B, guidance=guidance, generator=generator))
    return torch.stack(losses).mean().item()
