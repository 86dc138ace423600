"""The loss of images that are not trained, at noise and times that never change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import seeds
from ..config import Config
from ..dataset import BatchReader, CachedItem
from ..evaluation import evaluating
from ..events import Message, Progress, Reporter
from ..validation_history import Measurement, append_measurement, drop_after
from .objective import objective_of
from .outputs import explained
from .step import held_out_loss


@dataclass
class Validator:
    """Measures, and remembers what was best; one per run, in its main process.

    The noise of an image depends on the run's seed and the image alone, and each image is a batch
    of its own. So the loss is comparable between steps, and between runs of the same seed
    whatever their batch size; images that are added or removed leave the loss of the others. It
    is measured as in training (``loss_type``, masks), but weighed alike at all times.

    Args:
        model: gives velocities; a `VelocityModel` without DDP's wrapper.
        path: file of the measurements.
        saved: what `state` gave when the state was saved that the run continues from.

    Attributes:
        last_step: steps that were done at the last measurement; 0 before the first.
        best_step, best_loss: of the lowest finite loss; None before there is one.
        since_best: measurements after the best one, or all if there is none.
    """

    config: Config
    model: nn.Module
    items: Sequence[CachedItem]
    path: Path
    report: Reporter
    saved: Mapping[str, Any] = field(default_factory=dict)
    last_step: int = field(default=0, init=False)
    best_step: int | None = field(default=None, init=False)
    best_loss: float | None = field(default=None, init=False)
    since_best: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.restore(self.saved)

    @property
    def times(self) -> tuple[float, ...]:
        """The middles of ``validation_times`` equal parts of the range that is trained."""
        count = self.config.validation.validation_times
        low = self.config.timesteps.min_timestep / 1000
        high = self.config.timesteps.max_timestep / 1000
        return tuple(low + (high - low) * (index + 0.5) / count for index in range(count))

    @property
    def is_best(self) -> bool:
        """Whether the last measurement is the best."""
        return self.best_step is not None and self.best_step == self.last_step

    @property
    def should_stop(self) -> bool:
        """Whether ``early_stop_patience`` measurements were not better than the best."""
        patience = self.config.validation.early_stop_patience
        return patience is not None and self.since_best >= patience

    def due(self, step: int, ended_epochs: range) -> bool:
        """Whether to measure after ``step`` optimizer steps, the last of which ended these epochs.

        Never twice after the same step. A run that was stopped before it could measure may ask
        again when it continues.
        """
        if step == 0 or step == self.last_step:
            return False
        every = self.config.validation.validate_every_n_steps
        return bool(ended_epochs) if every is None else step % every == 0

    def measure(self, step: int) -> float:
        """The mean loss over images and times, which is also written and remembered.

        The model is in evaluation mode meanwhile; no random number generator moves.

        Raises:
            EngineError: an image cannot be read from the cache, or the measurement not be written.
        """
        losses = self._losses()
        loss = math.fsum(losses) / len(losses)
        append_measurement(self.path, Measurement(step, loss, self.times, losses))
        self.last_step = step
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.since_best = step, loss, 0
        else:
            self.since_best += 1
        self.report(self._in_words(step, loss))
        return loss

    def state(self) -> dict[str, Any]:
        """What a run that continues must know, as JSON."""
        return {
            "last_step": self.last_step,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "since_best": self.since_best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state`, or to the beginning if it is empty; later lines are dropped.

        Raises:
            EngineError: the file of the measurements cannot be written.
        """
        self.last_step = state.get("last_step", 0)
        self.best_step = state.get("best_step")
        self.best_loss = state.get("best_loss")
        self.since_best = state.get("since_best", 0)
        with explained(self.path):
            drop_after(self.path, self.last_step)

    def _losses(self) -> tuple[float, ...]:
        """The mean over all images at each of the times."""
        by_image: list[list[float]] = []
        with evaluating(self.model):
            for item, batch in self._images():
                # Of the content, not the place: it stays when another image is added.
                seed = seeds.derive(self.config.runtime.seed, f"validation noise {item.content}")
                by_image.append(
                    [
                        held_out_loss(
                            self.model,
                            [batch],
                            times=[t],
                            guidance=self.config.timesteps.guidance_scale,
                            seed=seed,
                            objective=objective_of(self.config.loss),
                        )
                        for t in self.times
                    ]
                )
                self.report(Progress("validation", len(by_image), len(self.items), unit="image"))
        return tuple(math.fsum(column) / len(column) for column in zip(*by_image, strict=True))

    def _images(self) -> Iterator[tuple[CachedItem, dict[str, Tensor]]]:
        device = next(self.model.parameters()).device
        order = ((index, (index,)) for index in range(len(self.items)))
        with BatchReader(self.items, order, keep_bytes=0) as reader:
            for index, batch in reader:
                on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                yield self.items[index], on_device

    def _in_words(self, step: int, loss: float) -> Message:
        if not math.isfinite(loss):
            return Message(f"the validation loss after step {step} is {loss}", level="warning")
        best = "the lowest so far"
        if not self.is_best and self.best_loss is not None:
            best = f"the lowest was {self.best_loss:.5g} after step {self.best_step}"
        return Message(f"validation loss after step {step}: {loss:.5g}, {best}")
