"""Sample prompts -> pictures to draw during training, with what the model is given encoded.

Text and control images are encoded once, before the transformer is loaded, and kept in the folder
of the dataset's cache, named by what they are. So a run that continues needs no encoders, and
whoever has some, such as ComfyUI, can encode for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import buckets, hardware, latent_cache
from ..architectures.base import Architecture
from ..config import Config
from ..errors import ConfigError
from ..events import Message, Progress, Reporter
from ..prompts import Prompt, parse_lines, read_prompts
from .cache import Encoders, load_text_encoders
from .cache_plan import is_current
from .entries import Caption, Facts, cache_folder, encoder_facts
from .outputs import explained
from .picture import (
    SamplingSettings,
    check_size,
    control_pixels,
    load_autoencoder,
    sampling_settings,
)

_TEXT_ENCODERS = ("text_encoder1", "text_encoder2")


@dataclass(frozen=True)
class Control:
    """A control image for a picture of ``area`` pixels; its cache file and what that is made of."""

    image: Path
    area: int
    path: Path
    facts: Facts


@dataclass(frozen=True)
class Picture:
    """A prompt for which everything is decided."""

    prompt: Prompt
    size: tuple[int, int]
    seed: int
    sampling: SamplingSettings
    caption: Caption
    controls: tuple[Control, ...]


@dataclass(frozen=True)
class SamplePlan:
    """All pictures of a run; none if it has no sample prompts."""

    config: Config
    architecture: Architecture
    pictures: tuple[Picture, ...]

    def stale_captions(self) -> list[Caption]:
        """The texts that have to be encoded."""
        captions = {picture.caption.path: picture.caption for picture in self.pictures}
        return [each for each in captions.values() if not is_current(each.path, each.facts)]

    def stale_controls(self) -> list[Control]:
        """The control images that have to be encoded."""
        controls = {each.path: each for picture in self.pictures for each in picture.controls}
        return [each for each in controls.values() if not is_current(each.path, each.facts)]


def prepare(config: Config, architecture: Architecture, report: Reporter) -> SamplePlan:
    """The pictures; what is missing of their text and controls is encoded.

    Raises:
        EngineError: a prompt or image cannot be used, or an encoder is needed and not configured.
    """
    todo = plan(config, architecture)
    _tell(todo, report)
    captions, controls = todo.stale_captions(), todo.stale_controls()
    _require_encoders(todo, captions, controls)
    if not captions and not controls:
        return todo
    device = hardware.find_device(config.runtime.device)
    if controls:
        autoencoder = load_autoencoder(config, architecture, device)
        _encode_controls(
            todo, controls, lambda pixels: autoencoder.encode(pixels.to(device))[0], report
        )
        del autoencoder
    if captions:
        encoders = load_text_encoders(config, architecture, device)
        _encode_texts(
            todo,
            captions,
            lambda texts, length: architecture.encode_text(encoders, texts, length),
            report,
        )
    return todo


def encode_with(
    config: Config, architecture: Architecture, encoders: Encoders, report: Reporter
) -> SamplePlan:
    """As `prepare`, with encoders that someone else has loaded.

    Raises:
        EngineError: a prompt or image cannot be used.
    """
    todo = plan(config, architecture, (encoders.latent_facts, encoders.text_facts))
    _tell(todo, report)
    _encode_controls(todo, todo.stale_controls(), encoders.encode_image, report)
    _encode_texts(todo, todo.stale_captions(), encoders.encode_text, report)
    return todo


def plan(
    config: Config, architecture: Architecture, encoders: tuple[Facts, Facts] | None = None
) -> SamplePlan:
    """The pictures that the settings ask for; encodes nothing.

    Where a prompt says nothing, its size is ``resolution``, its seed the run's plus its place in
    the list, and all else as in the group of settings for generating.

    Args:
        encoders: identities of what encodes images and captions, as in `cache_plan.plan`.

    Raises:
        EngineError: a prompt or control image cannot be used, or there is none to draw.
    """
    settings = config.samples
    prompts = parse_lines(settings.sample_lines, "sample_lines")
    if settings.sample_prompts:
        prompts += read_prompts(settings.sample_prompts)
    asked = settings.sample_every_n_steps or settings.sample_every_n_epochs
    if not prompts and (asked or settings.sample_at_first):
        raise ConfigError(
            "there is nothing to draw during training; give sample_prompts or sample_lines"
        )
    facts = (encoders or encoder_facts(config)) if prompts else ({}, {})
    pictures = [
        _picture(config, architecture, prompt, index, facts) for index, prompt in enumerate(prompts)
    ]
    return SamplePlan(config, architecture, tuple(pictures))


def _picture(
    config: Config,
    architecture: Architecture,
    prompt: Prompt,
    index: int,
    encoders: tuple[Facts, Facts],
) -> Picture:
    usual = buckets.own_size(config.dataset.resolution, step=architecture.pixel_multiple)
    size = prompt.width or usual[0], prompt.height or usual[1]
    check_size(size, architecture, f"{prompt.where}: the picture has {size[0]} {size[1]} pixels")
    default = sampling_settings(config.generate, architecture, size)
    sampling = SamplingSettings(
        prompt.steps or default.num_steps,
        prompt.flow_shift or default.shift,
        default.guidance if prompt.guidance is None else prompt.guidance,
    )
    seed = config.runtime.seed + index if prompt.seed is None else prompt.seed
    make = _CacheFiles(config, architecture, *encoders)
    area = size[0] * size[1]
    controls = tuple(make.control(image, area) for image in prompt.control_images)
    return Picture(prompt, size, seed, sampling, make.caption(prompt.text), controls)


@dataclass(frozen=True)
class _CacheFiles:
    """Names cache files by what is encoded, but not by the encoders."""

    config: Config
    architecture: Architecture
    latent_facts: Facts
    text_facts: Facts

    def caption(self, text: str) -> Caption:
        facts: Facts = {
            "image": f"sample prompt {text!r}",  # what messages about its encoding begin with
            "caption": text,
            "max_length": self.config.dataset.text_max_length,
            "architecture": self.architecture.name,
        }
        return Caption(text, self._path(facts, "_text"), facts | self.text_facts)

    def control(self, image: Path, area: int) -> Control:
        facts: Facts = {
            "image": image.name,
            "image_digest": latent_cache.file_digest(image),
            "area": area,
            "architecture": self.architecture.name,
        }
        return Control(image, area, self._path(facts, ""), facts | self.latent_facts)

    def _path(self, facts: Facts, ending: str) -> Path:
        dataset = self.config.dataset
        assert dataset.image_directory is not None
        folder = cache_folder(dataset.cache_directory, dataset.image_directory, "train")
        name = latent_cache.facts_digest(facts)[:24]
        return folder / "prompts" / f"{name}{ending}.safetensors"


def _tell(todo: SamplePlan, report: Reporter) -> None:
    """What a user may not expect."""
    settings = todo.config.samples
    for picture in todo.pictures:
        if unused := picture.prompt.unused:
            report(
                Message(
                    f"{picture.prompt.where}: {todo.architecture.name} has no use for "
                    f"{', '.join(unused)}; left out",
                    level="warning",
                )
            )
    asked = settings.sample_every_n_steps or settings.sample_every_n_epochs
    if todo.pictures and not asked and not settings.sample_at_first:
        report(
            Message(
                "the sample prompts are drawn only on request; sample_every_n_steps or "
                "sample_every_n_epochs draws them during the training",
                level="warning",
            )
        )


def _require_encoders(
    todo: SamplePlan, captions: Sequence[Caption], controls: Sequence[Control]
) -> None:
    needed = [*(["vae"] if controls else []), *(_TEXT_ENCODERS if captions else [])]
    absent = [name for name in needed if todo.config.value(name) is None]
    if absent:
        raise ConfigError(
            f"{len(captions)} sample prompts and {len(controls)} control images are not in the "
            "cache; encode them first (in ComfyUI the node Cache Dataset with samples connected), "
            f"or give {', '.join(absent)} so that the training can do it"
        )


def _encode_texts(
    todo: SamplePlan,
    captions: Sequence[Caption],
    encode: Callable[[list[str], int], list[dict[str, Tensor]]],
    report: Reporter,
) -> None:
    for done, caption in enumerate(captions, start=1):
        # One at a time: in a batch the last bits of an embedding may depend on the other texts.
        [tensors] = encode([caption.text], todo.config.dataset.text_max_length)
        with explained(caption.path):
            latent_cache.write_cache(caption.path, tensors, caption.facts)
        report(Progress("cache prompts", done, len(captions), unit="prompt"))


def _encode_controls(
    todo: SamplePlan,
    controls: Sequence[Control],
    encode: Callable[[Tensor], Tensor],
    report: Reporter,
) -> None:
    for done, control in enumerate(controls, start=1):
        pixels = control_pixels(control.image, control.area, todo.architecture)
        with explained(control.path):
            latent_cache.write_cache(control.path, {"latents": encode(pixels[None])}, control.facts)
        report(Progress("cache control images", done, len(controls), unit="image"))
