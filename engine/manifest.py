"""A folder of images and captions -> a list of samples, with everything that is wrong in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError
from .media import IMAGE_EXTENSIONS, has_opacity, image_size

_MAX_LISTED = 20


@dataclass(frozen=True)
class Sample:
    """One training image; ``size`` is its width and height in pixels as shown.

    ``mask`` is the file of its mask; the image itself if that is its opacity.
    """

    image: Path
    caption: str
    size: tuple[int, int]
    controls: tuple[Path, ...] = ()
    mask: Path | None = None


def scan_folder(
    folder: Path,
    *,
    setting: str = "image_directory",
    caption_extension: str = ".txt",
    control_directory: Path | None = None,
    mask_directory: Path | None = None,
    alpha_mask: bool = False,
) -> list[Sample]:
    """All images directly in ``folder``, sorted by name, with captions, control images and masks.

    A control image has the image's stem, or stem and number (``cat_0.png``, ``cat_1.png``), a mask
    its stem. Every image has control images if there is a folder of them; it may have no mask.

    Args:
        setting: what names ``folder`` in a message.
        alpha_mask: the mask of an image is its opacity.

    Raises:
        DataError: the folder is missing or empty, or images cannot be used; all are named.
    """
    images = _images(folder, setting)
    controls = None
    if control_directory:
        controls = _by_stem(_images(control_directory, "control_directory"))
    masks = _masks(mask_directory) if mask_directory else {}
    samples: list[Sample] = []
    problems: list[str] = []
    for image in images:
        try:
            caption = _caption(image, caption_extension)
            found = _controls(image, controls) if controls is not None else ()
            for control in found:
                image_size(control)
            size = image_size(image)
            mask = image if alpha_mask and has_opacity(image) else None
            mask = _mask(image, size, masks) if masks else mask
            samples.append(Sample(image, caption, size, found, mask))
        except DataError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise DataError(f"{folder}: {problems[0]}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        rest = f"\n  and {more} more" if more > 0 else ""
        raise DataError(
            f"{folder}: {len(problems)} of {len(images)} images cannot be used\n{shown}{rest}"
        )
    return samples


def _images(folder: Path, setting: str) -> list[Path]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{setting} = {folder}: the folder {what}; give a folder of images")
    images = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not path.name.startswith(".")
        and path.is_file()
    )
    if not images:
        kinds = " ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError(f"{setting} = {folder}: there is no image in the folder ({kinds})")
    return images


def _caption(image: Path, extension: str) -> str:
    path = image.with_suffix(extension)
    try:
        caption = path.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError(f"{image.name}: the caption {path.name} is missing; write one") from None
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: the caption is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path.name}: the caption cannot be read: {error.strerror}") from None
    if not caption:
        raise DataError(f"{path.name}: the caption is empty; describe the image")
    return caption


def _by_stem(controls: Sequence[Path]) -> dict[str, list[tuple[int, Path]]]:
    """Stem of an image -> its control images with their numbers, -1 for none."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in controls:
        found.setdefault(path.stem, []).append((-1, path))
        if match := re.fullmatch(r"(.*)_(\d+)", path.stem, re.DOTALL):
            found.setdefault(match[1], []).append((int(match[2]), path))
    return found


def _controls(image: Path, controls: Mapping[str, Sequence[tuple[int, Path]]]) -> tuple[Path, ...]:
    if image.stem not in controls:
        raise DataError(f"{image.name}: there is no control image of that name; add one")
    return tuple(path for _, path in sorted(controls[image.stem], key=lambda item: item[0]))


def _masks(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in _images(folder, "mask_directory"):
        found.setdefault(path.stem, []).append(path)
    return found


def _mask(image: Path, size: tuple[int, int], masks: Mapping[str, Sequence[Path]]) -> Path | None:
    match masks.get(image.stem, []):
        case []:
            return None
        case [mask]:
            (width, height), (mask_width, mask_height) = size, image_size(mask)
            # Either side may be rounded.
            apart = min(
                abs(mask_width - width * mask_height / height),
                abs(mask_height - height * mask_width / width),
            )
            if apart > 1:
                raise DataError(
                    f"{image.name}: the mask {mask.name} is {mask_width}x{mask_height} pixels and "
                    f"the image {width}x{height}; make the mask from the whole image"
                )
            return mask
        case several:
            names = " and ".join(path.name for path in several)
            raise DataError(f"{image.name}: there are several masks, {names}; remove all but one")
