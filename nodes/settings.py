"""Nodes of optional settings for Train LoRA, with a picture of what they do where there is one."""

from __future__ import annotations

import os
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from ..engine import flow, plots, plugins, timesteps
from ..engine.architectures import ARCHITECTURES
from ..engine.config import TimestepConfig
from ..engine.config_types import OPTIMIZERS
from ..engine.errors import ConfigError
from ..engine.jobs.plan import schedule_of, schedule_settings
from ..engine.jobs.times import timestep_settings
from .images import to_comfy
from .sockets import (
    CATEGORY,
    LrSchedulerType,
    OptimizerType,
    OptionsType,
    TimestepsType,
    TrainingModelType,
)
from .widgets import combine, settings, widget

_DRAWS = 100_000
_MOST_PARTS = 12  # of num_timestep_buckets that are drawn
# Widgets that Training Options has after those which saved prompts name.
_LATER_OPTIONS = (
    "save_last_n_steps",
    "save_last_n_epochs",
    "save_state",
    "save_last_n_steps_state",
    "save_last_n_epochs_state",
    "on_divergence",
    "divergence_factor",
)
_MENU = f"{CATEGORY}/settings"


class OptimizerSettings(io.ComfyNode):
    """Which optimizer, with its arguments."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_Optimizer",
            display_name="Optimizer",
            category=_MENU,
            description="The optimizer and its arguments; the learning rate is set on Train LoRA.",
            inputs=[
                widget("optimizer_type", options=list(OPTIMIZERS), tooltip="Which optimizer."),
                widget(
                    "optimizer_args",
                    tooltip="More arguments, one key=value a line: weight_decay, betas, eps.",
                    placeholder="weight_decay=0.01",
                ),
                widget("max_grad_norm"),
                io.String.Input(
                    "other_optimizer",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="package.Class of another optimizer, used instead of optimizer_type. "
                    "The package must be one that your settings file allows.",
                ),
            ],
            outputs=[OptimizerType.Output(display_name="optimizer")],
        )

    @classmethod
    def execute(
        cls, optimizer_type: str, other_optimizer: str = "", **widgets: Any
    ) -> io.NodeOutput:
        chosen = {"optimizer_type": other_optimizer.strip() or optimizer_type}
        return io.NodeOutput(settings("Optimizer", chosen | widgets))


class LrScheduler(io.ComfyNode):
    """How the learning rate changes over the steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_LrScheduler",
            display_name="LR Scheduler",
            category=_MENU,
            description="How the learning rate changes over the training, with its curve.",
            inputs=[
                widget("lr_scheduler"),
                widget(
                    "lr_warmup_steps",
                    default=0.0,
                    tooltip="Warm-up in optimizer steps, or below 1 as a share of all steps.",
                ),
                widget("lr_scheduler_min_lr_ratio"),
                widget("lr_scheduler_num_cycles"),
                widget("lr_scheduler_power", min=0.01),
                widget(
                    "max_train_steps",
                    tooltip="Steps of the curve that is drawn; it does not change the training.",
                    display_name="shown_steps",
                    max=100_000,
                ),
                widget("lr_decay_steps", advanced=True),
                widget("lr_scheduler_timescale", advanced=True),
                widget("rex_alpha", advanced=True, min=0.01),
                widget("rex_beta", advanced=True),
                widget(
                    "lr_scheduler_args",
                    optional=True,
                    tooltip="More arguments of the schedule, one key=value a line; they win over "
                    "the inputs above.",
                    placeholder="step_rules='1:100,0.1'",
                ),
                widget("lr_scheduler_type", optional=True, advanced=True),
            ],
            outputs=[
                LrSchedulerType.Output(display_name="lr scheduler"),
                io.Image.Output(display_name="curve"),
            ],
        )

    @classmethod
    def execute(cls, max_train_steps: int, **widgets: Any) -> io.NodeOutput:
        values = settings("LR Scheduler", widgets)
        config = combine(values, where="LR Scheduler").optimizer
        allowed = plugins.allowed_packages(os.environ)
        schedule = schedule_of(config, max_train_steps, allowed=allowed)
        curve = [schedule(step) for step in range(max_train_steps)]
        warmup = schedule_settings(config, max_train_steps).warmup_steps
        title = f"{config.lr_scheduler_type or config.lr_scheduler}, {warmup} steps of warm-up"
        return io.NodeOutput(values, to_comfy([plots.schedule_curve(curve, title=title)]))


