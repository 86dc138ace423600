"""Writes what a training run has reached."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import hardware, lora_file, training_state
from ..architectures.base import Architecture
from ..atomic_file import write_text
from ..config import Config
from ..config_file import to_toml
from ..events import Message, Reporter, Saved
from ..networks.network import Network
from ..time_statistics import TimeStatistics
from . import metadata, outputs
from .plan import Plan

STATISTICS = "statistics."  # what the names of their tensors in a state begin with


@dataclass
class RunSaver:
    """Owns the files of one run; only the main process of several lets it write.

    Args:
        shapes: of the weight of every layer of the model that a LoRA may name.
        recipe: the settings that decide the result.
        data: identity of the training data.
        statistics: gives the loss at each noise level.
        averaged: gives a context in which the LoRA is the one to use, which some optimizers keep
            apart from the one that they train.
        extra: gives what else a continued run must know, as JSON.
    """

    config: Config
    architecture: Architecture
    files: outputs.RunFiles
    network: Network
    shapes: lora_file.LayerShapes
    optimizer: Optimizer
    scaler: GradScaler
    recipe: dict[str, Any]
    data: str
    num_items: int
    plan: Plan
    statistics: Callable[[], TimeStatistics]
    averaged: Callable[[], AbstractContextManager[None]]
    report: Reporter
    extra: Callable[[], dict[str, Any]] = dict
    started: float = field(default_factory=time.time)
    last_save: float = field(default_factory=time.monotonic)

    def save(self, step: int) -> None:
        """The LoRA under its final name, the recipe beside it, and the state."""
        self.save_lora(self.files.lora, step)
        with outputs.explained(self.files.recipe):
            write_text(self.files.recipe, to_toml(self.config))
        self.report(Saved(str(self.files.recipe), "recipe", step))
        self.save_state(self.files.state, step)

    def save_lora(self, path: Path, step: int) -> None:
        """The LoRA after ``step`` optimizer steps, in ``save_precision``, checked."""
        config = self.config
        facts = metadata.lora_metadata(
            config,
            self.architecture,
            self.plan,
            step=step,
            num_items=self.num_items,
            started=self.started,
        )
        with self.averaged(), outputs.explained(path):
            remarks = lora_file.save_adapters(
                path,
                self.network.weights(),
                self.architecture.layer_names,
                self.shapes,
                format=config.output.save_format,
                dtype=hardware.DTYPES[config.output.save_precision],
                metadata=facts,
            )
        for remark in remarks:
            self.report(Message(remark))
        self.report(Saved(str(path), "lora", step))

    def save_state(self, path: Path, step: int) -> None:
        """Only what is needed to continue, and the loss at each noise level for whoever looks."""
        progress = training_state.Progress(step, self.recipe, self.data, self.extra())
        tensors = {f"{STATISTICS}{name}": each for name, each in self.statistics().state().items()}
        with outputs.explained(path):
            training_state.save_state(
                path, self.network, self.optimizer, self.scaler, progress, extra_tensors=tensors
            )
        if path == self.files.state:
            with outputs.explained(self.files.loss_by_time):
                write_text(self.files.loss_by_time, _as_json(self.statistics()))
            self.last_save = time.monotonic()
        self.report(Saved(str(path), "state", step))

    def save_if_due(
        self,
        step: int,
        ended: range,
        *,
        before: Callable[[], None],
        autosave: bool = True,
        now: bool = False,
    ) -> None:
        """Save what the settings ask for after ``step`` optimizer steps.

        Args:
            ended: the epochs, counted from 1, whose last batch is in the step.
            before: called first if anything is going to be saved.
            autosave: whether the state may be saved because it is time.
            now: the user asks for it.
        """
        output = self.config.output
        every = output.save_every_n_epochs
        due = [self.files.lora_at_epoch(each) for each in ended if every and each % every == 0]
        if output.save_every_n_steps and step % output.save_every_n_steps == 0:
            due.append(self.files.lora_at_step(step))
        overdue = time.monotonic() - self.last_save > output.autosave_minutes * 60
        overdue = autosave and overdue and bool(output.autosave_minutes)
        if not due and not overdue and not now:
            return
        before()
        for path in due:
            self.save_lora(path, step)
            if output.save_state:
                self.save_state(path.with_suffix(".state"), step)
        if now:
            self.save(step)
        else:
            # Last, so that a run that is killed here makes the files above once more.
            self.save_state(self.files.state, step)
        self._remove_old(step, epoch=ended[-1] if ended else 0)

    def _remove_old(self, step: int, *, epoch: int) -> None:
        """Remove what ``save_last_n_...`` does not keep; of steps it counts steps, of epochs files.

        That is how kohya's scripts, from which the settings come, count them.
        """
        output = self.config.output
        kept = {
            (".safetensors", "step"): output.save_last_n_steps,
            (".safetensors", "epoch"): output.save_last_n_epochs,
            (".state", "step"): output.save_last_n_steps_state or output.save_last_n_steps,
            (".state", "epoch"): output.save_last_n_epochs_state or output.save_last_n_epochs,
        }
        reached = {"step": step, "epoch": epoch}
        every = {"step": 1, "epoch": output.save_every_n_epochs or 1}
        for (ending, unit), number in kept.items():
            if number is None:
                continue
            oldest = reached[unit] - number * every[unit] + (1 if unit == "epoch" else 0)
            for path, (its_unit, at) in self.files.numbered(ending).items():
                if its_unit == unit and at < oldest:
                    path.unlink(missing_ok=True)


def _as_json(statistics: TimeStatistics) -> str:
    """The loss at each noise level; none where nothing was trained."""
    counts: Mapping[str, Tensor] = statistics.state()
    num = [int(count) for count in counts["count"].tolist()]
    sums = counts["loss_sum"].tolist()
    means = [total / count if count else None for total, count in zip(sums, num, strict=True)]
    edges = [index / len(num) for index in range(len(num) + 1)]
    return json.dumps({"edges": edges, "mean": means, "count": num})
