"""The steps of a training run, and what is done between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from .. import compile, optimizers
from ..config import Config
from ..dataset import Batch, BatchReader, CachedItem
from ..errors import EngineError, NotFiniteError
from ..events import Message
from ..loss_history import LossHistory, Smoothed
from ..signals import Stopped, StopSignals
from .build import Built
from .guard import Diverged, DivergenceGuard
from .plan import Plan, batches_to_come
from .rewind import GoodStates
from .run_control import Commands
from .saving import RunSaver
from .step import StepResult
from .step_log import Sink, StepLog
from .validation import Validator

_MOST_REWINDS = 3


@dataclass(frozen=True)
class Between:
    """What the main process does besides training; the others have an empty one.

    Args:
        validate: lets the validator measure; is told the step.
        sample: draws the sample prompts; is told the step.
        samples_due: whether it is time, after a step that ended these epochs, and they are not
            there yet.
        commands: what the user asked for since the last call.
        wait_while_paused: waits for more of that, as long as the run is to pause.
        saving: gives the context in which files are saved.
        sinks: are told every step.
        rewound: is told the step that the run goes back to.
    """

    validator: Validator | None = None
    validate: Callable[[int], None] = lambda step: None
    sample: Callable[[int], None] | None = None
    samples_due: Callable[[int, range], bool] = lambda step, ended: False
    commands: Callable[[], Commands] = Commands
    wait_while_paused: Callable[[], Commands] = Commands
    saving: Callable[[], AbstractContextManager[None]] = nullcontext
    sinks: Sequence[Sink] = ()
    rewound: Callable[[int], None] = lambda step: None


@dataclass
class TrainingLoop:
    """Owns a run from its first step to its last.

    Attributes:
        step: optimizer steps that are done.
        rewinds: how often the run went back; each time its learning rate is halved.
        rewound_to: the step that it went back to last.
        ended_early: the validation loss does not fall any more.
    """

    config: Config
    accelerator: Any
    items: Sequence[CachedItem]
    plan: Plan
    built: Built
    saver: RunSaver
    guard: DivergenceGuard
    good_states: GoodStates
    stop: StopSignals
    between: Between
    rewinds: int = 0
    rewound_to: int | None = None
    step: int = 0
    ended_early: bool = False
    _told_to_stop: bool = False
    _memory_error: torch.OutOfMemoryError | None = None

    def run(self) -> None:
        """Train until the end, or until the user or the validation ends it; then save all.

        Raises:
            EngineError: the loss is NaN or explodes, memory or disk is full; what was reached
                before is saved.
        """
        self.step = self.plan.start
        if self.accelerator.num_processes > 1:
            self.stop.hold()  # they stop together, see _over_processes
        self._set_fixed_rate()
        self._make_up_samples()
        while True:
            try:
                self._train()
                self._measure_at_the_end()
                self._save_all()
                break
            except NotFiniteError as error:
                if self.accelerator.num_processes > 1:
                    raise  # the others do not know of it and would wait for this one's gradients
                self._go_back(Diverged(self.step, str(error).partition(":")[2].partition(",")[0]))
            except Diverged as diverged:
                self._go_back(diverged)
            if self.stop.requested:
                self._save_all()
                break
        if self._memory_error:
            raise EngineError(
                f"out of memory in step {self.step + 1}; everything before it is saved. Turn on "
                "gradient_checkpointing and use --resume, or start again with a smaller "
                "resolution or batch_size"
            ) from self._memory_error

    @property
    def rate_scale(self) -> float:
        """What the learning rate is multiplied with because the run went back."""
        return 0.5**self.rewinds

    def _train(self) -> None:
        """Steps from ``self.step`` on, until something ends them.

        Raises:
            Diverged: the loss is NaN or explodes.
        """
        device = self.built.take_step.parameters[0].device
        order = batches_to_come(
            self.config,
            self.items,
            dataclasses.replace(self.plan, start=self.step),
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        pin = device.type == "cuda"
        with ExitStack() as stack:
            history = stack.enter_context(self._history())
            reader = stack.enter_context(BatchReader(self.items, order, pin_memory=pin))
            log = self._log(history)
            batches = ((index, _to(batch, device)) for index, batch in reader)
            try:
                while self.step < self.plan.total_steps and not self._ends(log):
                    self._take_step(log, batches)
                self.stop.hold()
            except Stopped:
                pass
            except torch.OutOfMemoryError as error:
                # The adapters are still those of the last step. What the failed one computed is
                # kept alive by the traceback and would be in the way of saving.
                self._memory_error = error.with_traceback(None)
            log.flush()

    def _ends(self, log: StepLog) -> bool:
        if self.accelerator.num_processes > 1:
            return log.stop_requested  # all processes have read the same
        return self._told_to_stop or self.ended_early

    def _take_step(self, log: StepLog, batches: Iterator[tuple[int, Batch]]) -> None:
        take_step, plan = self.built.take_step, self.plan
        wanted = self._obey(log)
        if self._told_to_stop and self.accelerator.num_processes == 1:
            return
        settings = self.config.optimizer
        rate = settings.learning_rate * plan.multiplier(self.step) * self.rate_scale
        if optimizers.uses_schedule(take_step.optimizer):
            optimizers.set_learning_rate(take_step.optimizer, rate)
        per_process = plan.batches_per_step // self.accelerator.num_processes
        graphs = compile.compiled_graphs()
        result = take_step.accumulate(islice(batches, per_process), per_process)
        with self.stop.shield():
            norm = take_step.update()
            self.step += 1
            asked = self.stop.requested or self._told_to_stop or self.ended_early
            result, flag = _over_processes(self.accelerator, result, asked)
            epoch = plan.epoch_after(self.step)
            usual = graphs == compile.compiled_graphs()  # to compile takes long
            log.record(
                self.step,
                epoch,
                rate,
                result,
                norm=norm,
                max_norms=take_step.max_norms,
                stop=flag,
                is_usual=usual,
            )
            if self.accelerator.is_main_process:
                self._between_steps(log, wanted)

    def _make_up_samples(self) -> None:
        """Those before the first step, or those that a signal cut off in an earlier process."""
        sample, ended = self.between.sample, self._ended_epochs() if self.step else range(0)
        if sample and self.between.samples_due(self.step, ended):
            with self.saver.averaged():
                sample(self.step)

    def _obey(self, log: StepLog) -> Commands:
        """Do what the user wants now; gives what is wanted after the next step."""
        commands = self.between.commands()
        if commands.pause:
            with log.excluded():
                while commands.pause and not commands.stop:
                    self._on_request(log, commands)
                    commands = self.between.wait_while_paused()
        self._told_to_stop |= commands.stop
        return commands

    def _on_request(self, log: StepLog, asked: Commands) -> None:
        """What the user wants of the steps that are done."""
        if asked.sample and self.between.sample:
            with self.saver.averaged():
                self.between.sample(self.step)
        if asked.save and not self.step:
            self.saver.report(Message("there is nothing to save before the first step"))
        elif asked.save:
            log.flush()
            with self.between.saving():
                self.saver.save(self.step)

    def _between_steps(self, log: StepLog, wanted: Commands) -> None:
        step, ended = self.step, self._ended_epochs()
        validator, sample = self.between.validator, self.between.sample
        if validator and validator.due(step, ended):
            with log.excluded():
                self._validate(validator)
        if sample and (wanted.sample or self.between.samples_due(step, ended)):
            with log.excluded(), self.saver.averaged():
                sample(step)
        self.saver.save_if_due(
            step,
            ended,
            before=log.flush,
            autosave=self.guard.is_calm,
            now=wanted.save,
        )

    def _ended_epochs(self) -> range:
        return self.plan.ended_epochs(self.step)

    def _validate(self, validator: Validator) -> None:
        with self.saver.averaged():
            self.between.validate(self.step)
        if validator.is_best and self.config.validation.keep_best:
            self.saver.save_lora(self.saver.files.best, self.step)
        if validator.should_stop and not self.ended_early:
            self.ended_early = True
            patience = self.config.validation.early_stop_patience
            self.saver.report(
                Message(
                    f"ended after step {self.step}: {patience} measurements in a row found no "
                    f"lower validation loss than {validator.best_loss:.5g} after step "
                    f"{validator.best_step}"
                    if validator.best_step
                    else f"ended after step {self.step}: no measurement gave a validation loss"
                )
            )

    def _measure_at_the_end(self) -> None:
        validator = self.between.validator
        if validator and self.step == self.plan.total_steps and self.step != validator.last_step:
            self._validate(validator)

    def _go_back(self, diverged: Diverged) -> None:
        """Restore the last good state, with half the learning rate or for the last time."""
        self.accelerator.wait_for_everyone()
        gives_up = self.config.training.on_divergence == "stop" or self.rewinds == _MOST_REWINDS
        # Of a state that it went back to before, the first step has gone wrong again.
        again = self.rewound_to is not None and diverged.step == self.rewound_to + 1
        again = again and not gives_up
        progress = self.good_states.restore(before=diverged.step - again)
        self.step = self.rewound_to = progress.step
        self.ended_early = False
        extra = progress.extra
        self.guard.restore(extra.get("guard", {}))
        if self.between.validator:
            self.between.validator.restore(extra.get("validation", {}))
        self.between.rewound(self.step)
        self.rewinds += not gives_up
        self._set_fixed_rate()
        with self._history():
            pass  # drops the steps after this one
        if gives_up:
            self._save_all()
            saved = f"step {self.step} was good and is saved"
            saved = saved if self.step else "there was nothing good to save"
            raise EngineError(
                f"{diverged}, so the run went back; {saved}. Start again with a lower learning_rate"
            )
        self.saver.report(
            Message(
                f"{diverged}, so the run went back to step {self.step} and goes on with "
                f"{self.rate_scale:g} times the learning rate",
                level="warning",
            )
        )
        if self.accelerator.is_main_process:
            self.saver.save_state(self.saver.files.state, self.step)
        self.accelerator.wait_for_everyone()

    def _set_fixed_rate(self) -> None:
        """For an optimizer that follows no schedule."""
        optimizer = self.built.take_step.optimizer
        if self.rewinds and not optimizers.uses_schedule(optimizer):
            rate = self.config.optimizer.learning_rate * self.rate_scale
            optimizers.set_learning_rate(optimizer, rate)

    def _save_all(self) -> None:
        if self.accelerator.is_main_process and self.step:
            with self.between.saving():
                self.saver.save(self.step)
        self.accelerator.wait_for_everyone()

    def _history(self) -> AbstractContextManager[LossHistory | None]:
        if not self.accelerator.is_main_process:
            return nullcontext()
        return LossHistory(self.saver.files.history, resume_step=self.step)

    def _log(self, history: LossHistory | None) -> StepLog:
        sinks: list[Sink] = list(self.between.sinks)
        if history:
            sinks.insert(0, lambda step, smoothed: history.append(step))
        return StepLog(
            self.guard.observe,
            sinks,
            self.saver.report,
            total_steps=self.plan.total_steps,
            smoothed=Smoothed(history.kept if history else ()),
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


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
