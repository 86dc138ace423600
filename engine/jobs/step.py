"""One optimizer step of flow-matching training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import seeds
from ..architectures.base import Architecture
from ..time_statistics import TimeStatistics
from .objective import (
    PLAIN,
    Batch,
    LossWeight,
    NoisyBatch,
    Objective,
    WithoutAdapters,
    add_noise,
    preservation_loss,
    sample_losses,
    weighted_mean,
)

# (uniform draws [B], latent height, latent width) -> flow times [B]
SampleTimes = Callable[[Tensor, int, int], Tensor]
# (index of the batch in the run, its size B) -> uniform draws [B]
DrawTimes = Callable[[int, int], Tensor]


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
    """Means over the optimizer step, still on the device so that nothing waits for them.

    ``loss`` is what was minimised, with all weights and terms.
    """

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
        loss_weight: weighs each sample's loss by its time; None weighs all alike.
        no_sync: gives the context for all gradients but the last (DDP).
        objective: what the batches are trained towards.
        without_adapters: `Network.disabled`; needed for what the objective compares with the
            model as it was.
        has_dropout: the adapters draw from the global generators, which are seeded for each batch.
        limit_norms: called after each change; gives what is logged of it, see
            `Network.limit_norms`.

    ``max_norms`` is what it gave last. ``statistics`` are the losses of all steps before weights,
    those of regularization images left out; each process has its own.
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
    objective: Objective = PLAIN
    without_adapters: WithoutAdapters | None = None
    has_dropout: bool = False
    limit_norms: Callable[[], Tensor] | None = None
    max_norms: Tensor | None = field(default=None, init=False)
    statistics: TimeStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.statistics = TimeStatistics(self.parameters[0].device)

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
            given = self._add_noise(index, batch)
            if self.has_dropout:
                torch.manual_seed(seeds.derive(self.seed, "dropout", index))
            last = len(losses) == num_batches - 1
            losses.append(self._add_gradient(given, num_batches, last=last))
            times.append(given.t_B.mean())
        assert len(losses) == num_batches
        return StepResult(torch.stack(losses).mean(), torch.stack(times).mean())

    def update(self) -> Tensor:
        """Clip the gradient and change the parameters; gives the gradient's norm before clipping.

        The norm is infinite or NaN if the step overflowed in float16 and was left out.
        """
        self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        else:
            gradients = [each.grad for each in self.parameters if each.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.limit_norms:
            self.max_norms = self.limit_norms()
        return norm

    def _add_noise(self, index: int, batch: Batch) -> NoisyBatch:
        latents = batch["latents"]
        draws_B = self.draw_times(index, latents.shape[0])
        t_B = self.sample_times(draws_B, *latents.shape[-2:])
        return add_noise(
            batch,
            t_B.to(latents.device, non_blocking=True),  # else the CPU waits for the GPU here
            guidance=self.guidance,
            generator=seeds.generator(self.seed, "noise", index, latents.device),
            noise_offset=self.objective.noise_offset,
        )

    def _add_gradient(self, given: NoisyBatch, num_batches: int, *, last: bool) -> Tensor:
        """Add a batch's share to the gradient; gives its loss.

        Each of its terms is differentiated by itself, which needs the memory of one.
        """
        has_class = given.class_conditions is not None
        with nullcontext() if last and not has_class else self.no_sync():
            loss_B = sample_losses(self.model, given, self.objective, self.without_adapters)
            loss = weighted_mean(loss_B, given, self.objective, self.loss_weight)
            self.scaler.scale(loss / num_batches).backward()
        if not given.is_regularization:
            self.statistics.add(given.t_B, loss_B.detach())
        if not has_class:
            return loss.detach()
        with nullcontext() if last else self.no_sync():
            kept = preservation_loss(self.model, given, self.objective, self.without_adapters)
            self.scaler.scale(kept / num_batches).backward()
        return loss.detach() + kept.detach()


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    times: Sequence[float],
    guidance: float,
    seed: int,
    objective: Objective = PLAIN,
) -> float:
    """Mean flow loss over all batches at fixed times and noise, comparable between models.

    Of the objective, the measure and the weight of what is masked out are used.
    """
    losses: list[Tensor] = []
    for index, batch in enumerate(batches):
        latents = batch["latents"]
        for t in times:
            generator = seeds.generator(seed, f"held-out {t}", index, latents.device)
            t_B = torch.full((latents.shape[0],), t, device=latents.device)
            given = add_noise(batch, t_B, guidance=guidance, generator=generator)
            losses.append(sample_losses(model, given, objective).mean())
    return torch.stack(losses).mean().item()
