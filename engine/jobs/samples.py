"""Draws the sample prompts while a LoRA is trained, and leaves no trace in the training.

``samples/NAME-step00000100-00.latent`` and ``.png`` are the first prompt after 100 steps. The
VAE is loaded for each drawing and beside the transformer; where that is too much for the memory,
the latents are there for another VAE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import SamplesConfig
from ..errors import EngineError
from ..evaluation import evaluating
from ..events import Message, Progress, Reporter, Saved
from ..latent_file import save_latents
from ..signals import Stopped, StopSignals
from ..weights import open_checkpoint
from .outputs import RunFiles, explained
from .picture import initial_noise, load_autoencoder, picture_facts, sample, save_picture
from .sample_plan import Picture, SamplePlan

Drawn = tuple[int, Tensor]  # index of the picture, its latents [1, C, 1, h, w]


@dataclass(frozen=True)
class SampleFile:
    """One file of samples: after ``step`` optimizer steps, of prompt number ``index`` from 0."""

    path: Path
    step: int
    index: int


def due(settings: SamplesConfig, step: int, ended_epochs: range) -> bool:
    """Whether to draw after ``step`` optimizer steps, the last of which ended these epochs."""
    if step == 0:
        return settings.sample_at_first
    steps, epochs = settings.sample_every_n_steps, settings.sample_every_n_epochs
    by_step = steps is not None and step % steps == 0
    return by_step or (epochs is not None and any(epoch % epochs == 0 for epoch in ended_epochs))


def draw(
    plan: SamplePlan,
    transformer: nn.Module,
    files: RunFiles,
    step: int,
    report: Reporter,
    stop: StopSignals,
) -> None:
    """Write latents of all pictures, and the pictures themselves if a VAE is configured.

    Whatever goes wrong is a warning: samples end no training. When a stop is requested, the
    pictures that are finished stay as latents.

    Raises:
        Stopped: a signal came, unless they are held.
    """
    finished: list[Drawn] = []
    with stop.shield(), evaluating(transformer):
        try:
            _draw_latents(plan, transformer, files, step, finished, report, stop)
            if plan.config.model.vae and finished:
                device = next(transformer.parameters()).device
                _decode(plan, finished, files, step, device, report)
        except Stopped:
            pass  # raised again behind the shield
        except torch.OutOfMemoryError:
            kept = f"; the latents of {len(finished)} are in {files.samples}" if finished else ""
            report(
                Message(
                    f"there was not enough memory for all samples after step {step}{kept}. "
                    "Smaller --w and --h, or no vae, need less",
                    level="warning",
                )
            )
        except EngineError as error:
            report(Message(f"samples after step {step} are missing: {error}", level="warning"))


def are_drawn(plan: SamplePlan, files: RunFiles, step: int) -> bool:
    """Whether `draw` has written latents of all pictures after this step."""
    paths = [_path(files, step, index, "latent") for index in range(len(plan.pictures))]
    return all(path.exists() for path in paths)


def sample_files(files: RunFiles) -> list[SampleFile]:
    """All files that `draw` wrote for this run, in order of step and prompt."""
    pattern = re.compile(re.escape(files.name) + r"-step(\d{8,})-(\d{2,})\.(latent|png)")
    found: list[SampleFile] = []
    for path in files.samples.iterdir() if files.samples.is_dir() else []:
        if match := pattern.fullmatch(path.name):
            found.append(SampleFile(path, int(match[1]), int(match[2])))
    return sorted(found, key=lambda file: (file.step, file.index, file.path.suffix))


def remove_after(files: RunFiles, step: int) -> None:
    """Remove the samples of later steps, which the run will draw again; -1 removes all.

    Also what a process that was killed while it wrote one left behind.
    """
    for file in sample_files(files):
        if file.step > step:
            file.path.unlink(missing_ok=True)
    pattern = re.compile(rf"\.{re.escape(files.name)}-step\d+-\d+\.(latent|png)\.\d+\.tmp")
    for path in files.samples.iterdir() if files.samples.is_dir() else []:
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _path(files: RunFiles, step: int, index: int, extension: str) -> Path:
    return files.samples / f"{files.name}-step{step:08d}-{index:02d}.{extension}"


def _draw_latents(
    plan: SamplePlan,
    transformer: nn.Module,
    files: RunFiles,
    step: int,
    finished: list[Drawn],
    report: Reporter,
    stop: StopSignals,
) -> None:
    def check(sampling_step: int, latents: Tensor) -> None:
        if stop.requested:
            raise Stopped("stopped while drawing samples")

    device = next(transformer.parameters()).device
    for index, picture in enumerate(plan.pictures):
        width, height = picture.size
        noise = initial_noise(plan.architecture, width=width, height=height, seed=picture.seed)
        latents = sample(
            plan.architecture,
            transformer,
            noise.to(device),
            _conditions(picture, device),
            picture.sampling,
            check,
        )
        if latents.isfinite().all():
            path = _path(files, step, index, "latent")
            with explained(path):
                save_latents(path, plan.architecture.raw_latents(latents.float().cpu())[:, :, 0])
            report(Saved(str(path), "latents", step))
            finished.append((index, latents))
        else:
            report(
                Message(
                    f"the sample of {picture.prompt.where} came out as NaN after step {step} and "
                    "is left out",
                    level="warning",
                )
            )
        report(Progress("samples", index + 1, len(plan.pictures), unit="picture"))


def _conditions(picture: Picture, device: torch.device) -> dict[str, Tensor]:
    """What the model is given for one picture, from the cache, as a batch of one."""
    text = open_checkpoint(picture.caption.path)
    conditions = {name: text.read(name, device=device)[None] for name in text.entries}
    for index, control in enumerate(picture.controls):
        latents = open_checkpoint(control.path).read("latents", device=device)
        conditions[f"control_latents_{index}"] = latents[None]
    return conditions


def _decode(
    plan: SamplePlan,
    finished: Sequence[Drawn],
    files: RunFiles,
    step: int,
    device: torch.device,
    report: Reporter,
) -> None:
    autoencoder = load_autoencoder(plan.config, plan.architecture, device)
    for index, latents in finished:
        picture = plan.pictures[index]
        facts = picture_facts(
            plan.config,
            plan.architecture,
            prompt=picture.prompt.text,
            seed=picture.seed,
            size=picture.size,
            sampling=picture.sampling,
            controls=picture.prompt.control_images,
        )
        facts |= {"lora": files.name, "trained_steps": step}
        path = _path(files, step, index, "png")
        save_picture(path, autoencoder.decode(latents)[0], facts)
        report(Saved(str(path), "image", step))
