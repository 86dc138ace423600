"""Pictures <-> ComfyUI's IMAGE: [N, H, W, 3] in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_comfy(images: Sequence[Image.Image]) -> Tensor:
    """A batch of pictures of one size."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]) / 255


def from_comfy(images_NHWC: Tensor) -> list[Image.Image]:
    """The pictures of a batch."""
    values = images_NHWC.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture) for picture in values]


def as_comfy(pixels_NCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1] as ComfyUI has them."""
    return pixels_NCHW.movedim(1, -1).add(1).div(2)
