"""Pictures that a LoRA draws right after its training, from captions that it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import media
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedItem, load_item
from ..evaluation import evaluating
from ..events import Message, Progress, Reporter, Saved
from ..latent_file import read_latents as read_latent_file
from ..latent_file import save_latents
from ..signals import Stopped, StopSignals
from .outputs import RunFiles, explained
from .picture import initial_noise, load_autoencoder, sample, sampling_settings


def chosen(items: Sequence[CachedItem], count: int) -> list[CachedItem]:
    """Up to ``count`` items of the most common shape, evenly spread over the dataset.

    Regularization images are left out.
    """
    own = [item for item in items if not item.is_regularization]
    shape, _ = Counter(item.shapes for item in own).most_common(1)[0]
    same = [item for item in own if item.shapes == shape]
    count = min(count, len(same))
    return [same[index * len(same) // count] for index in range(count)]


def draw(
    config: Config,
    architecture: Architecture,
    transformer: nn.Module,
    items: Sequence[CachedItem],
    files: RunFiles,
    report: Reporter,
    stop: StopSignals,
) -> None:
    """Write the latents of the pictures, and the pictures if a VAE is configured.

    The seed, steps and guidance are those of the generate job.

    Raises:
        EngineError: the files cannot be written, or the VAE is none.
        Stopped: a signal came; nothing is written.
    """

    def check(step: int, latents: Tensor) -> None:
        if stop.requested:
            raise Stopped("stopped while drawing previews; the LoRA is finished and saved")

    picked = chosen(items, config.output.preview_images)
    latents: list[Tensor] = []
    device = next(transformer.parameters()).device
    with evaluating(transformer):
        for index, item in enumerate(picked):
            conditions = {name: tensor[None].to(device) for name, tensor in load_item(item).items()}
            height, width = (
                side * architecture.pixels_per_latent
                for side in conditions.pop("latents").shape[-2:]
            )
            seed = config.runtime.seed + index
            noise = initial_noise(architecture, width=width, height=height, seed=seed)
            sampling = sampling_settings(config.generate, architecture, (width, height))
            noise = noise.to(device)
            latents.append(sample(architecture, transformer, noise, conditions, sampling, check))
            report(Progress("preview", index + 1, len(picked), unit="picture"))
    drawn = torch.cat(latents)
    if not drawn.isfinite().all():
        report(Message("the previews came out as NaN and are left out", level="warning"))
        return
    _save(config, architecture, drawn, files, report)


def are_drawn(config: Config, items: Sequence[CachedItem], files: RunFiles) -> bool:
    """Whether as many pictures are there as `draw` would make; true if none are wanted."""
    wanted = len(chosen(items, config.output.preview_images)) if config.output.preview_images else 0
    if not wanted:
        return True
    latents = read_latents(files)
    return latents is not None and latents.shape[0] == wanted


def remove(files: RunFiles) -> None:
    """Remove the pictures of an earlier state of the LoRA."""
    files.preview_latents.unlink(missing_ok=True)
    index = 0
    while (path := files.preview(index)).exists():
        path.unlink()
        index += 1


def read_latents(files: RunFiles) -> Tensor | None:
    """A VAE's latents [N, C, H, W] of the pictures that `draw` made last, if there are any.

    Raises:
        DataError: the file is damaged.
    """
    return read_latent_file(files.preview_latents)


def _save(
    config: Config,
    architecture: Architecture,
    latents_NCTHW: Tensor,
    files: RunFiles,
    report: Reporter,
) -> None:
    with explained(files.preview_latents):
        raw = architecture.raw_latents(latents_NCTHW.float().cpu())[:, :, 0]
        save_latents(files.preview_latents, raw)
    report(Saved(str(files.preview_latents), "latents"))
    if config.model.vae is None:
        return
    autoencoder = load_autoencoder(config, architecture, latents_NCTHW.device)
    for index in range(latents_NCTHW.shape[0]):
        image = media.to_image(autoencoder.decode(latents_NCTHW[index : index + 1])[0])
        path = files.preview(index)
        with explained(path):
            media.save_png(path, image)
        report(Saved(str(path), "image"))
