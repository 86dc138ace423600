"""Writes what a training run has reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import hardware, lora_file, training_state
from ..architectures.base import Architecture
from ..atomic_file import write_text
from ..config import Config
from ..config_file import to_toml
from ..events import Reporter, Saved
from ..lora import LoRANetwork
from . import outputs


@dataclass
class RunSaver:
    """Owns the files of one run; only the main process of several lets it write.

    Args:
        shapes: (out, in) of every layer of the model that a LoRA may name.
        recipe: the settings that decide the result.
        data: identity of the training data.
    """

    config: Config
    architecture: Architecture
    files: outputs.RunFiles
    network: LoRANetwork
    shapes: lora_file.LinearShapes
    optimizer: Optimizer
    scaler: GradScaler
    recipe: dict[str, Any]
    data: str
    num_items: int
    total_steps: int
    report: Reporter
    started: float = field(default_factory=time.time)
    last_save: float = field(default_factory=time.monotonic)

    def save(self, step: int, epoch: int) -> None:
        """The LoRA under its final name, the recipe beside it, and the state."""
        self.save_lora(self.files.lora, step, epoch)
        with outputs.explained(self.files.recipe):
            write_text(self.files.recipe, to_toml(self.config))
        self.report(Saved(str(self.files.recipe), "recipe", step))
        self.save_state(step)

    def save_lora(self, path: Path, step: int, epoch: int) -> None:
        """The LoRA after ``step`` optimizer steps, in ``save_precision``, checked."""
        config = self.config
        metadata = outputs.modelspec_metadata(config, self.architecture)
        metadata |= outputs.lora_metadata(
            config,
            self.architecture,
            step=step,
            total_steps=self.total_steps,
            epoch=epoch,
            num_items=self.num_items,
            started=self.started,
        )
        with outputs.explained(path):
            lora_file.save_lora(
                path,
                self.network.weights(),
                self.shapes,
                dtype=hardware.DTYPES[config.output.save_precision],
                metadata=metadata,
            )
        self.report(Saved(str(path), "lora", step))

    def save_state(self, step: int) -> None:
        """Only what is needed to continue."""
        progress = training_state.Progress(step, self.recipe, self.data)
        with outputs.explained(self.files.state):
            training_state.save_state(
                self.files.state, self.network, self.optimizer, self.scaler, progress
            )
        self.last_save = time.monotonic()
        self.report(Saved(str(self.files.state), "state", step))

    def save_if_due(
        self, step: int, epoch: int, ended: range, *, before: Callable[[], None]
    ) -> None:
        """Save what the settings ask for after ``step`` optimizer steps.

        Args:
            epoch: the one that the step is in.
            ended: the epochs, counted from 1, whose last batch is in the step.
            before: called first if anything is going to be saved.
        """
        output = self.config.output
        every = output.save_every_n_epochs
        due = [self.files.lora_at_epoch(each) for each in ended if every and each % every == 0]
        if output.save_every_n_steps and step % output.save_every_n_steps == 0:
            due.append(self.files.lora_at_step(step))
        overdue = time.monotonic() - self.last_save > output.autosave_minutes * 60
        if not due and not (output.autosave_minutes and overdue):
            return
        before()
        for path in due:
            self.save_lora(path, step, epoch)
        # Last, so that a run that is killed here makes the files above once more.
        self.save_state(step)
