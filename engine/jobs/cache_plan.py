"""What all images of a run are for, and which of them the cache does not hold as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import latent_cache
from ..architectures.base import Architecture
from ..captions import replace_word
from ..config import Config
from ..dataset import choose_held_out
from ..errors import ConfigError, DataError
from .entries import (
    FOLDERS,
    Caption,
    Entry,
    EntryMaker,
    Facts,
    encoder_facts,
    size_chooser,
    uses_masks,
)

_MAX_LISTED = 20


@dataclass(frozen=True)
class Plan:
    """All entries, and those whose latents or captions have to be encoded.

    ``notes`` is what the user should know of them.
    """

    entries: list[Entry]
    stale_latents: list[Entry]
    stale_text: list[Caption]
    notes: list[str]

    @property
    def num_captions(self) -> int:
        return sum(len(entry.captions) for entry in self.entries)


def plan(
    config: Config, architecture: Architecture, encoders: tuple[Facts, Facts] | None = None
) -> Plan:
    """Compare the folders with the cache.

    Args:
        encoders: identities of what encodes images and captions; None: of what is configured.
            An encoder that is not is taken to be the one that made the cache.

    Raises:
        ConfigError: settings exclude each other.
        DataError: images, captions, masks or control images cannot be used.
    """
    _check(config)
    words = _trigger_and_class(config)
    latent_base, text_base = encoders or encoder_facts(config)
    make = EntryMaker(
        config, architecture, size_chooser(config, architecture), latent_base, text_base
    )
    entries = make.entries("train")
    notes = _mask_notes(config, entries)
    if config.validation.validation_split:
        entries = _split(config, entries)
    if words:
        entries, found = _with_class_captions(entries, *words)
        notes += found
    for role in ("regularization", "validation"):
        if config.value(FOLDERS[role]):
            entries += make.entries(role)
    notes += _validation_notes(entries)
    return Plan(
        entries,
        [entry for entry in entries if not is_current(entry.latents, entry.latent_facts)],
        [each for entry in entries for each in entry.captions if not _is_caption_current(each)],
        notes,
    )


def _check(config: Config) -> None:
    """Settings of images that exclude or need each other."""
    dataset, validation = config.dataset, config.validation
    if dataset.mask_directory and dataset.alpha_mask:
        raise ConfigError(
            "mask_directory and alpha_mask both say where the masks are; leave one of them out"
        )
    if validation.validation_directory and validation.validation_split:
        raise ConfigError(
            "validation_directory and validation_split both say what is measured; leave one out"
        )
    folders: dict[Path, str] = {}
    for setting in FOLDERS.values():
        folder: Path | None = config.value(setting)
        if folder and (other := folders.setdefault(folder.resolve(), setting)) != setting:
            raise ConfigError(
                f"{setting} = {folder}: this is {other}, too; give another folder"
                + (" or use validation_split" if setting == "validation_directory" else "")
            )


def _trigger_and_class(config: Config) -> tuple[str, str] | None:
    """The words of differential output preservation, if it is wanted."""
    names = ("trigger_word", "preservation_class")
    trigger, word = ((config.value(name) or "").strip() for name in names)
    if not trigger and not word:
        return None
    if not trigger or not word:
        raise ConfigError(
            f"{names[1] if trigger else names[0]} is missing; differential output preservation "
            "needs trigger_word and preservation_class, or leave both out"
        )
    if trigger.casefold() == word.casefold():
        raise ConfigError(
            f"preservation_class = {word!r} is the trigger_word; give the class of things that it "
            "belongs to"
        )
    return trigger, word


def _mask_notes(config: Config, entries: Sequence[Entry]) -> list[str]:
    if not uses_masks(config):
        return []
    without = sum(entry.sample.mask is None for entry in entries)
    if without == len(entries):
        where = config.dataset.mask_directory
        raise DataError(
            f"mask_directory = {where}: no mask has the name of an image; name them alike"
            if where
            else f"alpha_mask: no image in {config.dataset.image_directory} has an alpha channel; "
            "save them with one, or turn alpha_mask off"
        )
    if not without:
        return []
    return [f"{without} of {len(entries)} images have no mask and are trained as a whole"]


def _split(config: Config, entries: Sequence[Entry]) -> list[Entry]:
    """A part of the training images is for validation."""
    split = config.validation.validation_split
    if len(entries) < 2:
        raise ConfigError(
            f"validation_split = {split}: there is only one image; add another, or give a "
            "validation_directory"
        )
    digests = [str(entry.latent_facts["image_digest"]) for entry in entries]
    chosen = set(choose_held_out(digests, share=split, seed=config.runtime.seed))
    return [
        replace(entry, role="validation") if index in chosen else entry
        for index, entry in enumerate(entries)
    ]


def _validation_notes(entries: Sequence[Entry]) -> list[str]:
    names = [entry.sample.image.name for entry in entries if entry.role == "validation"]
    if not names:
        return []
    rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    shown = ", ".join(names[:_MAX_LISTED])
    return [f"{len(names)} of {len(entries)} images are only measured: {shown}{rest}"]


def _with_class_captions(
    entries: Sequence[Entry], trigger: str, word: str
) -> tuple[list[Entry], list[str]]:
    """Those to train get a second caption where the first has the trigger word."""
    done: list[Entry] = []
    for entry in entries:
        text = replace_word(entry.sample.caption, trigger, word)
        if entry.role == "train" and text is not None:
            path = latent_cache.class_text_path(entry.text)
            caption = Caption(text, path, entry.caption.facts | {"caption": text})
            entry = replace(entry, class_caption=caption)
        done.append(entry)
    trained = [entry for entry in done if entry.role == "train"]
    without = sum(entry.class_caption is None for entry in trained)
    if without == len(trained):
        raise ConfigError(
            f"trigger_word = {trigger!r}: no caption contains it, so there is nothing for "
            "preservation_class to replace; write it into the captions"
        )
    if not without:
        return done, []
    return done, [
        f"{without} of {len(trained)} captions do not contain {trigger!r}; nothing is preserved "
        "for these"
    ]


def _is_caption_current(caption: Caption) -> bool:
    return is_current(caption.path, caption.facts)


def is_current(path: Path, facts: Facts) -> bool:
    """Whether a cache file was made from this; what is None may be anything."""
    stored = latent_cache.read_facts(path)
    return (
        stored is not None
        # A mask that is not wanted may not be there either.
        and stored.get("mask") == facts.get("mask")
        and all(value is None or stored.get(name) == value for name, value in facts.items())
    )
