"""What is in a generated picture: its colours, where its shape is, how like another it is.

All functions take pictures of 64x64 pixels as PIL images; colours are RGB of 0..255 and distances
between them Euclidean.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .concept import EYE_RADIUS, PUPIL_RADIUS, Loomling
from .pictures import BACKGROUNDS, COLOURS, RGB, Picture

# A pixel belongs to the background if it is nearer to its colour than this. All colours that
# are drawn together are at least 91 apart.
_BACKGROUND_DISTANCE = 60.0
_FEWEST_PIXELS = 12
# Structural similarity: Wang et al. 2004, "Image quality assessment", section III; a Gaussian
# window of standard deviation 1.5, and constants for values in 0..1.
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def background_name(image: Image.Image) -> str:
    """The named background that most pixels of the picture's one-pixel frame are nearest to."""
    pixels = _pixels(image)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return _most_common(frame, BACKGROUNDS)


def colour_name(image: Image.Image, background: str) -> str | None:
    """The named colour that most of the pixels are nearest to which are not background.

    None if fewer than 12 pixels differ from ``background``.
    """
    pixels = _pixels(image).reshape(-1, 3)
    shape = pixels[_distance(pixels, BACKGROUNDS[background]) > _BACKGROUND_DISTANCE]
    return _most_common(shape, COLOURS) if len(shape) >= _FEWEST_PIXELS else None


def overlap(image: Image.Image, picture: Picture) -> float:
    """Intersection over union of the drawn shape with the ideal one, 0..1.

    A pixel is part of a shape if it is nearer to the colour that ``picture`` asks for than to
    its background.
    """
    colour, background = COLOURS[picture.colour], BACKGROUNDS[picture.background]
    drawn, ideal = (
        _distance(pixels, colour) < _distance(pixels, background)
        for pixels in (_pixels(image), _pixels(picture.draw()))
    )
    return float((drawn & ideal).sum() / (drawn | ideal).sum())


def similarity(first: Image.Image, second: Image.Image) -> float:
    """Mean structural similarity (SSIM) of the RGB channels: 1 for equal pictures."""
    a, b = (
        torch.from_numpy(_pixels(image)).permute(2, 0, 1)[:, None] / 255
        for image in (first, second)
    )
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _SSIM_C1) / (mean_a**2 + mean_b**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variance_a + variance_b + _SSIM_C2)
    return (luminance * structure).mean().item()


def has_eye(image: Image.Image, creature: Loomling) -> bool:
    """Whether the creature's eye is there: a dark pupil in a ring of white.

    It may be up to 3 pixels from its place in the ideal picture. The pupil's mean brightness must
    be below 110 and its ring's above 170, of 255.
    """
    brightness = _pixels(image).min(axis=2)
    (x, y), radius = creature.eye()
    offsets = [(dx, dy) for dx in range(-3, 4) for dy in range(-3, 4)]
    return any(_is_eye(brightness, x + dx, y + dy, radius) for dx, dy in offsets)


def _is_eye(brightness: np.ndarray, x: float, y: float, radius: float) -> bool:
    rows, columns = np.indices(brightness.shape) + 0.5
    distance = np.hypot(columns - x, rows - y)
    pupil_radius = radius * PUPIL_RADIUS / EYE_RADIUS
    pupil = brightness[distance < 0.8 * pupil_radius]
    ring = brightness[(distance > pupil_radius + 0.4) & (distance < radius - 0.3)]
    if not pupil.size or not ring.size:
        return False
    return bool(pupil.mean() < 110 and ring.mean() > 170)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _distance(pixels: np.ndarray, colour: RGB) -> np.ndarray:
    return np.linalg.norm(pixels - np.array(colour, dtype=np.float32), axis=-1)


def _most_common(pixels: np.ndarray, names: dict[str, RGB]) -> str:
    distances = np.stack([_distance(pixels, colour) for colour in names.values()])
    index, _ = Counter(distances.argmin(axis=0).tolist()).most_common(1)[0]
    return list(names)[index]


def _blur(planes_CHW: Tensor) -> Tensor:
    """Gaussian mean around each pixel whose window lies inside the picture."""
    positions = torch.arange(_SSIM_WINDOW) - _SSIM_WINDOW // 2
    window = torch.exp(-(positions**2) / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()
    rows = F.conv2d(planes_CHW, window.view(1, 1, 1, -1))
    return F.conv2d(rows, window.view(1, 1, -1, 1))
