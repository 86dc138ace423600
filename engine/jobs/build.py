"""The model with its LoRA and everything an optimizer step needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from .. import compile, flow, hardware, optimizers, plugins, seeds
from ..architectures.base import Architecture
from ..config import Config, TrainingConfig
from ..dataset import CachedItem
from ..errors import ConfigError
from ..events import Reporter, silent
from ..lora_spelling import spell
from ..networks.network import Network
from ..quantized_model import keep_from_broadcasts
from . import model as model_job
from . import network_plan, tracking
from .model import load_transformer
from .objective import objective_of
from .plan import Plan, TimeDraws, schedule_settings
from .step import OptimizerStep, VelocityModel
from .times import sample_times


@dataclass(frozen=True)
class Built:
    """``model`` is what ``take_step`` trains, without DDP's wrapper.

    ``shapes`` are those of the weight of every layer of its transformer that a LoRA may name.
    ``remarks`` are sentences on what was done to make it.
    """

    take_step: OptimizerStep
    network: Network
    shapes: dict[str, tuple[int, ...]]
    model: VelocityModel
    remarks: tuple[str, ...] = ()

    @property
    def transformer(self) -> nn.Module:
        return self.model.transformer


def accelerator_for(config: Config) -> Any:
    """What knows the processes of ``accelerate launch``, if there are several."""
    from accelerate import Accelerator
    from accelerate.utils.dataclasses import InitProcessGroupKwargs

    device = hardware.find_device(config.runtime.device)
    # Number types are ours (the model is loaded in its training type), so autocast stays off.
    # The others wait while the main process draws and measures.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    cpu = device.type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patience])


def device_of(config: Config, accelerator: Any) -> torch.device:
    """Where this process trains."""
    if accelerator.num_processes > 1:
        return accelerator.device
    return hardware.find_device(config.runtime.device)


def check(config: Config) -> None:
    """Whether optimizer and compiler are there, before anything is loaded.

    Raises:
        ConfigError: they are not, or do not take the arguments.
    """
    allowed = plugins.allowed_packages(os.environ)
    optimizer, validation = config.optimizer, config.validation
    device = hardware.find_device(config.runtime.device)
    network_plan.check(config)
    model_job.check(config, trains=True)
    optimizers.check(optimizer.optimizer_type, optimizer.arguments, allowed, device=device)
    _check_optimizer_of_network(config)
    compile.check(compile_settings(config.training), device)
    tracking.check(config)
    wanted = [
        name
        for name in ("validate_every_n_steps", "early_stop_patience", "keep_best")
        if config.value(name)
    ]
    if wanted and not (validation.validation_directory or validation.validation_split):
        raise ConfigError(
            f"{wanted[0]} needs images to measure; give validation_directory or validation_split"
        )


def build(
    config: Config,
    architecture: Architecture,
    accelerator: Any,
    items: Sequence[CachedItem],
    plan: Plan,
    report: Reporter = silent,
) -> Built:
    """Load the model and put a new LoRA and optimizer on it."""
    device = device_of(config, accelerator)
    precision = config.training.mixed_precision
    base = config.network.base_loras
    # One writes the copy in 8 bits, the others read it.
    copies = config.quantization.quantized_cache is not None
    with accelerator.main_process_first() if copies else nullcontext():
        transformer = load_transformer(config, architecture, device, report, loras=base)
    planned = network_plan.plan_network(config, architecture, transformer)
    remarks: list[str] = []
    network = planned.put_on(transformer, seeds.generator(config.runtime.seed, "lora"))
    _check_format(config, architecture, network)
    if config.training.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    compile.compile_blocks(
        architecture.blocks(transformer),
        compile_settings(config.training),
        num_shapes=len({item.shapes for item in items}),
    )
    model = wrapped = VelocityModel(architecture, transformer.train())
    if accelerator.num_processes > 1:
        keep_from_broadcasts(model)
        wrapped = accelerator.prepare_model(model, device_placement=False)
    parameters = list(network.parameters())
    take_step = OptimizerStep(
        model=wrapped,
        parameters=parameters,
        optimizer=_optimizer(config, network, plan),
        scaler=GradScaler(device.type, enabled=precision == "fp16"),
        draw_times=TimeDraws(config, items, plan),
        sample_times=sample_times(config.timesteps, architecture),
        loss_weight=flow.LOSS_WEIGHTS.get(config.timesteps.weighting_scheme),
        guidance=config.timesteps.guidance_scale,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.runtime.seed,
        no_sync=lambda: accelerator.no_sync(wrapped),
        objective=objective_of(config.loss),
        without_adapters=network.disabled,
        has_dropout=network.has_dropout,
        limit_norms=_norm_limit(config, network),
    )
    if config.network.arguments.verbose:
        remarks.append(planned.describe(verbose=True))
    return Built(take_step, network, planned.shapes, model, (*remarks, *planned.remarks))


def compile_settings(training: TrainingConfig) -> compile.CompileSettings:
    """The settings as the compiler takes them."""
    return compile.CompileSettings(
        backend=training.dynamo_backend,
        mode=training.dynamo_mode,
        fullgraph=training.dynamo_fullgraph,
        dynamic=training.dynamo_dynamic,
    )


def remarks(config: Config, built: Built, plan: Plan) -> list[str]:
    """Sentences on what was done, and on settings that make little sense together."""
    settings = config.optimizer
    return [*built.remarks] + optimizers.remarks(
        built.take_step.optimizer,
        lr_scheduler=settings.lr_scheduler_type or settings.lr_scheduler,
        warmup_steps=schedule_settings(settings, plan.total_steps).warmup_steps,
    )


def _check_format(config: Config, architecture: Architecture, network: Network) -> None:
    """Whether the LoRA will be writable when it is trained.

    Raises:
        ConfigError: ``save_format`` cannot hold a layer.
    """
    output = config.output
    if output.save_format != "comfyui":
        path = Path(output.output_name or "").with_suffix(".safetensors")
        spell(path, network.weights(), architecture.layer_names, format=output.save_format)


def _norm_limit(config: Config, network: Network) -> Callable[[], Tensor] | None:
    maximum = config.network.scale_weight_norms
    if maximum is None:
        return None
    return lambda: torch.stack([each.float() for each in network.limit_norms(maximum)])


def _check_optimizer_of_network(config: Config) -> None:
    """Whether the optimizer can do what the network asks for, tried on two numbers.

    Raises:
        ConfigError: it cannot.
    """
    ratio, settings = config.network.arguments.loraplus_lr_ratio, config.optimizer
    groups = [
        optimizers.ParameterGroup("lora", [nn.Parameter(torch.zeros(2, 2))]),
        optimizers.ParameterGroup("lora plus", [nn.Parameter(torch.zeros(2, 2))], ratio or 1.0),
    ]
    if not ratio and not config.network.scale_weight_norms:
        return
    optimizer = optimizers.create(
        settings.optimizer_type,
        groups,
        lr=settings.learning_rate,
        arguments=settings.arguments,
        allowed=plugins.allowed_packages(os.environ),
    )
    if config.network.scale_weight_norms and optimizers.averages(optimizer):
        raise ConfigError(
            f"scale_weight_norms does not go with {settings.optimizer_type}, which keeps an "
            "average of the weights by itself; remove it, or use AdamW"
        )


def _optimizer(config: Config, network: Network, plan: Plan) -> torch.optim.Optimizer:
    settings = config.optimizer
    return optimizers.create(
        settings.optimizer_type,
        network.parameter_groups(config.network.arguments.loraplus_lr_ratio),
        lr=settings.learning_rate,
        arguments=settings.arguments,
        allowed=plugins.allowed_packages(os.environ),
        warmup_steps=schedule_settings(settings, plan.total_steps).warmup_steps,
    )
