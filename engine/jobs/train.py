"""Train a LoRA: cached latents and text in, a LoRA file and the state to continue it out.

Which images a step sees and every random draw are functions of the seed and the step, so a run
that was stopped or killed continues with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from .. import hardware, lora, optimizers, schedules, seeds, timesteps, training_state
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import BatchReader, CachedItem, data_identity, epoch_batches
from ..errors import ConfigError, EngineError
from ..events import Finished, Message, Reporter, silent
from ..loss_history import LossHistory
from ..signals import Stopped, StopSignals
from ..weights import open_checkpoint
from . import cache, outputs, previews
from .saving import RunSaver
from .step import OptimizerStep, SampleTimes, StepResult, VelocityModel
from .step_log import StepLog


def run(config: Config, report: Reporter) -> None:
    """Train the LoRA that ``config`` describes, or continue it.

    Raises:
        EngineError: a setting, file or dataset cannot be used, the loss is NaN, memory or disk is
            full; what was saved before is whole.
        Stopped: a signal ended the run; LoRA and state of all whole steps are saved.
    """
    config.require("dit", "image_directory", "output_dir", "output_name")
    files, state_path = outputs.find_start(config)
    hardware.use_threads(config.runtime.cpu_threads)
    with StopSignals() as stop:
        accelerator = _accelerator(config)
        report = report if accelerator.is_main_process else silent
        architecture = find_architecture(config.model.architecture, config.model.dit)
        items = cache.cached_items(config, architecture, report)
        recipe = _recipe(config, architecture, accelerator.num_processes)
        data = data_identity(items)
        start = _steps_done(state_path, recipe, data, report) if state_path else 0
        plan = _plan(config, items, accelerator.num_processes, start)
        finished = start >= plan.total_steps and _is_saved(files.lora, start)
        if finished:
            report(Message(f"{files.lora} is finished: {start} of {plan.total_steps} steps"))
            if _has_previews(config, files):
                report(Finished("train"))
                return
        take_step, network, shapes = _build(config, architecture, accelerator)
        if state_path:
            training_state.load_state(state_path, network, take_step.optimizer, take_step.scaler)
        if state_path and not finished:
            report(Message(f"continuing after step {start} of {plan.total_steps}"))
        elif config.output.resume and not state_path:
            report(Message(f"there is nothing to continue in {files.folder}; starting at step 0"))
        if not finished:
            saver = RunSaver(
                config=config,
                architecture=architecture,
                files=files,
                network=network,
                shapes=shapes,
                optimizer=take_step.optimizer,
                scaler=take_step.scaler,
                recipe=recipe,
                data=data,
                num_items=len(items),
                total_steps=plan.total_steps,
                report=report,
            )
            history = nullcontext()
            if accelerator.is_main_process:
                history = _prepare_folder(files, state_path, start)
            _loop(config, accelerator, items, plan, take_step, saver, stop, history)
        if config.output.preview_images and accelerator.is_main_process:
            transformer = _transformer(take_step)
            previews.draw(config, architecture, transformer, items, files, report, stop)
        report(Finished("train"))


def is_finished(config: Config) -> bool:
    """Whether `run` would have nothing to do; loads no model and takes milliseconds.

    Raises:
        EngineError: as `run`, for what is wrong with settings, files or an earlier run.
    """
    config.require("dit", "image_directory", "output_dir", "output_name")
    files, state_path = outputs.find_start(config)
    architecture = find_architecture(config.model.architecture, config.model.dit)
    todo = cache.plan(config, architecture)
    cache.require_encoders(config, todo)
    if state_path is None or todo.stale_latents or todo.stale_text:
        return False
    items = [cache.item(config, entry) for entry in todo.entries]
    data = data_identity(items)
    start = _steps_done(state_path, _recipe(config, architecture, 1), data, silent)
    total = _plan(config, items, 1, start).total_steps
    return (
        start >= total
        and training_state.read_progress(state_path).data == data
        and _is_saved(files.lora, start)
        and _has_previews(config, files)
    )


def _has_previews(config: Config, files: outputs.RunFiles) -> bool:
    return not config.output.preview_images or files.preview_latents.exists()


def _transformer(take_step: OptimizerStep) -> torch.nn.Module:
    model = getattr(take_step.model, "module", take_step.model)  # without DDP's wrapper
    assert isinstance(model, VelocityModel)
    return model.transformer


@dataclass(frozen=True)
class _Plan:
    """How the run's batches, counted over all processes and epochs, make up its steps.

    ``start`` steps are done already.
    """

    start: int
    batches_per_epoch: int
    batches_per_step: int
    total_steps: int
    warmup_steps: int

    def epoch_after(self, step: int) -> int:
        """The epoch, counted from 1, of the last batch of optimizer step ``step``."""
        return max(0, step * self.batches_per_step - 1) // self.batches_per_epoch + 1

    def ended_epochs(self, step: int) -> range:
        """The epochs, counted from 1, whose last batch is in optimizer step ``step``."""
        last = step * self.batches_per_step
        before = (last - self.batches_per_step) // self.batches_per_epoch
        return range(before + 1, last // self.batches_per_epoch + 1)


def _plan(config: Config, items: Sequence[CachedItem], num_processes: int, start: int) -> _Plan:
    training = config.training
    batches = len(_epoch(config, items, 0))
    per_step = training.gradient_accumulation_steps * num_processes
    total = training.max_train_steps
    if training.max_train_epochs:
        total = math.ceil(training.max_train_epochs * batches / per_step)
    return _Plan(start, batches, per_step, total, config.optimizer.warmup_steps(total))


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


def _steps_done(state: Path, recipe: dict[str, Any], data: str, report: Reporter) -> int:
    """The optimizer steps that are done in a saved state, which must be of the same recipe."""
    saved = training_state.read_progress(state)
    differences = training_state.recipe_differences(saved.recipe, recipe)
    if differences:
        raise ConfigError(
            f"{state}: the run was made with other settings: {'; '.join(differences)}; "
            "restore them, or start a new run under another output_name"
        )
    if saved.data != data:
        report(
            Message(
                "the training data changed since the state was saved; the run continues with the "
                "new data and will not equal an uninterrupted one",
                level="warning",
            )
        )
    return saved.step


def _is_saved(path: Path, step: int) -> bool:
    """Whether the LoRA was written after this step; a kill may come between state and LoRA."""
    return path.exists() and open_checkpoint(path).metadata.get("ss_steps") == str(step)


def _prepare_folder(files: outputs.RunFiles, state: Path | None, start: int) -> LossHistory:
    """Remove what does not belong to the run that now begins or continues; gives its history."""
    continues = state == files.state
    with outputs.explained(files.history):
        files.remove_leftovers()
        if not continues:
            files.state.unlink(missing_ok=True)  # of a run that --overwrite replaces
        return LossHistory(files.history, resume_step=start if continues else 0)


def _batches(
    config: Config, items: Sequence[CachedItem], plan: _Plan, accelerator: Any
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(index, items) of every batch of this process that is still to come."""
    indices = range(
        plan.start * plan.batches_per_step + accelerator.process_index,
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
    history: AbstractContextManager[LossHistory | None],
) -> None:
    is_main, num_processes = accelerator.is_main_process, accelerator.num_processes
    device = take_step.parameters[0].device
    per_process = plan.batches_per_step // num_processes
    order = _batches(config, items, plan, accelerator)
    step, memory_error = plan.start, None
    if num_processes > 1:
        stop.hold()  # they stop together, see _over_processes
    with history as lines, BatchReader(items, order, pin_memory=device.type == "cuda") as reader:
        log = StepLog(lines, saver.report, total_steps=plan.total_steps)
        batches = ((index, _to(batch, device)) for index, batch in reader)
        try:
            while step < plan.total_steps and not log.stop_requested:
                rate = config.optimizer.learning_rate * schedules.constant_with_warmup(
                    step, warmup_steps=plan.warmup_steps
                )
                optimizers.set_learning_rate(take_step.optimizer, rate)
                result = take_step.accumulate(islice(batches, per_process), per_process)
                with stop.shield():
                    take_step.update()
                    step += 1
                    result, flag = _over_processes(accelerator, result, stop.requested)
                    epoch = plan.epoch_after(step)
                    log.record(step, epoch, rate, result, flag)
                    if is_main:
                        saver.save_if_due(step, epoch, plan.ended_epochs(step), before=log.flush)
            stop.hold()
        except Stopped:
            pass
        except torch.OutOfMemoryError as error:
            # The adapters are still those of the last step. What the failed one computed is kept
            # alive by the traceback and would be in the way of saving.
            memory_error = error.with_traceback(None)
        log.flush()
    if is_main and step:
        saver.save(step, plan.epoch_after(step))
    if memory_error:
        raise EngineError(
            f"out of memory in step {step + 1}; everything before it is saved. Turn on "
            "gradient_checkpointing and use --resume, or start again with a smaller resolution or "
            "batch_size"
        ) from memory_error
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if step < plan.total_steps:
        saver.report(Finished("train", stopped=True))
        saved = "everything is saved" if step else "there was nothing to save"
        raise Stopped(
            f"stopped after step {step} of {plan.total_steps}; {saved}, continue with --resume"
        )


def _over_processes(
    accelerator: Any, result: StepResult, requested: bool
) -> tuple[StepResult, torch.Tensor | None]:
    """Means over all processes, and a number above 0 if any of them was asked to stop.

    All see that number after the same step and stop there. If one left by itself, the others
    would wait for its gradients.
    """
    if accelerator.num_processes == 1:
        return result, None
    mine = torch.stack([result.loss, result.t, torch.full_like(result.loss, requested)])
    loss, t, flag = accelerator.reduce(mine, reduction="mean")
    return StepResult(loss, t), flag


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
