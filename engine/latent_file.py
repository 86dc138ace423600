"""ComfyUI's ``.latent`` files: a VAE's latents that its nodes LoadLatent and VAEDecode take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, DataError
from .weights import open_checkpoint, save_tensors

# As in the files of ComfyUI's SaveLatent node: a VAE's latents [N, C, H, W], and a mark without
# content that says they are not scaled.
_KEY, _MARK = "latent_tensor", "latent_format_version_0"


def save_latents(path: Path, raw_NCHW: Tensor) -> None:
    """Write a VAE's latents; the file is either whole or absent."""
    save_tensors(path, {_KEY: raw_NCHW.float().cpu(), _MARK: torch.tensor([])}, {})


def read_latents(path: Path) -> Tensor | None:
    """A VAE's latents [N, C, H, W]; None if there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return open_checkpoint(path).read(_KEY)
    except (CheckpointError, KeyError) as error:
        raise DataError(f"{path}: the latents are damaged ({error}); delete the file") from None
