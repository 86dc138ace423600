"""Encode images and captions once, and only what changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .. import hardware, latent_cache, media
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedData, CachedItem, read_item
from ..errors import ConfigError
from ..events import Finished, Message, Progress, Reporter
from ..signals import StopSignals
from .cache_plan import Plan, plan
from .entries import Caption, Entry, Facts
from .outputs import explained

__all__ = [
    "Encoders",
    "Entry",
    "Facts",
    "Plan",
    "cached_data",
    "cached_items",
    "data_of",
    "item",
    "load_text_encoders",
    "plan",
    "require_encoders",
    "run",
    "run_with",
]

_DECODE_AHEAD = 8
_TEXT_BATCH = 8


@dataclass(frozen=True)
class Encoders:
    """Encoders that someone else has loaded.

    Args:
        latent_facts, text_facts: what tells them from others, under the names that the facts of
            configured encoders have.
        encode_image: pixels [1, 3, H, W] in [-1, 1] -> latents [C, T, h, w] for the transformer.
        encode_text: captions and the number of tokens -> the conditions of each.
    """

    latent_facts: Facts
    text_facts: Facts
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str], int], list[dict[str, Tensor]]]


def run(config: Config, report: Reporter) -> None:
    """Bring the cache up to date.

    Raises:
        EngineError: a setting, image or model file cannot be used.
        Stopped: a signal ended the job; what was encoded stays.
    """
    config.require("image_directory", "vae", "text_encoder1", "text_encoder2")
    hardware.use_threads(config.runtime.cpu_threads)
    with StopSignals():
        architecture = find_architecture(config.model.architecture, config.model.dit)
        todo = plan(config, architecture)
        _tell(todo, report)
        _update(config, architecture, todo, report)
    report(Finished("cache"))


def run_with(
    config: Config, architecture: Architecture, encoders: Encoders, report: Reporter
) -> Plan:
    """Bring the cache up to date with ``encoders``; gives what was to be done.

    Raises:
        EngineError: a setting or image cannot be used.
    """
    facts = encoders.latent_facts, encoders.text_facts
    todo = plan(config, architecture, facts)
    _tell(todo, report)
    _encode_latents(todo.stale_latents, encoders.encode_image, report)
    _encode_text(config, todo.stale_text, encoders.encode_text, report)
    report(Message(_summary(todo)))
    return todo


def cached_data(config: Config, architecture: Architecture, report: Reporter) -> CachedData:
    """All images of a run; what is missing is encoded if the encoders are configured.

    Raises:
        ConfigError: something is missing and the encoders are not configured.
        DataError: images, captions, masks or control images cannot be used.
    """
    todo = plan(config, architecture)
    require_encoders(config, todo)
    _tell(todo, report)
    if todo.stale_latents or todo.stale_text:
        _update(config, architecture, todo, report)
    return data_of(config, todo)


def cached_items(config: Config, architecture: Architecture, report: Reporter) -> list[CachedItem]:
    """Those of `cached_data` that are trained."""
    return cached_data(config, architecture, report).train


def data_of(config: Config, todo: Plan) -> CachedData:
    """What the cache holds of a plan; all of it must be there."""
    return CachedData(
        train=[item(config, entry) for entry in todo.entries if entry.role != "validation"],
        validation=[item(config, entry) for entry in todo.entries if entry.role == "validation"],
    )


def require_encoders(config: Config, todo: Plan) -> None:
    """Check that what is to be encoded can be.

    Raises:
        ConfigError: encoders are not configured.
    """
    encoders = {"vae": bool(todo.stale_latents)}
    encoders |= dict.fromkeys(("text_encoder1", "text_encoder2"), bool(todo.stale_text))
    absent = [name for name, needed in encoders.items() if needed and config.value(name) is None]
    if absent:
        raise ConfigError(
            f"{len(todo.stale_latents)} of {len(todo.entries)} images and {len(todo.stale_text)} "
            "captions are not in the cache; encode them first (the cache job, in ComfyUI the node "
            f"Cache Dataset), or give {', '.join(absent)} so that the training can do it"
        )


def _update(config: Config, architecture: Architecture, todo: Plan, report: Reporter) -> None:
    device = hardware.find_device(config.runtime.device)
    if todo.stale_latents:
        assert config.model.vae is not None
        dtype = hardware.stored_or(config.model.vae_dtype)
        autoencoder = architecture.load_autoencoder(config.model.vae, dtype=dtype, device=device)
        _encode_latents(
            todo.stale_latents, lambda pixels: autoencoder.encode(pixels.to(device))[0], report
        )
        del autoencoder
    if todo.stale_text:
        encoders = load_text_encoders(config, architecture, device)
        _encode_text(
            config,
            todo.stale_text,
            lambda captions, length: architecture.encode_text(encoders, captions, length),
            report,
        )
    report(Message(_summary(todo)))


def _tell(todo: Plan, report: Reporter) -> None:
    for note in todo.notes:
        report(Message(note))


def _summary(todo: Plan) -> str:
    return (
        f"encoded {len(todo.stale_latents)} of {len(todo.entries)} images and "
        f"{len(todo.stale_text)} of {todo.num_captions} captions; the rest was current"
    )


def _encode_latents(
    entries: Sequence[Entry], encode: Callable[[Tensor], Tensor], report: Reporter
) -> None:
    for done, (entry, pictures) in enumerate(_pictures(entries), start=1):
        encoded = [encode(pixels[None]) for pixels in pictures.pixels]
        tensors: dict[str, Tensor] = {"latents": encoded[0]}
        tensors |= {f"control_latents_{index}": value for index, value in enumerate(encoded[1:])}
        if pictures.mask is not None:
            tensors["mask"] = _latent_mask(pictures.mask, encoded[0])
        with explained(entry.latents):
            latent_cache.write_cache(entry.latents, tensors, entry.latent_facts)
        report(Progress("cache images", done, len(entries), unit="image"))


def _latent_mask(mask_1HW: Tensor, latents_CTHW: Tensor) -> Tensor:
    """The mask [1, T, h, w] of the latents: of each, how much of its pixels is masked in."""
    height, width = latents_CTHW.shape[-2:]
    area_1HW = F.adaptive_avg_pool2d(mask_1HW, (height, width))
    return area_1HW[:, None].expand(-1, latents_CTHW.shape[1], -1, -1).contiguous()


class _Pictures(NamedTuple):
    """The image and its control images [3, H, W], and its mask [1, H, W]."""

    pixels: list[Tensor]
    mask: Tensor | None


def _pictures(entries: Sequence[Entry]) -> Iterator[tuple[Entry, _Pictures]]:
    """Each entry with its pictures, decoded a few ahead."""
    waiting: list[tuple[Entry, Future[_Pictures]]] = []
    with ThreadPoolExecutor(thread_name_prefix="decode") as pool:
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(_load, entry)))
                if len(waiting) > _DECODE_AHEAD:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _load(entry: Entry) -> _Pictures:
    sample = entry.sample
    pixels = [
        media.to_tensor(media.resize_to_bucket(media.load_image(path), entry.size))
        for path in (sample.image, *sample.controls)
    ]
    return _Pictures(pixels, _load_mask(entry) if entry.is_masked else None)


def _load_mask(entry: Entry) -> Tensor:
    sample = entry.sample
    if sample.mask is None:
        return torch.ones(1, *reversed(entry.size))
    load = media.load_opacity if sample.mask == sample.image else media.load_mask
    return media.mask_tensor(load(sample.mask), sample.size, entry.size)


def _encode_text(
    config: Config,
    captions: Sequence[Caption],
    encode: Callable[[list[str], int], list[dict[str, Tensor]]],
    report: Reporter,
) -> None:
    for start in range(0, len(captions), _TEXT_BATCH):
        chosen = captions[start : start + _TEXT_BATCH]
        encoded = encode([caption.text for caption in chosen], config.dataset.text_max_length)
        for caption, tensors in zip(chosen, encoded, strict=True):
            with explained(caption.path):
                latent_cache.write_cache(caption.path, tensors, caption.facts)
        report(Progress("cache captions", start + len(chosen), len(captions), unit="caption"))


def load_text_encoders(config: Config, architecture: Architecture, device: torch.device) -> Any:
    """The configured text encoders."""
    model = config.model
    assert model.text_encoder1 is not None and model.text_encoder2 is not None
    return architecture.load_text_encoders(
        model.text_encoder1,
        model.text_encoder2,
        model.tokenizer1,
        model.tokenizer2,
        dtype=hardware.stored_or(model.text_encoder_dtype),
        device=device,
    )


def item(config: Config, entry: Entry) -> CachedItem:
    """What the cache holds of one entry."""
    facts = {"latents": latent_cache.read_facts(entry.latents)}
    facts |= {"text": latent_cache.read_facts(entry.text)}
    class_text = entry.class_caption.path if entry.class_caption else None
    if class_text:
        facts["class_text"] = latent_cache.read_facts(class_text)
    return read_item(
        entry.latents,
        entry.text,
        latent_cache.facts_digest(facts),
        repeats=config.dataset.num_repeats if entry.role == "train" else 1,
        class_text=class_text,
        is_regularization=entry.role == "regularization",
    )
