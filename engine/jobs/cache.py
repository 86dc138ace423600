"""Encode a folder of images and captions once, and only what changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import buckets, hardware, latent_cache, media, weights
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedItem, read_item
from ..errors import ConfigError, DataError
from ..events import Finished, Message, Progress, Reporter
from ..manifest import Sample, scan_folder
from ..signals import StopSignals
from .outputs import explained

_DECODE_AHEAD = 8
_TEXT_BATCH = 8
Facts = dict[str, object]


@dataclass(frozen=True)
class Entry:
    """One sample, the size it is trained at, its cache files and what they must be made from."""

    sample: Sample
    size: tuple[int, int]
    latents: Path
    text: Path
    latent_facts: Facts
    text_facts: Facts


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


@dataclass(frozen=True)
class Plan:
    """All entries, and those whose latents or text have to be encoded."""

    entries: list[Entry]
    stale_latents: list[Entry]
    stale_text: list[Entry]


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
        _update(config, architecture, plan(config, architecture), report)
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
    _encode_latents(todo.stale_latents, encoders.encode_image, report)
    _encode_text(config, todo.stale_text, encoders.encode_text, report)
    report(Message(_summary(todo)))
    return todo


def cached_items(config: Config, architecture: Architecture, report: Reporter) -> list[CachedItem]:
    """The training data; what is missing is encoded if the encoders are configured.

    Raises:
        ConfigError: something is missing and the encoders are not configured.
    """
    todo = plan(config, architecture)
    require_encoders(config, todo)
    if todo.stale_latents or todo.stale_text:
        _update(config, architecture, todo, report)
    return [item(config, entry) for entry in todo.entries]


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


def plan(
    config: Config, architecture: Architecture, encoders: tuple[Facts, Facts] | None = None
) -> Plan:
    """Compare the folder with the cache.

    Args:
        encoders: identities of what encodes images and captions; None: of what is configured.
            An encoder that is not is taken to be the one that made the cache.
    """
    dataset = config.dataset
    assert dataset.image_directory is not None
    samples = scan_folder(
        dataset.image_directory,
        caption_extension=dataset.caption_extension,
        control_directory=dataset.control_directory,
    )
    cache = dataset.cache_directory or dataset.image_directory / ".loom_cache"
    choose_size = _size_chooser(config, architecture)
    latent_base, text_base = encoders or _encoder_facts(config)
    entries: list[Entry] = []
    for sample in samples:
        size = choose_size(sample)
        latents, text = latent_cache.cache_paths(cache, sample.image, architecture.name)
        latent_facts: Facts = {
            "image": sample.image.name,
            "image_digest": latent_cache.file_digest(sample.image),
            "control_digests": [latent_cache.file_digest(path) for path in sample.controls],
            "size": list(size),
            "architecture": architecture.name,
            **latent_base,
        }
        text_facts: Facts = {
            "image": sample.image.name,
            "caption": sample.caption,
            "max_length": dataset.text_max_length,
            "architecture": architecture.name,
            **text_base,
        }
        entries.append(Entry(sample, size, latents, text, latent_facts, text_facts))
    return Plan(
        entries,
        [entry for entry in entries if not _is_current(entry.latents, entry.latent_facts)],
        [entry for entry in entries if not _is_current(entry.text, entry.text_facts)],
    )


def _is_current(path: Path, facts: Facts) -> bool:
    stored = latent_cache.read_facts(path)
    return stored is not None and all(
        value is None or stored.get(name) == value for name, value in facts.items()
    )


def _encoder_facts(config: Config) -> tuple[Facts, Facts]:
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


def _size_chooser(
    config: Config, architecture: Architecture
) -> Callable[[Sample], tuple[int, int]]:
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


def _summary(todo: Plan) -> str:
    total = len(todo.entries)
    return (
        f"encoded {len(todo.stale_latents)} of {total} images and {len(todo.stale_text)} of "
        f"{total} captions; the rest was current"
    )


def _encode_latents(
    entries: Sequence[Entry], encode: Callable[[Tensor], Tensor], report: Reporter
) -> None:
    for done, (entry, pictures) in enumerate(_pictures(entries), start=1):
        encoded = [encode(picture[None]) for picture in pictures]
        tensors: dict[str, Tensor] = {"latents": encoded[0]}
        tensors |= {f"control_latents_{index}": value for index, value in enumerate(encoded[1:])}
        with explained(entry.latents):
            latent_cache.write_cache(entry.latents, tensors, entry.latent_facts)
        report(Progress("cache images", done, len(entries), unit="image"))


def _pictures(entries: Sequence[Entry]) -> Iterator[tuple[Entry, list[Tensor]]]:
    """Each entry with its image and control images [3, H, W], decoded a few ahead."""
    waiting: list[tuple[Entry, Future[list[Tensor]]]] = []
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


def _load(entry: Entry) -> list[Tensor]:
    return [
        media.to_tensor(media.resize_to_bucket(media.load_image(path), entry.size))
        for path in (entry.sample.image, *entry.sample.controls)
    ]


def _encode_text(
    config: Config,
    entries: Sequence[Entry],
    encode: Callable[[list[str], int], list[dict[str, Tensor]]],
    report: Reporter,
) -> None:
    for start in range(0, len(entries), _TEXT_BATCH):
        chosen = entries[start : start + _TEXT_BATCH]
        captions = [entry.sample.caption for entry in chosen]
        encoded = encode(captions, config.dataset.text_max_length)
        for entry, tensors in zip(chosen, encoded, strict=True):
            with explained(entry.text):
                latent_cache.write_cache(entry.text, tensors, entry.text_facts)
        report(Progress("cache captions", start + len(chosen), len(entries), unit="caption"))


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
    facts = [latent_cache.read_facts(path) for path in (entry.latents, entry.text)]
    content = latent_cache.facts_digest({"latents": facts[0], "text": facts[1]})
    return read_item(entry.latents, entry.text, content, repeats=config.dataset.num_repeats)
