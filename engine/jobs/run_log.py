"""What a run tells its loggers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image
from torch.optim import Optimizer

from .. import hardware, optimizers, plots
from ..loss_history import Step
from ..time_statistics import TimeStatistics
from .outputs import RunFiles
from .plan import Plan
from .sample_plan import SamplePlan
from .samples import sample_files
from .tracking import Tracking


class RunLog:
    """Turns what happens in a run into points and pictures.

    Args:
        history: the steps before, of a run that is continued.
    """

    def __init__(
        self, tracking: Tracking, plan: Plan, optimizer: Optimizer, history: Iterable[Step]
    ) -> None:
        self._tracking = tracking
        self._plan = plan
        self._optimizer = optimizer
        self._device = optimizer.param_groups[0]["params"][0].device
        self._of_epoch: list[float] = []
        for step in history:
            self._add(step)

    def record(self, step: Step, smoothed: float) -> None:
        """An optimizer step."""
        if not self._tracking.is_active:
            return
        self._tracking.log_step(
            step.step,
            loss=step.loss,
            smoothed=smoothed,
            learning_rates=optimizers.learning_rates(self._optimizer),
            seconds=step.seconds,
            gradient_norm=step.grad_norm,
            memory_mib=hardware.peak_memory_mib(self._device),
            max_norms=step.max_norms,
        )
        if (mean := self._add(step)) is not None:
            self._tracking.log_epoch(step.step, mean)

    def validation(self, step: int, loss: float) -> None:
        """A measurement."""
        self._tracking.log_validation(step, loss)

    def samples(self, step: int, plan: SamplePlan, files: RunFiles) -> None:
        """The pictures that were decoded."""
        if not self._tracking.is_active:
            return
        pictures: list[tuple[str, Image.Image]] = []
        for file in sample_files(files):
            if file.step == step and file.path.suffix == ".png":
                with Image.open(file.path) as image:
                    pictures.append((plan.pictures[file.index].prompt.text, image.convert("RGB")))
        if pictures:
            self._tracking.log_images(step, pictures)

    def loss_by_time(self, step: int, statistics: TimeStatistics) -> None:
        """The mean loss at each noise level so far."""
        if self._tracking.is_active and step:
            counts = statistics.count.tolist()
            means = (statistics.loss_sum / statistics.count.clamp(min=1)).tolist()
            if sum(counts):
                plot = plots.loss_by_time(means, counts, title=f"loss up to step {step}")
                self._tracking.log_loss_by_time(step, plot)

    def rewound(self, step: int) -> None:
        """The run repeats what came after ``step``."""
        self._of_epoch.clear()
        self._tracking.rewind(step)

    def _add(self, step: Step) -> float | None:
        """The mean loss of the epochs that end with this step, if any do."""
        self._of_epoch.append(step.loss)
        if not self._plan.ended_epochs(step.step):
            return None
        mean = math.fsum(self._of_epoch) / len(self._of_epoch)
        self._of_epoch.clear()
        return mean
