"""How is learned: optimizer and its schedule, noise levels, loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..config_types import (
    OPTIMIZERS,
    Arguments,
    LrSchedulerName,
    OptimizerName,
    ShareOrSteps,
    TimestepEnd,
    parse_arguments,
)
from .group import Group


class OptimizerConfig(Group):
    """Optimizer"""

    optimizer_type: OptimizerName = Field(
        default="AdamW",
        description=f"{', '.join(OPTIMIZERS)}, or package.Class of a package that is allowed.",
    )
    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="Learning rate after the warm-up."
    )
    optimizer_args: Arguments = Field(
        default=[], description='More arguments of the optimizer as "key=value".'
    )
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "piecewise_constant",
        "rex",
    ] = Field(
        default="constant",
        description="Learning-rate schedule after the warm-up; the first two are the same.",
    )
    lr_scheduler_type: LrSchedulerName | None = Field(
        default=None,
        description="A class of torch.optim.lr_scheduler, or package.Class of a package that is "
        "allowed; used instead of lr_scheduler.",
    )
    lr_scheduler_args: Arguments = Field(
        default=[],
        description='Arguments of the schedule as "key=value", such as "rex_alpha=0.1" or '
        "\"step_rules='1:100,0.1'\" of piecewise_constant.",
    )
    lr_warmup_steps: ShareOrSteps = Field(
        default=0,
        ge=0,
        description='Warm-up in optimizer steps, or as a share of all steps (0.1 or "10%").',
    )
    lr_scheduler_min_lr_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Lowest part of the learning rate, where the warm-up begins (not of "
        "piecewise_constant); unset: 0, for rex 0.01.",
    )
    lr_scheduler_num_cycles: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Restarts of cosine_with_restarts; half waves of cosine_with_min_lr and of the "
        "end of warmup_stable_decay.",
    )
    lr_scheduler_power: float = Field(
        default=1.0, gt=0, le=100, description="Exponent of polynomial."
    )
    lr_decay_steps: ShareOrSteps | None = Field(
        default=None,
        ge=0,
        description="Last steps of warmup_stable_decay, or their share of all steps; unset: a "
        "fifth of what follows the warm-up.",
    )
    lr_scheduler_timescale: int | None = Field(
        default=None,
        ge=1,
        description="Steps of inverse_sqrt after which the rate is divided by 1.41; unset: as the "
        "warm-up, or 10,000.",
    )
    rex_alpha: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="Of rex, with rex_beta: (1-p) / (alpha + beta (1-p)).",
    )
    rex_beta: float = Field(
        default=0.9, ge=0, le=100, description="Of rex; the paper has 0.5 for both."
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="Gradients are scaled down to this norm; 0 turns it off.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """``optimizer_args`` as values."""
        return parse_arguments(self.optimizer_args)

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        """``lr_scheduler_args`` as values."""
        return parse_arguments(self.lr_scheduler_args)


class TimestepConfig(Group):
    """Timesteps"""

    timestep_sampling: Literal[
        "auto",
        "uniform",
        "sigmoid",
        "shift",
        "flux_shift",
        "qwen_shift",
        "logsnr",
        "sigma",
        "qinglong_flux",
        "qinglong_qwen",
    ] = Field(
        default="auto", description="How training times are drawn; auto is the family's own choice."
    )
    discrete_flow_shift: float = Field(
        default=1.0, gt=0, le=1000, description="Shift towards noise of timestep_sampling shift."
    )
    sigmoid_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Spread of sigmoid and the choices with a shift; 1 is the published one.",
    )
    logit_mean: float = Field(
        default=0.0,
        ge=-100,
        le=100,
        description="Mean of logsnr, of its part in qinglong, and of weighting logit_normal.",
    )
    logit_std: float = Field(
        default=1.0, gt=0, le=100, description="Standard deviation that goes with logit_mean."
    )
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = Field(
        default="none",
        description="logit_normal and mode: how timestep_sampling sigma draws; cosmap and "
        "sigma_sqrt: weight of the loss at each time.",
    )
    mode_scale: float = Field(
        default=1.29, ge=-1, le=1.75, description="Strength of weighting_scheme mode."
    )
    min_timestep: int = Field(
        default=0, ge=0, le=999, description="Lowest noise level to train, in thousandths."
    )
    max_timestep: TimestepEnd = Field(
        default=1000, ge=1, le=1000, description="Highest noise level to train, in thousandths."
    )
    preserve_distribution_shape: bool = Field(
        default=False,
        description="Cut the range out of the distribution instead of squeezing all of it in.",
    )
    num_timestep_buckets: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Draw equally often from this many equal parts of the distribution in each "
        "epoch.",
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Guidance value that the model is given while it trains.",
    )


class LossConfig(Group):
    """Loss"""

    loss_type: Literal["mse", "l1", "huber", "smooth_l1"] = Field(
        default="mse", description="How a wrong velocity is measured."
    )
    huber_c: float = Field(
        default=0.1,
        gt=0,
        le=1000,
        description="Error above which huber and smooth_l1 grow linearly.",
    )
    noise_offset: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Noise that is the same over a whole channel, added to the noise; 0.05 to 0.1 "
        "helps with very dark and very bright pictures.",
    )
    unmasked_weight: float = Field(
        default=0.0, ge=0, le=1, description="Weight of the loss where a mask is black."
    )
    prior_loss_weight: float = Field(
        default=1.0, ge=0, le=1000, description="Weight of the loss of regularization images."
    )
    regularization_target: Literal["image", "model"] = Field(
        default="image",
        description="What regularization images are trained towards: themselves, or what the model "
        "without the LoRA makes of them.",
    )
    trigger_word: str | None = Field(
        default=None,
        description="Word of the captions that stands for what is trained; needed with "
        "preservation_class.",
    )
    preservation_class: str | None = Field(
        default=None,
        description="Word that replaces trigger_word in a second copy of each caption, for which "
        "the LoRA is trained to change nothing (differential output preservation).",
    )
    preservation_weight: float = Field(
        default=1.0, ge=0, le=1000, description="Weight of that loss."
    )
