"""Train a LoRA: cached latents and text in, a LoRA file and the state to continue it out.

Which images a step sees and every random draw are functions of the seed and the step, so a run
that was stopped or killed continues with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from .. import hardware, lora, optimizers, schedules, seeds, timesteps, training_state
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import BatchReader, CachedItem, data_identity, epoch_batches
from ..errors import ConfigError
from ..events import Finished, Message, Reporter
from ..loss_history import LossHistory
from ..signals import Stopped, StopSignals
from . import cache, outputs
from .saving import RunSaver
from .step import OptimizerStep, SampleTimes, VelocityModel
from .step_log import StepLog


def run(config: Config, report: Reporter) -> None:
    """Train the LoRA that ``config`` describes, or continue it.

    Raises:
        EngineError: a setting, file or dataset cannot be used; nothing was written.
        Stopped: a signal ended the run; LoRA and state are saved.
    """
    config.require("dit", "image_directory", "output_dir", "output_name")
    files, state_path = outputs.find_start(config)
    with StopSignals() as stop:
        accelerator = _accelerator(config)
        architecture = find_architecture(config.model.architecture, config.model.dit)
        items = cache.cached_items(config, architecture, report)
        plan = _plan(config, items, accelerator.num_processes)
        take_step, network, shapes = _build(config, architecture, accelerator)
        saver = RunSaver(
            config=config,
            architecture=architecture,
            files=files,
            network=network,
            shapes=shapes,
            optimizer=take_step.optimizer,
            scaler=take_step.scaler,
            recipe=_recipe(config, architecture, accelerator.num_processes),
            data=data_identity(items),
            num_items=len(items),
            report=report,
        )
        start = _start_step(saver, state_path, plan)
        _loop(config, accelerator, items, plan, take_step, saver, stop, start)


@dataclass(frozen=True)
class _Plan:
    """How the run's batches, counted over all processes and epochs, make up its steps."""

    batches_per_epoch: int
    batches_per_step: int
    total_steps: int
    warmup_steps: int

    def epoch_after(self, step: int) -> int:
        """The epoch, counted from 1, of the last batch of optimizer step ``step``."""
        return max(0, step * self.batches_per_step - 1) // self.batches_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch's last batch is in step ``step``."""
        last = step * self.batches_per_step
        return last // self.batches_per_epoch > (
            (last - self.batches_per_step) // self.batches_per_epoch
        )


def _plan(config: Config, items: Sequence[CachedItem], num_processes: int) -> _Plan:
    training = config.training
    batches = len(_epoch(config, items, 0))
    per_step = training.gradient_accumulation_steps * num_processes
    total = training.max_train_steps
    if training.max_train_epochs:
        total = math.ceil(training.max_train_epochs * batches / per_step)
    return _Plan(batches, per_step, total, config.optimizer.warmup_steps(total))


def _epoch(config: Config, items: Sequence[CachedItem], epoch: int) -> list[tuple[int, ...]]:
    return epoch_batches(
        items, batch_size=config.dataset.batch_size, seed=config.runtime.seed, epoch=epoch
    )


def _accelerator(config: Config) -> Any:
    from accelerate import Accelerator

    device = hardware.find_device(config.runtime.device)
    # Number types are ours (the model is loaded in its training type), so autocast stays off.
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def _device(config: Config, accelerator: Any) -> torch.device:
    if accelerator.num_processes > 1:
        return accelerator.device
    return hardware.find_device(config.runtime.device)


def _build(
    config: Config, architecture: Architecture, accelerator: Any
) -> tuple[OptimizerStep, lora.LoRANetwork, dict[str, tuple[int, int]]]:
    assert config.model.dit is not None
    device = _device(config, accelerator)
    precision = config.training.mixed_precision
    transformer = architecture.load_transformer(
        config.model.dit, dtype=hardware.DTYPES[precision], device=device
    )
    shapes = lora.linear_shapes(transformer, architecture.published_linears(transformer))
    network = lora.inject(
        transformer,
        architecture.lora_targets(transformer),
        rank=config.network.network_dim,
        alpha=config.network.alpha,
        generator=seeds.generator(config.runtime.seed, "lora"),
    )
    if config.training.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    model = VelocityModel(architecture, transformer.train())
    if accelerator.num_processes > 1:
        model = accelerator.prepare_model(model, device_placement=False)
    parameters = list(network.parameters())
    optimizer = optimizers.create(
        config.optimizer.optimizer_type,
        parameters,
        lr=config.optimizer.learning_rate,
        arguments=config.optimizer.arguments,
    )
    take_step = OptimizerStep(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        scaler=GradScaler(device.type, enabled=precision == "fp16"),
        sample_times=_sample_times(config, architecture),
        guidance=config.timesteps.guidance_scale,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.runtime.seed,
        no_sync=lambda: accelerator.no_sync(model),
    )
    return take_step, network, shapes


