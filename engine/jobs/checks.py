"""Everything that can be known about a training run before its model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from .. import hardware
from ..architectures import find_architecture
from ..architectures.base import Architecture
from ..config import Config
from ..dataset import CachedItem
from ..errors import CheckpointError
from ..events import Finished, Message, Reporter
from ..memory import size_in_words
from ..presets import MEMORY_PRESETS
from ..weights import open_checkpoint
from . import build, cache, disk, outputs
from .cache_plan import Plan as CachePlan
from .entries import Entry
from .model import quantization_of
from .needs import Needs, needs_of
from .plan import Plan, plan_run
from .recipe import recipe_of, saved_progress
from .times import check_times

NEEDED = ("dit", "image_directory", "output_dir", "output_name")
_MODEL_FILES = ("dit", "vae", "text_encoder1", "text_encoder2", "tokenizer1", "tokenizer2")
_CHECKPOINTING = "gradient_checkpointing"


def run(config: Config, report: Reporter) -> None:
    """Everything that a training does before it loads anything, and what it would need.

    Raises:
        EngineError: what the training would raise.
    """
    config.require(*NEEDED)
    check_files(config)
    files, state_path = outputs.find_start(config)
    build.check(config)
    device = hardware.find_device(config.runtime.device)
    architecture = find_architecture(config.model.architecture, config.model.dit)
    assert config.model.dit is not None
    transformer = architecture.empty_transformer(
        config.model.dit, quantization=quantization_of(config)
    )
    todo = cache.plan(config, architecture)
    cache.require_encoders(config, todo)
    items = expected_items(config, architecture, transformer, todo)
    check_times(config, architecture, items)
    saved = saved_progress(state_path, recipe_of(config, architecture, 1)) if state_path else None
    start = saved.step if saved else 0
    plan = plan_run(config, items, num_processes=1, start=start, report=report)
    needs = needs_of(config, architecture, transformer, items, plan, device)
    for note in todo.notes:
        report(Message(note))
    for problem in _problems(needs, files):
        report(problem)
    for text in (*_what(needs, todo), *_needed(needs, files)):
        report(Message(text))
    report(Finished("check"))


def before_loading(
    config: Config,
    architecture: Architecture,
    items: Sequence[CachedItem],
    files: outputs.RunFiles,
    plan: Plan,
    device: torch.device,
) -> list[Message]:
    """What the user should know; takes a second or two for 12 billion weights.

    Raises:
        CheckpointError: the file of the model is not whole, or of another model.
        EngineError: the folder cannot be written to, or the disk has not enough room.
    """
    assert config.model.dit is not None
    transformer = architecture.empty_transformer(
        config.model.dit, quantization=quantization_of(config)
    )
    return _problems(needs_of(config, architecture, transformer, items, plan, device), files)


def check_files(config: Config) -> None:
    """Whether the model files that are configured are there and may be read.

    Raises:
        CheckpointError: one is not.
    """
    for name in _MODEL_FILES:
        path: Path | None = config.value(name)
        if path is None:
            continue
        if not path.exists():
            raise CheckpointError(f"{name} = {path}: there is no such file; check the path")
        files = path.rglob("*") if path.is_dir() else [path]
        for file in files:
            if not os.access(file, os.R_OK):
                raise CheckpointError(
                    f"{name}: {file} may not be read by this user; change its permissions"
                )


def expected_items(
    config: Config, architecture: Architecture, transformer: nn.Module, todo: CachePlan
) -> list[CachedItem]:
    """The images to train, with the shapes that those will have that are still to be encoded."""
    stale = {id(entry) for entry in todo.stale_latents}
    stale_text = {id(caption) for caption in todo.stale_text}
    conditions = architecture.condition_shapes(transformer, config.dataset.text_max_length)
    for caption in (each for entry in todo.entries for each in entry.captions):
        if id(caption) not in stale_text:
            # The tokenizer may have a limit of its own.
            stored = open_checkpoint(caption.path).entries
            conditions = {name: entry.shape for name, entry in stored.items()}
            break
    items: list[CachedItem] = []
    for entry in todo.entries:
        if entry.role == "validation":
            continue
        missing = id(entry) in stale or any(id(each) in stale_text for each in entry.captions)
        items.append(
            _expected(config, architecture, conditions, entry)
            if missing
            else cache.item(config, entry)
        )
    return items


def _expected(
    config: Config,
    architecture: Architecture,
    conditions: Mapping[str, tuple[int, ...]],
    entry: Entry,
) -> CachedItem:
    width, height = (side // architecture.pixels_per_latent for side in entry.size)
    latents = (architecture.latent_channels, 1, height, width)
    shapes = {"latents": latents, **conditions}
    shapes |= {f"control_latents_{index}": latents for index in range(len(entry.sample.controls))}
    if entry.is_masked:
        shapes["mask"] = (1, 1, height, width)
    class_text = entry.class_caption.path if entry.class_caption else None
    if class_text:
        shapes |= {f"class_{name}": shape for name, shape in conditions.items()}
    # The number types are those of the encoders; float32 is the most that they can be.
    elements = sum(math.prod(shape) for shape in shapes.values())
    return CachedItem(
        entry.latents,
        entry.text,
        tuple(sorted(shapes.items())),
        num_bytes=torch.float32.itemsize * elements,
        content="",
        repeats=config.dataset.num_repeats if entry.role == "train" else 1,
        class_text=class_text,
        is_regularization=entry.role == "regularization",
    )


def _problems(needs: Needs, files: outputs.RunFiles) -> list[Message]:
    """Checks folder and room, and warns when memory is too small."""
    disk.check_folder(files.folder)
    disk.check_room(files.folder, _bytes_on_disk(needs, files))
    checkpointing = needs.config.training.gradient_checkpointing
    estimate = needs.memory(gradient_checkpointing=checkpointing)
    free = needs.available_bytes()
    if free is None or estimate.total_bytes <= free:
        return []
    advice = "use a smaller resolution or batch_size"
    if not checkpointing:
        less = needs.memory(gradient_checkpointing=True).total_bytes
        advice = f"with {_CHECKPOINTING} it is {size_in_words(less)}; turn that on, or {advice}"
    return [
        Message(
            f"training needs about {estimate.in_words()}, but {needs.device} has "
            f"{size_in_words(free)}; {advice}",
            level="warning",
        )
    ]


def _what(needs: Needs, todo: CachePlan) -> Iterator[str]:
    """What would be trained, and for how long."""
    items, plan = needs.items, needs.plan
    shapes = {dict(item.shapes)["latents"] for item in items}
    scale = needs.architecture.pixels_per_latent
    sizes = sorted(f"{shape[-1] * scale}x{shape[-2] * scale}" for shape in shapes)
    yield (
        f"images: {len(items)}, of sizes {', '.join(sizes[:4])}{', ...' if sizes[4:] else ''}; "
        f"batches per epoch: {plan.batches_per_epoch}; still to be encoded: "
        f"{len(todo.stale_latents)} of the images, {len(todo.stale_text)} captions"
    )
    done = f", of which {plan.start} are done" if plan.start else ""
    yield (
        f"optimizer steps: {plan.total_steps}{done}; batches per step: {plan.batches_per_step}; "
        f"epochs: {plan.total_steps * plan.batches_per_step / plan.batches_per_epoch:.1f}"
    )
    yield needs.planned.summary()


def _needed(needs: Needs, files: outputs.RunFiles) -> Iterator[str]:
    """Disk and memory; of every memory preset, with the one that is set first."""
    folder = files.folder
    room = disk.check_room(folder, _bytes_on_disk(needs, files))
    yield (
        f"disk: {size_in_words(_bytes_on_disk(needs, files))} at most in {folder}, where "
        f"{size_in_words(room)} are free ({size_in_words(needs.lora_bytes)} for a LoRA, "
        f"{size_in_words(needs.state_bytes)} for a state)"
    )
    free = needs.available_bytes()
    there = "" if free is None else f"; {size_in_words(free)} are there"
    now = needs.config.training.gradient_checkpointing
    estimate = needs.memory(gradient_checkpointing=now)
    yield f"memory of {needs.device}: about {estimate.in_words()}{there}"
    for name, preset in MEMORY_PRESETS.items():
        on = preset.settings.get(_CHECKPOINTING, now)
        if on != now:
            other = needs.memory(gradient_checkpointing=on)
            yield f"with memory preset {name}: about {other.in_words()}"


def _bytes_on_disk(needs: Needs, files: outputs.RunFiles) -> int:
    return disk.needed_bytes(
        needs.config,
        files,
        needs.plan,
        lora_bytes=needs.lora_bytes,
        state_bytes=needs.state_bytes,
    )
