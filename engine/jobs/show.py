"""Shows what a training would do instead of training: its noise levels, its learning rates.

No model is loaded, and data only looked at where the length of the run depends on it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import flow, optimizers, plots, plugins, text_charts
from ..architectures import ARCHITECTURES, find_architecture
from ..architectures.base import Architecture
from ..atomic_file import replacing
from ..config import Config, OptimizerConfig
from ..errors import ConfigError
from ..events import Finished, Message, Reporter, Saved
from ..optimizer_classes import ParameterGroup
from ..text_charts import Row
from . import cache
from .outputs import explained
from .plan import plan_run, schedule_of
from .times import sample_times, sampling_of, timestep_settings

_DRAWS = 100_000
_ROWS = 20
_MOST_EDGES = 12  # of strata that are named one by one
_MOST_POINTS = 4000  # of a curve; a picture has fewer columns


def run(config: Config, report: Reporter) -> bool:
    """Show what ``show_timesteps`` and ``show_lr_scheduler`` ask for; whether that was anything.

    Raises:
        EngineError: a setting or the data cannot be used, or a picture not be written.
    """
    times, rates = config.runtime.show_timesteps, config.runtime.show_lr_scheduler
    if not times and not rates:
        return False
    if times:
        timesteps(config, report, as_image=times == "image")
    if rates:
        lr_schedule(config, report, as_image=rates == "image")
    report(Finished("train"))
    return True


# Noise levels


def timesteps(config: Config, report: Reporter, *, as_image: bool) -> None:
    """How often each noise level would be trained, in pictures of the size ``resolution``.

    Raises:
        ConfigError: there is none in the range.
        CheckpointError: ``dit`` is given and no model of a family we know.
    """
    architecture = _family(config, report)
    settings = timestep_settings(config.timesteps)
    # Every draw stands for an equal part of the distribution, so nothing is left to chance.
    t_N = _times(config, architecture, (torch.arange(_DRAWS, dtype=torch.float64) + 0.5) / _DRAWS)
    num_strata = config.timesteps.num_timestep_buckets or 1
    inner = torch.arange(1, num_strata, dtype=torch.float64) / num_strata
    edges = _times(config, architecture, inner).tolist() if num_strata > 1 else []
    width, height = config.dataset.resolution
    title = f"{sampling_of(config.timesteps, architecture)}, pictures of {width}x{height}"
    if as_image:
        image = plots.time_histogram(
            t_N.tolist(),
            title=title,
            low=settings.low,
            high=settings.high,
            weight=flow.LOSS_WEIGHTS.get(config.timesteps.weighting_scheme),
            edges=edges if len(edges) <= _MOST_EDGES else (),
        )
        _save(image, config, "timesteps", report)
    else:
        report(Message(f"{title}\n{_time_table(config, t_N)}\n{_in_words(config, t_N, edges)}"))


def _family(config: Config, report: Reporter) -> Architecture:
    """The family that the settings say, or the first one if they say nothing of it."""
    if config.model.architecture != "auto" or config.model.dit:
        return find_architecture(config.model.architecture, config.model.dit)
    name, architecture = next(iter(ARCHITECTURES.items()))
    report(Message(f"neither architecture nor dit is given; this is shown for {name}"))
    return architecture


def _times(config: Config, architecture: Architecture, draws_N: Tensor) -> Tensor:
    width, height = (side // architecture.pixels_per_latent for side in config.dataset.resolution)
    try:
        return sample_times(config.timesteps, architecture)(draws_N, height, width)
    except ValueError as error:
        raise ConfigError(
            f"min_timestep, max_timestep: {error}; widen the range, or turn "
            "preserve_distribution_shape off"
        ) from None


def _time_table(config: Config, t_N: Tensor) -> str:
    """The range that is trained in equal rows; the bars show the density."""
    low, high = config.timesteps.min_timestep, config.timesteps.max_timestep
    step = -(-(high - low) // _ROWS)
    starts = range(low, high, step)
    bins_N = ((t_N.double() * 1000 - low) / step).long().clamp(0, len(starts) - 1)
    shares = (torch.bincount(bins_N, minlength=len(starts)).double() / len(t_N)).tolist()
    weight = flow.LOSS_WEIGHTS.get(config.timesteps.weighting_scheme)
    rows: list[Row] = []
    for start, share in zip(starts, shares, strict=True):
        end = min(start + step, high)
        cells = (f"{start} - {end:4}", f"{share:.2%}")
        if weight:
            middle = torch.tensor((start + end) / 2000)
            cells = (*cells, f"{weight(middle):#.3g}")
        rows.append(Row(cells, share / (end - start)))
    headings = ("noise level", "share", "loss weight") if weight else ("noise level", "share")
    return text_charts.bar_chart(headings, rows, width=shutil.get_terminal_size().columns)


def _in_words(config: Config, t_N: Tensor, edges: list[float]) -> str:
    """What the bars do not say."""
    low, high = config.timesteps.min_timestep, config.timesteps.max_timestep
    sentences = [f"half of all are below {t_N.median() * 1000:.0f} of 1000"]
    if (low, high) != (0, 1000):
        how = "cut out of" if config.timesteps.preserve_distribution_shape else "squeezed from"
        sentences.append(f"the range {low} to {high} is {how} the whole")
    if edges:
        between = " ".join(f"{edge * 1000:.0f}" for edge in edges)
        places = f", which meet at {between}" if len(edges) <= _MOST_EDGES else ""
        sentences.append(f"each epoch draws equally often from {len(edges) + 1} parts{places}")
    return "\n".join(sentences)


# Learning rates


def lr_schedule(config: Config, report: Reporter, *, as_image: bool) -> None:
    """The learning rate of every optimizer step.

    Raises:
        ConfigError: the schedule or optimizer cannot be, or the length of the run not be known.
        DataError: the run is counted in epochs and the data cannot be used.
    """
    allowed = plugins.allowed_packages(os.environ)
    settings = _followed(config.optimizer, allowed, report)
    if settings is None:
        return
    total = config.training.max_train_steps
    if config.training.max_train_epochs:
        total = _steps_of_epochs(config, report)
    multiplier = schedule_of(settings, total, allowed=allowed, report=report)
    title = f"{settings.lr_scheduler_type or settings.lr_scheduler}, {total:,} steps"
    chosen = _spread(total, _MOST_POINTS if as_image else _ROWS)
    rates = [settings.learning_rate * multiplier(step) for step in chosen]
    if as_image:
        numbers = [step + 1 for step in chosen]
        _save(plots.rate_curve(numbers, rates, title=title), config, "lr_scheduler", report)
        return
    rows = [
        Row((f"{step + 1:,}", f"{rate:.2e}"), rate)
        for step, rate in zip(chosen, rates, strict=True)
    ]
    width = shutil.get_terminal_size().columns
    chart = text_charts.bar_chart(("step", "learning rate"), rows, width=width)
    report(Message(f"{title}\n{chart}"))


def _followed(
    settings: OptimizerConfig, allowed: Collection[str], report: Reporter
) -> OptimizerConfig | None:
    """The settings of the schedule that the optimizer follows, which may be none."""
    name = settings.optimizer_type
    optimizer = optimizers.create(
        name,
        [ParameterGroup("lora", [torch.nn.Parameter(torch.zeros(2, 2))])],
        lr=settings.learning_rate,
        arguments=settings.arguments,
        allowed=allowed,
    )
    if optimizers.uses_schedule(optimizer):
        return settings
    if optimizer.param_groups[0]["lr"] is None:
        report(Message(f"{name} finds its learning rates itself; there is nothing to show"))
        return None
    if settings.lr_scheduler_type or not settings.lr_scheduler.startswith("constant"):
        report(Message(f"{name} uses no lr_scheduler, only the warm-up", "warning"))
    changes = {"lr_scheduler": "constant", "lr_scheduler_type": None, "lr_scheduler_args": []}
    changes |= {"lr_scheduler_min_lr_ratio": None}
    if own := settings.arguments.get("warmup_steps"):
        changes |= {"lr_warmup_steps": own}
    return settings.model_copy(update=changes)


def _steps_of_epochs(config: Config, report: Reporter) -> int:
    """The length of a run that depends on the data."""
    config.require("image_directory")
    todo = cache.plan(config, _family(config, report))
    if todo.stale_latents or todo.stale_text:
        raise ConfigError(
            "max_train_epochs: how many steps they have is known when all images are in the "
            "cache; run the cache job first, or give max_train_steps instead"
        )
    items = cache.data_of(config, todo).train
    return plan_run(config, items, num_processes=1, start=0).total_steps


def _spread(count: int, most: int) -> list[int]:
    """``range(count)``, or that many of it with the first and the last."""
    if count <= most:
        return list(range(count))
    return [index * (count - 1) // (most - 1) for index in range(most)]


def _save(image: Image.Image, config: Config, what: str, report: Reporter) -> None:
    folder, name = config.output.output_dir or Path(), config.output.output_name or "training"
    path = folder / f"{name}.{what}.png"
    with explained(path), replacing(path) as temporary:
        image.save(temporary, "PNG")
    report(Saved(str(path), "plot"))
