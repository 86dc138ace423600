"""Image files -> pixels, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .atomic_file import replacing
from .errors import DataError

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})


def load_image(path: Path) -> Image.Image:
    """The picture as RGB, turned as its camera says; transparent parts become white.

    Raises:
        DataError: the file cannot be read as an image.
    """
    return _on(_open(path), "white").convert("RGB")


def load_mask(path: Path) -> Image.Image:
    """The picture as gray, turned as its camera says; transparent parts become black.

    Raises:
        DataError: the file cannot be read as an image.
    """
    return _on(_open(path), "black").convert("L")


def load_opacity(path: Path) -> Image.Image:
    """The opacity of a picture as gray, white where nothing shows through.

    Raises:
        DataError: the file cannot be read as an image.
    """
    return _open(path).convert("RGBA").getchannel("A")


def has_opacity(path: Path) -> bool:
    """Whether a picture says how opaque it is, from the header alone.

    Raises:
        DataError: the file cannot be read as an image.
    """
    with _header(path) as image:
        return _is_transparent(image)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise DataError(f"{path}: this is not an image that can be read; remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image is damaged ({error}); replace it") from None
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would cut 16-bit values off at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _on(image: Image.Image, color: str) -> Image.Image:
    """A picture before a background."""
    if not _is_transparent(image):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image)


@contextmanager
def _header(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise DataError(f"{path}: this is not an image that can be read; remove it") from None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as shown, from the header alone.

    Raises:
        DataError: the file cannot be read as an image.
    """
    with _header(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations with swapped sides
        return (image.height, image.width) if turned else image.size


def resize_to_bucket(
    image: Image.Image,
    size: tuple[int, int],
    *,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Scale to cover ``size`` and cut the middle out; an image of that size stays untouched.

    Lanczos, as the other filters, is antialiased when reducing too.
    """
    if image.size == size:
        return image
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (
        max(side, int(length * scale + 0.5)) for side, length in zip(size, image.size, strict=True)
    )
    resized = image.resize((width, height), resample)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return resized.crop((left, top, left + size[0], top + size[1]))


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels [3, H, W] in [-1, 1]."""
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels_HWC.permute(2, 0, 1).float().div_(127.5).sub_(1)


def mask_tensor(mask: Image.Image, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A mask [1, H, W] in [0, 1] at ``size``, cut as `resize_to_bucket` cuts its image.

    Args:
        mask: gray, of the image's shape but perhaps not of its size.
        image_size: of the image before it is resized.
    """
    # Lanczos would write rings around every edge.
    linear = Image.Resampling.BILINEAR
    mask = mask if mask.size == image_size else mask.resize(image_size, linear)
    mask = resize_to_bucket(mask, size, resample=linear)
    return torch.from_numpy(np.array(mask, dtype=np.uint8))[None].float().div_(255)


def save_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file that is either whole or absent."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """The inverse of `to_tensor`; values are clamped and rounded."""
    pixels = pixels_CHW.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
