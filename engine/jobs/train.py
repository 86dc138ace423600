"""Train a LoRA: cached latents and text in, a LoRA file and the state to continue it out.

Which images a step sees and every random draw are functions of the seed and the step, so a run
that was stopped or killed continues with the same bits.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from .. import compile, hardware
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedData, data_identity
from ..events import Finished, Message, Reporter, silent
from ..loss_history import LossHistory
from ..signals import StopSignals
from ..weights import open_checkpoint
from . import build, cache, checks, outputs, previews, rewind, sample_plan, samples, show
from .assembly import Parts, Start, train
from .plan import plan_run
from .recipe import recipe_of, saved_progress
from .run_control import RunControl
from .times import check_times

_NEEDED = ("dit", "image_directory", "output_dir", "output_name")


def run(config: Config, report: Reporter) -> None:
    """Train the LoRA that ``config`` describes, or continue it.

    Raises:
        EngineError: a setting, file or dataset cannot be used, the loss is NaN, memory or disk is
            full; what was saved before is whole.
        Stopped: a signal or command ended the run; LoRA and state of all whole steps are saved.
    """
    if show.run(config, report):
        return
    config.require(*_NEEDED)
    files, state_path = outputs.find_start(config)
    build.check(config)
    hardware.use_threads(config.runtime.cpu_threads)
    if hardware.find_device(config.runtime.device).type == "cpu":
        hardware.give_freed_memory_back()
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        accelerator = build.accelerator_for(config)
        control: RunControl | None = None
        if accelerator.is_main_process:
            refused = _refused(config, accelerator.num_processes)
            control = stack.enter_context(RunControl(files, report, refused=refused))
        report = control.report if control else silent
        architecture = find_architecture(config.model.architecture, config.model.dit)
        if state_path is None:
            checks.check_files(config)  # a finished run needs none of them any more
        with accelerator.main_process_first():
            data = cache.cached_data(config, architecture, report)
            pictures = sample_plan.prepare(config, architecture, report)
        check_times(config, architecture, data.train)
        processes = accelerator.num_processes
        start = _look(config, architecture, data, files, state_path, processes, report)
        _tell(config, start, report)
        if start.finished and previews.are_drawn(config, data.train, files):
            report(Finished("train"))
            return
        if accelerator.is_main_process and not start.finished:
            _check_needs(config, architecture, data, start, report)
        built = build.build(config, architecture, accelerator, data.train, start.plan, report)
        for remark in build.remarks(config, built, start.plan):
            report(Message(remark))
        if start.state_path:
            rewind.load(start.state_path, built)
        if not start.finished:
            if accelerator.is_main_process:
                _prepare_folder(start)
            parts = Parts(
                config,
                architecture,
                accelerator,
                data,
                pictures,
                built,
                start,
                stop,
                control,
                report,
            )
            train(parts)
        if config.output.preview_images and accelerator.is_main_process:
            with compile.uncompiled():
                previews.draw(
                    config, architecture, built.transformer, data.train, files, report, stop
                )
        report(Finished("train"))


def _check_needs(
    config: Config, architecture: Architecture, data: CachedData, start: Start, report: Reporter
) -> None:
    """Model file, disk and memory, in a second or two.

    Raises:
        EngineError: the file is not whole, or the disk has no room.
    """
    device = hardware.find_device(config.runtime.device)
    found = checks.before_loading(config, architecture, data.train, start.files, start.plan, device)
    for message in found:
        report(message)


def _refused(config: Config, num_processes: int) -> dict[str, str]:
    """Commands that the run cannot obey, and why."""
    refused: dict[str, str] = {}
    if not config.samples.sample_lines and not config.samples.sample_prompts:
        refused["sample"] = "it has no sample prompts"
    if num_processes > 1:
        refused["pause"] = "it trains in several processes; stop it and continue with --resume"
    return refused


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
    data = cache.data_of(config, todo)
    start = _look(config, architecture, data, files, state_path, num_processes=1)
    drawn = previews.are_drawn(config, data.train, files)
    return start.finished and not start.data_changed and drawn


def _look(
    config: Config,
    architecture: Architecture,
    data: CachedData,
    files: outputs.RunFiles,
    state_path: Path | None,
    num_processes: int,
    report: Reporter = silent,
) -> Start:
    recipe = recipe_of(config, architecture, num_processes)
    chooses = config.validation.keep_best or config.validation.early_stop_patience
    identity = data_identity(data.train, data.validation if chooses else ())
    saved = saved_progress(state_path, recipe) if state_path else None
    steps = saved.step if saved else 0
    plan = plan_run(config, data.train, num_processes=num_processes, start=steps, report=report)
    changed = saved is not None and saved.data != identity
    extra = saved.extra if saved else {}
    done = steps >= plan.total_steps or bool(extra.get("ended_early"))
    finished = done and _is_saved(files.lora, steps)
    return Start(files, state_path, recipe, identity, changed, plan, extra, finished)


def _tell(config: Config, start: Start, report: Reporter) -> None:
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


def _is_saved(path: Path, step: int) -> bool:
    """Whether the LoRA was written after this step; a kill may come between state and LoRA."""
    return path.exists() and open_checkpoint(path).metadata.get("ss_steps") == str(step)


def _prepare_folder(start: Start) -> None:
    """Remove what does not belong to the run that now begins or continues."""
    files = start.files
    continues = start.state_path is not None and files.is_own_state(start.state_path)
    with outputs.explained(files.history):
        files.remove_leftovers()
        previews.remove(files)
        samples.remove_after(files, start.plan.start if continues else -1)
        with LossHistory(files.history, resume_step=start.plan.start if continues else 0):
            pass  # drops later steps
        if not continues:
            for path in (files.state, files.validation, files.loss_by_time, files.best):
                path.unlink(missing_ok=True)  # of a run that --overwrite replaces
