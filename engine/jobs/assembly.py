"""Puts a training run together from all of its parts, and ends it."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import compile, optimizers
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedData
from ..events import Finished, Reporter
from ..loss_history import read_history
from ..signals import Stopped, StopSignals
from ..training_state import Progress
from . import outputs, samples
from .build import Built, compile_settings
from .guard import DivergenceGuard
from .loop import Between, TrainingLoop
from .plan import Plan
from .rewind import GoodStates
from .run_control import RunControl
from .run_log import RunLog
from .sample_plan import SamplePlan
from .saving import RunSaver
from .tracking import Tracking
from .validation import Validator


@dataclass(frozen=True)
class Start:
    """What is there before anything is loaded.

    ``recipe`` are the settings that decide the result, ``data`` the identity of the data, of which
    ``data_changed`` says that the saved state was made with other data. ``extra`` is what the
    saved state holds besides weights.
    """

    files: outputs.RunFiles
    state_path: Path | None
    recipe: dict[str, Any]
    data: str
    data_changed: bool
    plan: Plan
    extra: dict[str, Any]
    finished: bool


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of; ``control`` is that of the main process."""

    config: Config
    architecture: Architecture
    accelerator: Any
    data: CachedData
    pictures: SamplePlan
    built: Built
    start: Start
    stop: StopSignals
    control: RunControl | None
    report: Reporter


def train(parts: Parts) -> None:
    """Train from the step that the run starts with until the end.

    Raises:
        EngineError: the loss is NaN or explodes, memory or disk is full; what was saved before is
            whole.
        Stopped: a signal or command ended the run; LoRA and state of all whole steps are saved.
    """
    start, config, built = parts.start, parts.config, parts.built
    extra = start.extra
    guard = DivergenceGuard(config.training.divergence_factor)
    guard.restore(extra.get("guard", {}))
    validator = _validator(parts)
    saver = _saver(parts)
    # A run that begins with the state of another one does not go on in the other's curves.
    own = start.state_path is not None and start.files.is_own_state(start.state_path)
    logged = extra.get("tracking", {}) if own else {}
    tracking = Tracking(config, parts.report, step=start.plan.start, state=logged)
    loop = TrainingLoop(
        config=config,
        accelerator=parts.accelerator,
        items=parts.data.train,
        plan=start.plan,
        built=built,
        saver=saver,
        guard=guard,
        good_states=GoodStates(built, start.files, _beginning(start)),
        stop=parts.stop,
        between=_between(parts, validator, tracking),
        rewinds=extra.get("rewinds", 0),
        rewound_to=extra.get("rewound_to"),
    )

    def state_of_all() -> dict[str, Any]:
        return {
            "guard": guard.state(),
            "rewinds": loop.rewinds,
            "rewound_to": loop.rewound_to,
            "ended_early": loop.ended_early,
            "validation": validator.state() if validator else {},
            "tracking": tracking.state(),
        }

    saver.extra = state_of_all
    settings = compile_settings(config.training)
    with tracking if parts.control else nullcontext(), compile.explained(settings):
        loop.run()
    parts.accelerator.end_training()
    if loop.step < start.plan.total_steps and not loop.ended_early:
        parts.report(Finished("train", stopped=True))
        saved = "everything is saved" if loop.step else "there was nothing to save"
        raise Stopped(
            f"stopped after step {loop.step} of {start.plan.total_steps}; {saved}, continue with "
            "--resume"
        )


def _beginning(start: Start) -> Progress:
    return Progress(start.plan.start, start.recipe, start.data, start.extra)


def _validator(parts: Parts) -> Validator | None:
    """In the main process, if there is something to measure."""
    if parts.control is None or not parts.data.validation:
        return None
    return Validator(
        parts.config,
        parts.built.model,
        parts.data.validation,
        parts.start.files.validation,
        parts.report,
        saved=parts.start.extra.get("validation", {}),
    )


def _saver(parts: Parts) -> RunSaver:
    built, start = parts.built, parts.start
    optimizer = built.take_step.optimizer
    return RunSaver(
        config=parts.config,
        architecture=parts.architecture,
        files=start.files,
        network=built.network,
        shapes=built.shapes,
        optimizer=optimizer,
        scaler=built.take_step.scaler,
        recipe=start.recipe,
        data=start.data,
        num_items=sum(not item.is_regularization for item in parts.data.train),
        plan=start.plan,
        statistics=lambda: built.take_step.statistics,
        averaged=functools.partial(optimizers.evaluating, optimizer),
        report=parts.report,
    )


def _between(parts: Parts, validator: Validator | None, tracking: Tracking) -> Between:
    control, pictures, start = parts.control, parts.pictures, parts.start
    if control is None:
        return Between()
    control.begin(start.plan.start, start.plan.total_steps)
    take_step = parts.built.take_step
    log = RunLog(tracking, start.plan, take_step.optimizer, read_history(start.files.history))

    def sample(step: int) -> None:
        with control.during("sampling"), compile.uncompiled():
            samples.draw(
                pictures, parts.built.transformer, start.files, step, parts.report, parts.stop
            )
        log.samples(step, pictures, start.files)

    def validate(step: int) -> None:
        assert validator is not None
        with control.during("validating"), compile.uncompiled():
            log.validation(step, validator.measure(step))
        log.loss_by_time(step, take_step.statistics)

    def samples_due(step: int, ended: range) -> bool:
        wanted = samples.due(parts.config.samples, step, ended)
        return wanted and not samples.are_drawn(pictures, start.files, step)

    def rewound(step: int) -> None:
        samples.remove_after(start.files, step)
        log.rewound(step)

    return Between(
        validator=validator,
        validate=validate,
        sample=sample if pictures.pictures else None,
        samples_due=samples_due,
        commands=control.commands,
        wait_while_paused=control.wait_while_paused,
        saving=functools.partial(control.during, "saving"),
        sinks=(control.record, log.record),
        rewound=rewound,
    )