class TimestepSampling(io.ComfyNode):
    """Which noise levels are trained how often."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_TimestepSampling",
            display_name="Timestep Sampling",
            category=_MENU,
            description="Which noise levels are trained how often, with their histogram.",
            inputs=[
                widget("timestep_sampling"),
                widget("discrete_flow_shift", min=0.01),
                widget("sigmoid_scale", min=0.01),
                widget("logit_mean"),
                widget("logit_std", min=0.01),
                widget("min_timestep"),
                widget("max_timestep"),
                widget("preserve_distribution_shape", advanced=True),
                widget("num_timestep_buckets", advanced=True),
                widget("weighting_scheme", advanced=True),
                widget("mode_scale", advanced=True),
                widget("guidance_scale", advanced=True),
                io.Int.Input(
                    "shown_resolution",
                    default=1024,
                    min=64,
                    max=8192,
                    advanced=True,
                    tooltip="Side in pixels that the histogram is drawn for; it does not change "
                    "the training.",
                ),
                TrainingModelType.Input(
                    "model", optional=True, tooltip="Whose family's choice auto is drawn for."
                ),
            ],
            outputs=[
                TimestepsType.Output(display_name="timesteps"),
                io.Image.Output(display_name="histogram"),
            ],
        )

    @classmethod
    def execute(
        cls, shown_resolution: int, model: dict[str, Any] | None = None, **widgets: Any
    ) -> io.NodeOutput:
        values = settings("Timestep Sampling", widgets)
        config = combine(values, where="Timestep Sampling").timesteps
        family = (model or {}).get("architecture", "auto")
        architecture = ARCHITECTURES.get(family) or next(iter(ARCHITECTURES.values()))
        name = config.timestep_sampling
        name = architecture.default_timestep_sampling if name == "auto" else name
        image = times_of(config, name, architecture.pixels_per_latent, shown_resolution)
        return io.NodeOutput(values, to_comfy([image]))


def times_of(
    config: TimestepConfig, name: str, pixels_per_latent: int, resolution: int
) -> Image.Image:
    """The histogram of the times that are trained on square pictures.

    Raises:
        ConfigError: there are none in the range.
    """
    side = resolution // pixels_per_latent
    chosen = timestep_settings(config)
    num_parts = config.num_timestep_buckets or 1
    parts = torch.arange(1, num_parts if num_parts <= _MOST_PARTS else 1) / num_parts
    draws = (torch.arange(_DRAWS) + 0.5) / _DRAWS
    try:
        times, edges = (
            timesteps.sample_times(name, each, chosen, latent_size=(side, side)).tolist()
            for each in (draws, parts)
        )
    except ValueError as error:
        raise ConfigError(f"Timestep Sampling: {error}; widen the range") from None
    return plots.time_histogram(
        times,
        title=f"{name}, pictures of {resolution}x{resolution}",
        low=chosen.low,
        high=chosen.high,
        weight=flow.LOSS_WEIGHTS.get(config.weighting_scheme),
        edges=edges,
    )


class TrainingOptions(io.ComfyNode):
    """How long, how often saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_TrainingOptions",
            display_name="Training Options",
            category=_MENU,
            description="More about the run: epochs, gradient accumulation, saving, previews.",
            inputs=[
                widget(
                    "max_train_epochs",
                    tooltip="Epochs to train instead of Train LoRA's steps; 0: the steps count.",
                ),
                widget("gradient_accumulation_steps"),
                widget("save_every_n_epochs"),
                widget("autosave_minutes"),
                widget(
                    "infer_steps",
                    display_name="preview_steps",
                    tooltip="Sampling steps of a preview, and of a sample whose prompt says none.",
                ),
                widget("embedded_cfg_scale", display_name="preview_guidance"),
                widget("cpu_threads", advanced=True),
                *(widget(name, advanced=True, optional=True) for name in _LATER_OPTIONS),
            ],
            outputs=[OptionsType.Output(display_name="options")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("Training Options", widgets))
