"""Pictures that a LoRA draws right after its training, from captions that it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import hardware, media
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedItem, load_item
from ..errors import CheckpointError, DataError
from ..events import Message, Progress, Reporter, Saved
from ..signals import Stopped, StopSignals
from ..weights import open_checkpoint, save_tensors
from .generate import SamplingSettings, initial_noise, sample
from .outputs import RunFiles, explained

# As in the files of ComfyUI's SaveLatent node: a VAE's latents [N, C, H, W], and a mark without
# content that says they are not scaled.
_KEY, _MARK = "latent_tensor", "latent_format_version_0"


def chosen(items: Sequence[CachedItem], count: int) -> list[CachedItem]:
    """Up to ``count`` items of the most common shape, evenly spread over the dataset."""
    shape, _ = Counter(item.shapes for item in items).most_common(1)[0]
    same = [item for item in items if item.shapes == shape]
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

    settings = config.generate
    latents: list[Tensor] = []
    transformer.eval()
    device = next(transformer.parameters()).device
    picked = chosen(items, config.output.preview_images)
    for index, item in enumerate(picked):
        conditions = {name: tensor[None].to(device) for name, tensor in load_item(item).items()}
        height, width = conditions.pop("latents").shape[-2:]
        noise = initial_noise(
            architecture,
            width=width * architecture.pixels_per_latent,
            height=height * architecture.pixels_per_latent,
            seed=config.runtime.seed + index,
        )
        shift = settings.flow_shift or architecture.timestep_shift(height, width)
        sampling = SamplingSettings(settings.infer_steps, shift, settings.embedded_cfg_scale)
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
    path = files.preview_latents
    if not path.exists():
        return None
    try:
        return open_checkpoint(path).read(_KEY)
    except (CheckpointError, KeyError) as error:
        raise DataError(f"{path}: the previews are damaged ({error}); delete the file") from None


def _save(
    config: Config,
    architecture: Architecture,
    latents_NCTHW: Tensor,
    files: RunFiles,
    report: Reporter,
) -> None:
    raw = architecture.raw_latents(latents_NCTHW.float().cpu())[:, :, 0]
    with explained(files.preview_latents):
        save_tensors(files.preview_latents, {_KEY: raw, _MARK: torch.tensor([])}, {})
    report(Saved(str(files.preview_latents), "latents"))
    if config.model.vae is None:
        return
    autoencoder = architecture.load_autoencoder(
        config.model.vae,
        dtype=hardware.stored_or(config.model.vae_dtype),
        device=latents_NCTHW.device,
    )
    for index in range(latents_NCTHW.shape[0]):
        image = media.to_image(autoencoder.decode(latents_NCTHW[index : index + 1])[0])
        path = files.preview(index)
        with explained(path):
            media.save_png(path, image)
        report(Saved(str(path), "image"))