def _sample_times(config: Config, architecture: Architecture) -> SampleTimes:
    settings = config.timesteps
    name = settings.timestep_sampling
    name = architecture.default_timestep_sampling if name == "auto" else name

    def sample(draws_B: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return timesteps.SAMPLERS[name](
            draws_B,
            scale=settings.sigmoid_scale,
            fixed_shift=settings.discrete_flow_shift,
            resolution_shift=architecture.timestep_shift(height, width),
        )

    return sample


def _recipe(config: Config, architecture: Architecture, num_processes: int) -> dict[str, Any]:
    """The settings that decide the result; a run may only be continued with the same ones."""
    training, dataset = config.training, config.dataset
    return {
        "architecture": architecture.name,
        **config.network.model_dump(mode="json"),
        **config.optimizer.model_dump(mode="json"),
        **config.timesteps.model_dump(mode="json"),
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "mixed_precision": training.mixed_precision,
        "batch_size": dataset.batch_size,
        "seed": config.runtime.seed,
        "num_processes": num_processes,
    }


def _start_step(saver: RunSaver, state_path: Path | None, plan: _Plan) -> int:
    """Load the state, if there is one, and say where the run stands."""
    report, output = saver.report, saver.config.output
    if state_path is None:
        if output.resume:
            report(Message(f"no state in {saver.files.folder} to resume; starting at step 0"))
        saver.files.state.unlink(missing_ok=True)  # of a run that --overwrite replaces
        return 0
    saved = training_state.read_progress(state_path)
    differences = training_state.recipe_differences(saved.recipe, saver.recipe)
    if differences:
        raise ConfigError(
            f"{state_path}: the run was made with other settings: {'; '.join(differences)}; "
            "restore them, or start a new run under another output_name"
        )
    if saved.data != saver.data:
        report(
            Message(
                "the training data changed since the state was saved; the run continues with the "
                "new data and will not equal an uninterrupted one",
                level="warning",
            )
        )
    training_state.load_state(state_path, saver.network, saver.optimizer, saver.scaler)
    report(Message(f"continuing after step {saved.step} of {plan.total_steps}"))
    return saved.step


def _batches(
    config: Config, items: Sequence[CachedItem], plan: _Plan, accelerator: Any, start: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(index, items) of every batch of this process, from optimizer step ``start`` on."""
    indices = range(
        start * plan.batches_per_step + accelerator.process_index,
        plan.total_steps * plan.batches_per_step,
        accelerator.num_processes,
    )
    epoch, batches = -1, []
    for index in indices:
        wanted, position = divmod(index, plan.batches_per_epoch)
        if wanted != epoch:
            epoch, batches = wanted, _epoch(config, items, wanted)
        yield index, batches[position]


def _loop(
    config: Config,
    accelerator: Any,
    items: Sequence[CachedItem],
    plan: _Plan,
    take_step: OptimizerStep,
    saver: RunSaver,
    stop: StopSignals,
    start: int,
) -> None:
    is_main = accelerator.is_main_process
    report = saver.report
    device = take_step.parameters[0].device
    step = start
    per_process = plan.batches_per_step // accelerator.num_processes
    order = _batches(config, items, plan, accelerator, start)
    with (
        LossHistory(saver.files.history, resume_step=start) as history,
        BatchReader(items, order, pin_memory=device.type == "cuda") as reader,
    ):
        log = StepLog(history if is_main else None, report, total_steps=plan.total_steps)
        try:
            while step < plan.total_steps:
                rate = config.optimizer.learning_rate * schedules.constant_with_warmup(
                    step, warmup_steps=plan.warmup_steps
                )
                optimizers.set_learning_rate(take_step.optimizer, rate)
                batches = [next(reader) for _ in range(per_process)]
                result = take_step.accumulate([(i, _to(batch, device)) for i, batch in batches])
                with stop.shield():
                    take_step.update()
                    step += 1
                    log.record(step, plan.epoch_after(step), rate, result)
                    if is_main:
                        saver.save_if_due(
                            step, plan.epoch_after(step), epoch_ended=plan.ends_epoch(step)
                        )
        except Stopped:
            pass
        log.flush()
    if is_main:
        saver.save(step, plan.epoch_after(step))
    report(Finished("train", stopped=stop.requested))
    if stop.requested and step < plan.total_steps:
        raise Stopped(
            f"stopped after step {step} of {plan.total_steps}; everything is saved, "
            "continue with --resume"
        )


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
