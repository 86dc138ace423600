"""The images that a config names: where each is cached and what its cache must be made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import buckets, latent_cache, weights
from ..architectures.base import Architecture
from ..config import Config
from ..errors import ConfigError, DataError
from ..manifest import Sample, scan_folder

Facts = dict[str, object]
Role = Literal["train", "regularization", "validation"]
# The setting of the folder of each role.
FOLDERS: dict[Role, str] = {
    "train": "image_directory",
    "regularization": "regularization_directory",
    "validation": "validation_directory",
}


@dataclass(frozen=True)
class Caption:
    """A text, the cache file of what encoders make of it, and what that must be made from."""

    text: str
    path: Path
    facts: Facts


@dataclass(frozen=True)
class Entry:
    """One sample, the size it is trained at, its cache files and what they must be made from.

    ``class_caption`` is its caption with the word of the class; ``is_masked`` says that its latents
    have a mask beside them, which is white if there is none for the sample.
    """

    role: Role
    sample: Sample
    size: tuple[int, int]
    latents: Path
    latent_facts: Facts
    caption: Caption
    class_caption: Caption | None = None
    is_masked: bool = False

    @property
    def text(self) -> Path:
        """The cache file of the caption."""
        return self.caption.path

    @property
    def captions(self) -> list[Caption]:
        return [self.caption, *([self.class_caption] if self.class_caption else [])]


def uses_masks(config: Config) -> bool:
    """Whether any image may have a mask."""
    return config.dataset.alpha_mask or config.dataset.mask_directory is not None


@dataclass(frozen=True)
class EntryMaker:
    """Looks into folders; reads every file in them but caches nothing.

    ``latent_facts`` and ``text_facts`` identify the encoders.
    """

    config: Config
    architecture: Architecture
    choose_size: Callable[[Sample], tuple[int, int]]
    latent_facts: Facts
    text_facts: Facts

    def entries(self, role: Role) -> list[Entry]:
        """Everything in the folder of a role."""
        dataset = self.config.dataset
        folder: Path = self.config.value(FOLDERS[role])
        # Control images and masks are of what is trained, and so of what measures it.
        is_extra = role == "regularization"
        samples = scan_folder(
            folder,
            setting=FOLDERS[role],
            caption_extension=dataset.caption_extension,
            control_directory=None if is_extra else dataset.control_directory,
            mask_directory=None if is_extra else dataset.mask_directory,
            alpha_mask=dataset.alpha_mask and not is_extra,
        )
        is_masked = uses_masks(self.config) and not is_extra
        cache = cache_folder(dataset.cache_directory, folder, role)
        return [self._entry(role, sample, cache, is_masked=is_masked) for sample in samples]

    def _entry(self, role: Role, sample: Sample, cache: Path, *, is_masked: bool) -> Entry:
        size = self.choose_size(sample)
        latents, text = latent_cache.cache_paths(cache, sample.image, self.architecture.name)
        latent_facts: Facts = {
            "image": sample.image.name,
            "image_digest": latent_cache.file_digest(sample.image),
            "control_digests": [latent_cache.file_digest(path) for path in sample.controls],
            "size": list(size),
            "architecture": self.architecture.name,
            **self.latent_facts,
        }
        if is_masked:
            latent_facts["mask"] = _mask_identity(sample)
        text_facts: Facts = {
            "image": sample.image.name,
            "caption": sample.caption,
            "max_length": self.config.dataset.text_max_length,
            "architecture": self.architecture.name,
            **self.text_facts,
        }
        caption = Caption(sample.caption, text, text_facts)
        return Entry(role, sample, size, latents, latent_facts, caption, is_masked=is_masked)


def cache_folder(chosen: Path | None, images: Path, role: Role) -> Path:
    """Folders may hold the same file names, so those that share a cache have parts of it."""
    if chosen is None:
        return images / ".loom_cache"
    return chosen if role == "train" else chosen / role


def _mask_identity(sample: Sample) -> str:
    if sample.mask is None:
        return "white"
    return "opacity" if sample.mask == sample.image else latent_cache.file_digest(sample.mask)


def encoder_facts(config: Config) -> tuple[Facts, Facts]:
    """Identities of the encoders; None for those that are not configured."""
    model = config.model

    def identity(path: Path | None) -> str | None:
        return weights.fingerprint(path) if path else None

    latent = {"vae": identity(model.vae), "vae_dtype": model.vae_dtype if model.vae else None}
    has_text = model.text_encoder1 is not None
    text = {
        "text_encoder1": identity(model.text_encoder1),
        "text_encoder2": identity(model.text_encoder2),
        "tokenizer1": identity(model.tokenizer1),
        "tokenizer2": identity(model.tokenizer2),
        "text_encoder_dtype": model.text_encoder_dtype if has_text else None,
    }
    return dict(latent), dict(text)


def size_chooser(config: Config, architecture: Architecture) -> Callable[[Sample], tuple[int, int]]:
    """Gives the width and height at which an image is trained."""
    dataset, step = config.dataset, architecture.pixel_multiple
    resolution = dataset.resolution
    fixed = buckets.own_size(resolution, step=step)
    if not dataset.enable_bucket and fixed != tuple(resolution):
        raise ConfigError(
            f"resolution = {list(resolution)}: without enable_bucket both sides must be multiples "
            f"of {step}; use {list(fixed)}"
        )
    sizes = buckets.bucket_sizes(resolution, step=step)
    area = resolution[0] * resolution[1]

    def choose(sample: Sample) -> tuple[int, int]:
        if not dataset.enable_bucket:
            return fixed
        if dataset.bucket_no_upscale and sample.size[0] * sample.size[1] <= area:
            if min(sample.size) < step:
                raise DataError(
                    f"{sample.image}: the image is {sample.size[0]}x{sample.size[1]} pixels, less "
                    f"than {step} on a side; remove it or turn bucket_no_upscale off"
                )
            return buckets.own_size(sample.size, step=step)
        return buckets.nearest_bucket(sample.size, sizes)

    return choose
