"""The estimated peak of a training run's memory divided by the measured one.

Each case is a process of its own that estimates as the training does before it loads the model,
then trains a few steps through the real job and asks the system for its largest resident size.
Run from the repository root: ``python -m benchmarks.memory``. Prints one line per case.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from engine import hardware, latent_cache
from engine.architectures.flux_kontext import FluxKontext
from engine.config import (
    Config,
    DatasetConfig,
    ModelConfig,
    OutputConfig,
    RuntimeConfig,
    TrainingConfig,
)
from engine.events import silent
from engine.jobs import cache, checks, outputs, train
from engine.jobs.needs import needs_of
from engine.jobs.plan import plan_run
from engine.weights import save_tensors

ARCHITECTURE = FluxKontext()


class Size(NamedTuple):
    """The model, its largest image in pixels, and how many of them are in a batch."""

    hidden: int
    double: int
    single: int
    text_width: int
    pixels: int
    batch: int = 1


SIZES = {
    "demo": Size(128, 2, 4, 64, 64, 4),
    "small": Size(512, 2, 4, 64, 512),
    "mid-512": Size(1536, 2, 4, 4096, 512),
    "mid-1024": Size(1536, 2, 4, 4096, 1024),
}


def write_model(path: Path, size: Size, dtype: torch.dtype) -> None:
    """Random weights in the published layout."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=size.double,
        num_single_layers=size.single,
        num_attention_heads=size.hidden // 128,
        joint_attention_dim=size.text_width,
        pooled_projection_dim=64,
        guidance_embeds=True,
    ).to(dtype)
    save_tensors(path, ARCHITECTURE.published_state_dict(transformer), {})


def write_images(config: Config, size: Size) -> None:
    """Two images with captions, and their cache as the encoders would leave it."""
    folder = config.dataset.image_directory
    assert folder is not None
    folder.mkdir()
    for name in ("a", "b")[: 1 + (size.batch > 1)]:
        Image.new("RGB", (size.pixels, size.pixels)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a picture", "utf-8")
    for entry in cache.plan(config, ARCHITECTURE).entries:
        side = size.pixels // ARCHITECTURE.pixels_per_latent
        latents = {"latents": torch.randn(16, 1, side, side)}
        text = {"text_embeds": torch.randn(512, size.text_width), "pooled": torch.randn(64)}
        latent_cache.write_cache(entry.latents, latents, entry.latent_facts)
        latent_cache.write_cache(entry.text, text, entry.caption.facts)


def settings(folder: Path, size: Size, *, precision: str, checkpointing: bool) -> Config:
    """A run of a few steps in ``folder``."""
    return Config(
        model=ModelConfig(architecture="flux_kontext", dit=folder / "flux.safetensors"),
        dataset=DatasetConfig(
            image_directory=folder / "images",
            resolution=(size.pixels, size.pixels),
            batch_size=size.batch,
            num_repeats=size.batch,
        ),
        training=TrainingConfig(
            max_train_steps=2, mixed_precision=precision, gradient_checkpointing=checkpointing
        ),
        output=OutputConfig(output_dir=folder / "out", output_name="run", overwrite=True),
        runtime=RuntimeConfig(device="auto"),
    )


def measure(config: Config) -> tuple[float, float]:
    """(estimated, measured) MiB of the run that ``config`` describes, in this process."""
    assert config.model.dit is not None and config.output.output_dir is not None
    hardware.give_freed_memory_back()
    device = hardware.find_device(config.runtime.device)
    items = cache.cached_items(config, ARCHITECTURE, silent)
    plan = plan_run(config, items, num_processes=1, start=0)
    files = outputs.RunFiles(config.output.output_dir, "run")
    checks.before_loading(config, ARCHITECTURE, items, files, plan, device)
    transformer = ARCHITECTURE.empty_transformer(config.model.dit)
    needs = needs_of(config, ARCHITECTURE, transformer, items, plan, device)
    estimate = needs.memory(gradient_checkpointing=config.training.gradient_checkpointing)
    sys.stderr.write(f"{estimate.in_words()}\n")
    train.run(config, silent)
    return estimate.total_bytes / 2**20, hardware.peak_memory_mib(device)


def measure_apart(name: str, *, precision: str, checkpointing: bool) -> tuple[float, float]:
    """`measure` in a new process."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder), size, precision="no", checkpointing=checkpointing)
        assert config.model.dit is not None
        write_model(config.model.dit, size, hardware.DTYPES[precision])
        write_images(config, size)
        options = ["--child", folder, "--only", name, "--precision", precision]
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", *options]
            + ["--checkpointing"] * checkpointing
            + ["--threads", str(torch.get_num_threads())],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        estimated, measured = map(float, run.stdout.split()[-2:])
        return estimated, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(SIZES), help="one size")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="one number type")
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        config = settings(
            given.child,
            SIZES[given.only],
            precision={"fp32": "no"}.get(given.precision, given.precision),
            checkpointing=given.checkpointing,
        )
        sys.stdout.write("{} {}\n".format(*measure(config)))
        return
    for name in [given.only] if given.only else SIZES:
        for precision in [given.precision] if given.precision else ("bf16", "fp32"):
            for checkpointing in (False, True):
                estimated, measured = measure_apart(
                    name, precision=precision, checkpointing=checkpointing
                )
                sys.stdout.write(
                    f"{name:9s} {precision} {'checkpointing' if checkpointing else 'all kept':13s} "
                    f"estimated {estimated:7.0f} MiB  measured {measured:7.0f} MiB  "
                    f"ratio {estimated / measured:.3f}\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
