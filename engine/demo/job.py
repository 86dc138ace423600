"""``python -m engine demo``: teaches the embedded tiny model a creature and shows the difference.

The steps are those of a real run, through the same jobs: cache, train, generate. Only the scores
at the end are the demo's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .. import hardware, media
from ..config import (
    Config,
    DatasetConfig,
    GenerateConfig,
    ModelConfig,
    NetworkConfig,
    OptimizerConfig,
    OutputConfig,
    RuntimeConfig,
    TrainingConfig,
)
from ..dataset import BatchReader
from ..errors import ConfigError
from ..events import Message, Reporter, Saved, silent
from ..jobs import cache, generate, train
from ..jobs.outputs import RunFiles
from ..jobs.step import VelocityModel, held_out_loss
from ..loss_history import read_history
from ..plots import loss_curve
from . import draw, measure
from .concept import HELD_OUT
from .grid import save_grid
from .pictures import SIDE

NAME = "loomling"
STEPS = 400
_HERE = Path(__file__).parent
_SEEDS = (7, 8, 9, 10)  # the pictures of the first are shown
_LOSS_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
_NUM_THREADS = 1  # two threads on a model this small wait for each other most of the time


@dataclass(frozen=True)
class Result:
    """What the demo measured; "before" is the base model alone, "after" has the LoRA.

    ``loss`` is the mean flow-matching loss on held-out creatures, ``similarity`` the mean
    structural similarity of generated to real held-out pictures, ``eyes`` the share of creatures
    with their eye in place; each is (before, after).
    """

    loss: tuple[float, float]
    similarity: tuple[float, float]
    eyes: tuple[float, float]
    step_seconds: float
    peak_memory_mib: float
    seconds: float


def run(output: Path, report: Reporter, *, steps: int | None = None) -> Result:
    """Run everything; results go into ``output``, where an earlier demo is replaced.

    Raises:
        ConfigError: ``output`` holds something else, or ``steps`` is below 1.
        Stopped: a signal ended the demo.
    """
    start = time.perf_counter()
    _check(output, steps)
    torch.set_num_threads(_NUM_THREADS)
    config = _config(output, STEPS if steps is None else steps)
    report(Message("Before: the base model draws the held-out captions."))
    before = _pictures(config, output / "before", report)
    report(Message(f"Training a LoRA on {config.dataset.image_directory}"))
    cache.run(config, report)
    train.run(config, report)
    files = RunFiles(output, NAME)
    tuned = _with(config, lora_weight=[files.lora])
    report(Message("After: the same captions and seeds with the LoRA."))
    after = _pictures(tuned, output / "after", report)
    history = read_history(files.history)
    result = Result(
        loss=(_loss(config), _loss(tuned)),
        similarity=(_similarity(before), _similarity(after)),
        eyes=(_eyes(before), _eyes(after)),
        step_seconds=statistics.median(step.seconds for step in history),
        peak_memory_mib=hardware.peak_memory_mib(torch.device("cpu")),
        seconds=time.perf_counter() - start,
    )
    _show(output, config, before, after, report)
    report(Message(_table(result)))
    return result


def _check(output: Path, steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps}: the demo needs at least one optimizer step")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"--output {output}: this is a file; give a folder")
    if any(output.iterdir()) and not RunFiles(output, NAME).recipe.exists():
        raise ConfigError(
            f"--output {output}: the folder holds something else than an earlier demo; give a new "
            "or empty one"
        )


def _config(output: Path, steps: int) -> Config:
    """The demo as anyone would set it up, with the shell's names."""
    model = _HERE / "model"
    return Config(
        model=ModelConfig(
            dit=model / draw.TRANSFORMER,
            vae=model / draw.AUTOENCODER,
            text_encoder1=model / draw.T5,
            text_encoder2=model / draw.CLIP,
            vae_dtype="fp32",  # stored in float16, with which a CPU is six times slower
        ),
        dataset=DatasetConfig(
            image_directory=_HERE / "dataset" / "train",
            resolution=(SIDE, SIDE),
            batch_size=8,
            cache_directory=output / "cache",
        ),
        network=NetworkConfig(network_dim=16, network_alpha=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, lr_warmup_steps=min(20, steps)),
        training=TrainingConfig(max_train_steps=steps, mixed_precision="no"),
        output=OutputConfig(output_dir=output, output_name=NAME, overwrite=True),
        generate=GenerateConfig(
            prompt=[creature.caption for creature in HELD_OUT], image_size=(SIDE, SIDE)
        ),
        runtime=RuntimeConfig(device="cpu"),
    )


