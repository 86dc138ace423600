"""Train a LoRA: cached latents and text in, a LoRA file and the state to continue it out.

Which images a step sees and every random draw are functions of the seed and the step, so a run
that was stopped or killed continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from .. import flow, hardware, lora, optimizers, schedules, seeds, timesteps, training_state
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config, TimestepConfig
from ..dataset import BatchReader, CachedItem, data_identity
from ..errors import ConfigError, EngineError
from ..events import Finished, Message, Reporter, silent
from ..loss_history import LossHistory
from ..signals import Stopped, StopSignals
from ..weights import open_checkpoint
from . import cache, outputs, previews
from .plan import Plan, TimeDraws, batches_to_come, plan_run
from .saving import RunSaver
from .step import OptimizerStep, SampleTimes, StepResult, VelocityModel
from .step_log import StepLog

_NEEDED = ("dit", "image_directory", "output_dir", "output_name")


def run(config: Config, report: Reporter) -> None:
    """Train the LoRA that ``config`` describes, or continue it.

    Raises:
        EngineError: a setting, file or dataset cannot be used, the loss is NaN, memory or disk is
            full; what was saved before is whole.
        Stopped: a signal ended the run; LoRA and state of all whole steps are saved.
    """
    config.require(*_NEEDED)
    files, state_path = outputs.find_start(config)
    hardware.use_threads(config.runtime.cpu_threads)
    with StopSignals() as stop:
        accelerator = _accelerator(config)
        report = report if accelerator.is_main_process else silent
        architecture = find_architecture(config.model.architecture, config.model.dit)
        items = cache.cached_items(config, architecture, report)
        _check_times(config, architecture, items)
        start = _look(config, architecture, items, files, state_path, accelerator.num_processes)
        _tell(config, start, report)
        if start.finished and previews.are_drawn(config, items, files):
            report(Finished("train"))
            return
        take_step, network, shapes = _build(config, architecture, accelerator, items, start.plan)
        if state_path:
            training_state.load_state(state_path, network, take_step.optimizer, take_step.scaler)
        if not start.finished:
            saver = RunSaver(
                config=config,
                architecture=architecture,
                files=files,
                network=network,
                shapes=shapes,
                optimizer=take_step.optimizer,
                scaler=take_step.scaler,
                recipe=start.recipe,
                data=start.data,
                num_items=len(items),
                total_steps=start.plan.total_steps,
                report=report,
            )
            history = nullcontext()
            if accelerator.is_main_process:
                history = _prepare_folder(start)
            _loop(config, accelerator, items, start.plan, take_step, saver, stop, history)
        if config.output.preview_images and accelerator.is_main_process:
            transformer = _transformer(take_step)
            previews.draw(config, architecture, transformer, items, files, report, stop)
        report(Finished("train"))


def is_finished(config: Config) -> bool:
    """Whether `run` would have nothing to do and to say; loads no model.

    Raises:
        EngineError: as `run`, for what is wrong with settings, files or an earlier run.
    """
    config.require(*_NEEDED)
    files, state_path = outputs.find_start(config)
    architecture = find_architecture(config.model.architecture, config.model.dit)
    todo = cache.plan(config, architecture)
    cache.require_encoders(config, todo)
    if state_path is None or todo.stale_latents or todo.stale_text:
        return False
    items = [cache.item(config, entry) for entry in todo.entries]
    start = _look(config, architecture, items, files, state_path, num_processes=1)
    drawn = previews.are_drawn(config, items, files)
    return start.finished and not start.data_changed and drawn


@dataclass(frozen=True)
class _Start:
    """What is there before anything is loaded.

    ``recipe`` are the settings that decide the result, ``data`` the identity of the data, of which
    ``data_changed`` says that the saved state was made with other data.
    """

    files: outputs.RunFiles
    state_path: Path | None
    recipe: dict[str, Any]
    data: str
    data_changed: bool
    plan: Plan
    finished: bool


def _look(
    config: Config,
    architecture: Architecture,
    items: Sequence[CachedItem],
    files: outputs.RunFiles,
    state_path: Path | None,
    num_processes: int,
) -> _Start:
    recipe = _recipe(config, architecture, num_processes)
    data = data_identity(items)
    saved = _saved_progress(state_path, recipe) if state_path else None
    steps = saved.step if saved else 0
    plan = plan_run(config, items, num_processes=num_processes, start=steps)
    changed = saved is not None and saved.data != data
    finished = steps >= plan.total_steps and _is_saved(files.lora, steps)
    return _Start(files, state_path, recipe, data, changed, plan, finished)


def _tell(config: Config, start: _Start, report: Reporter) -> None:
    """Where the run begins."""
    plan = start.plan
    if start.data_changed:
        report(
            Message(
                "the training data changed since the state was saved; the run continues with the "
                "new data and will not equal an uninterrupted one",
                level="warning",
            )
        )
    if start.finished:
        report(Message(f"{start.files.lora} is finished: {plan.start} of {plan.total_steps} steps"))
    elif start.state_path:
        report(Message(f"continuing after step {plan.start} of {plan.total_steps}"))
    elif config.output.resume:
        report(Message(f"there is nothing to continue in {start.files.folder}; starting at step 0"))


def _transformer(take_step: OptimizerStep) -> torch.nn.Module:
    model = getattr(take_step.model, "module", take_step.model)  # without DDP's wrapper
    assert isinstance(model, VelocityModel)
    return model.transformer


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
    config: Config,
    architecture: Architecture,
    accelerator: Any,
    items: Sequence[CachedItem],
    plan: Plan,
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
        draw_times=TimeDraws(config, items, plan),
        sample_times=_sample_times(config, architecture),
        loss_weight=flow.LOSS_WEIGHTS.get(config.timesteps.weighting_scheme),
        guidance=config.timesteps.guidance_scale,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.runtime.seed,
        no_sync=lambda: accelerator.no_sync(model),
    )
    return take_step, network, shapes


def _sample_times(config: Config, architecture: Architecture) -> SampleTimes:
    name = config.timesteps.timestep_sampling
    name = architecture.default_timestep_sampling if name == "auto" else name
    settings = timestep_settings(config.timesteps)

    def sample(draws_B: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return timesteps.sample_times(name, draws_B, settings, latent_size=(height, width))

    return sample


def timestep_settings(config: TimestepConfig) -> timesteps.TimestepSettings:
    """The settings as the distributions take them."""
    return timesteps.TimestepSettings(
        scale=config.sigmoid_scale,
        shift=config.discrete_flow_shift,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        mode_scale=config.mode_scale,
        weighting=config.weighting_scheme,
        low=config.min_timestep / 1000,
        high=config.max_timestep / 1000,
        keep_shape=config.preserve_distribution_shape,
    )


def _check_times(config: Config, architecture: Architecture, items: Sequence[CachedItem]) -> None:
    """Before anything is loaded: is there a time to train at?"""
    sample = _sample_times(config, architecture)
    sizes = {shape[-2:] for item in items for name, shape in item.shapes if name == "latents"}
    try:
        for height, width in sizes:
            sample(torch.tensor([0.5]), height, width)
    except ValueError as error:
        raise ConfigError(
            f"min_timestep, max_timestep: {error}; widen the range, or turn "
            "preserve_distribution_shape off"
        ) from None


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


def _saved_progress(state: Path, recipe: dict[str, Any]) -> training_state.Progress:
    """What a saved state, which must be of the same recipe, says of itself."""
    saved = training_state.read_progress(state)
    differences = training_state.recipe_differences(saved.recipe, recipe)
    if differences:
        raise ConfigError(
            f"{state}: the run was made with other settings: {'; '.join(differences)}; "
            "restore them, or start a new run under another output_name"
        )
    return saved


def _is_saved(path: Path, step: int) -> bool:
    """Whether the LoRA was written after this step; a kill may come between state and LoRA."""
    return path.exists() and open_checkpoint(path).metadata.get("ss_steps") == str(step)


def _prepare_folder(start: _Start) -> LossHistory:
    """Remove what does not belong to the run that now begins or continues; gives its history."""
    files = start.files
    continues = start.state_path == files.state
    with outputs.explained(files.history):
        files.remove_leftovers()
        previews.remove(files)
        if not continues:
            files.state.unlink(missing_ok=True)  # of a run that --overwrite replaces
        return LossHistory(files.history, resume_step=start.plan.start if continues else 0)


def _loop(
    config: Config,
    accelerator: Any,
    items: Sequence[CachedItem],
    plan: Plan,
    take_step: OptimizerStep,
    saver: RunSaver,
    stop: StopSignals,
    history: AbstractContextManager[LossHistory | None],
) -> None:
    is_main, num_processes = accelerator.is_main_process, accelerator.num_processes
    device = take_step.parameters[0].device
    per_process = plan.batches_per_step // num_processes
    order = batches_to_come(
        config,
        items,
        plan,
        process_index=accelerator.process_index,
        num_processes=num_processes,
    )
    step, memory_error = plan.start, None
    if num_processes > 1:
        stop.hold()  # they stop together, see _over_processes
    with history as lines, BatchReader(items, order, pin_memory=device.type == "cuda") as reader:
        log = StepLog(lines, saver.report, total_steps=plan.total_steps)
        batches = ((index, _to(batch, device)) for index, batch in reader)
        try:
            while step < plan.total_steps and not log.stop_requested:
                rate = config.optimizer.learning_rate * schedules.multiplier(
                    config.optimizer.lr_scheduler, step, plan.schedule
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
