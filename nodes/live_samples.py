"""Shows on the node what a training draws, as soon as it is drawn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ..engine import media
from ..engine.architectures.base import Architecture
from ..engine.config import Config
from ..engine.events import Event, Progress, Reporter, Saved
from ..engine.latent_file import read_latents
from . import native
from .images import from_comfy
from .progress import free_memory

logger = logging.getLogger(__name__)

_SHOWN_SIDE = 512


class LiveSamples:
    """A reporter in front of another one: samples that an event tells of are shown on the node.

    Latents that the training cannot decode itself are decoded with ComfyUI's VAE and written
    beside them as PNG; without a VAE, what is shown is small and approximate.
    """

    def __init__(
        self, report: Reporter, node_id: str, config: Config, architecture: Architecture, vae: Any
    ) -> None:
        self._report, self._node_id = report, node_id
        self._config, self._family, self._vae = config, architecture.name, vae
        self._last = Progress("train", 0, 1)

    def __call__(self, event: Event) -> None:
        self._report(event)
        if isinstance(event, Progress):
            self._last = event
        elif isinstance(event, Saved) and event.step is not None:
            image = self._image(Path(event.path), event.kind)
            if image:
                # With the bar where it is: a picture goes to the browser with the progress alone.
                bar = comfy.utils.ProgressBar(self._last.total, node_id=self._node_id)
                bar.update_absolute(self._last.done, None, ("JPEG", image, _SHOWN_SIDE))

    def _image(self, path: Path, kind: str) -> Image.Image | None:
        if kind == "image":
            return media.load_image(path)
        decodes_itself = self._config.model.vae is not None
        if kind != "latents" or decodes_itself:
            return None
        raw = read_latents(path)
        if raw is None:
            return None
        image = self._decoded(raw)
        if image:
            _save(path.with_suffix(".png"), image)
            return image
        small = from_comfy(native.approximate(self._family, raw))[0]
        return small.resize([_SHOWN_SIDE * side // max(small.size) for side in small.size])

    def _decoded(self, raw_NCHW: Tensor) -> Image.Image | None:
        """None without a VAE, or where there is no memory for it beside the training."""
        if self._vae is None:
            return None
        try:
            return from_comfy(native.decode(self._vae, raw_NCHW))[0]
        except torch.OutOfMemoryError:
            return None
        finally:
            free_memory()


def _save(path: Path, image: Image.Image) -> None:
    try:
        media.save_png(path, image)
    except OSError as error:
        # The latents are there; a full disk is no reason to end the training here.
        logger.warning("%s cannot be written: %s", path, error.strerror)