def _with(config: Config, *, seed: int | None = None, **changes: object) -> Config:
    """``config`` with another seed and other settings for generating."""
    update: dict[str, object] = {"generate": config.generate.model_copy(update=changes)}
    if seed is not None:
        update["runtime"] = config.runtime.model_copy(update={"seed": seed})
    return config.model_copy(update=update)


def _pictures(config: Config, folder: Path, report: Reporter) -> list[list[Image.Image]]:
    """What the generate job draws for the held-out captions, one list per seed."""
    for old in folder.glob("*.png"):
        old.unlink()
    drawn: list[list[Image.Image]] = []
    for seed in _SEEDS:
        shown = report if seed == _SEEDS[0] else silent
        paths = generate.run(_with(config, seed=seed, save_path=folder), shown)
        drawn.append([media.load_image(path) for path in paths])
    return drawn


def _loss(config: Config) -> float:
    """Flow-matching loss on the held-out creatures, with fixed times and noise."""
    output = config.output.output_dir
    assert output is not None
    dataset = config.dataset.model_copy(
        update={
            "image_directory": _HERE / "dataset" / "held_out",
            "cache_directory": output / "cache_held_out",
        }
    )
    held_out = config.model_copy(update={"dataset": dataset})
    items = cache.cached_items(held_out, draw.ARCHITECTURE, silent)
    transformer = generate.load_with_loras(config, draw.ARCHITECTURE, torch.device("cpu"))
    with BatchReader(items, iter([(0, tuple(range(len(items))))])) as reader:
        return held_out_loss(
            VelocityModel(draw.ARCHITECTURE, transformer),
            [batch for _, batch in reader],
            times=_LOSS_TIMES,
            guidance=config.timesteps.guidance_scale,
            seed=config.runtime.seed,
        )


def _similarity(drawn: Sequence[Sequence[Image.Image]]) -> float:
    return statistics.mean(
        measure.similarity(image, creature.draw())
        for images in drawn
        for image, creature in zip(images, HELD_OUT, strict=True)
    )


def _eyes(drawn: Sequence[Sequence[Image.Image]]) -> float:
    return statistics.mean(
        measure.has_eye(image, creature)
        for images in drawn
        for image, creature in zip(images, HELD_OUT, strict=True)
    )


def _show(
    output: Path,
    config: Config,
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
    report: Reporter,
) -> None:
    grid, curve = output / "before_after.png", output / "loss_curve.png"
    steps = config.training.max_train_steps
    save_grid(
        grid,
        f"A LoRA of {steps} steps teaches the tiny model what a loomling is",
        [creature.caption for creature in HELD_OUT],
        {
            "before": before[0],
            "after": after[0],
            "never shown": [creature.draw() for creature in HELD_OUT],
        },
    )
    report(Saved(str(grid), "image"))
    history = read_history(RunFiles(output, NAME).history)
    media.save_png(curve, loss_curve(history, title=f"{NAME}: training loss"))
    report(Saved(str(curve), "plot"))


def _table(result: Result) -> str:
    fall = 1 - result.loss[1] / result.loss[0]
    rows = [
        ("", "before", "after"),
        ("held-out flow-matching loss", *(f"{value:.4f}" for value in result.loss)),
        ("similarity to held-out pictures", *(f"{value:.3f}" for value in result.similarity)),
        ("creatures with their eye in place", *(f"{value:.0%}" for value in result.eyes)),
    ]
    lines = [f"{name:34}{first:>10}{second:>10}" for name, first, second in rows]
    lines.append(
        f"the loss fell by {fall:.0%}; {result.step_seconds * 1000:.0f} ms a step, "
        f"peak memory {result.peak_memory_mib:.0f} MiB, {result.seconds:.0f} s in all"
    )
    return "\n".join(lines)
