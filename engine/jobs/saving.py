"""Writes what a training run has reached."""

from __future__ import annotations

import time
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
    """Owns the files of one run. Only the main process has one.

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
    report: Reporter
    started: float = field(default_factory=time.time)
    last_save: float = field(default_factory=time.monotonic)

    def save(self, step: int, epoch: int) -> None:
        """The LoRA under its final name, the recipe beside it, and the state."""
        self.save_lora(self.files.lora, step, epoch)
        write_text(self.files.recipe, to_toml(self.config))
        self.report(Saved(str(self.files.recipe), "recipe", step))
        self.save_state(step)

    def save_lora(self, path: Path, step: int, epoch: int) -> None:
        """The LoRA after ``step`` optimizer steps, in ``save_precision``, checked."""
        config, name = self.config, self.architecture.name
        metadata = outputs.modelspec_metadata(config, self.architecture.modelspec_architecture)
        metadata |= outputs.lora_metadata(
            config, name, step=step, epoch=epoch, num_items=self.num_items, started=self.started
        )
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
        training_state.save_state(
            self.files.state, self.network, self.optimizer, self.scaler, progress
        )
        self.last_save = time.monotonic()
        self.report(Saved(str(self.files.state), "state", step))

    def save_if_due(self, step: int, epoch: int, *, epoch_ended: bool) -> None:
        """Save what the settings ask for after ``step`` optimizer steps."""
        output = self.config.output
        at_step = bool(output.save_every_n_steps) and step % output.save_every_n_steps == 0
        at_epoch = (
            bool(output.save_every_n_epochs)
            and epoch_ended
            and epoch % output.save_every_n_epochs == 0
        )
        if at_step:
            self.save_lora(self.files.lora_at_step(step), step, epoch)
        if at_epoch:
            self.save_lora(self.files.lora_at_epoch(epoch), step, epoch)
        overdue = time.monotonic() - self.last_save > output.autosave_minutes * 60
        if at_step or at_epoch or (output.autosave_minutes and overdue):
            self.save_state(step)
