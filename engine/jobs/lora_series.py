"""The LoRA files that one training saved on its way: their order, and whether they fit together.

Only headers are read, and the few tensors that must be the same in all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import lora_family, lora_formats
from ..errors import CheckpointError, ConfigError
from ..training_facts import steps_done
from ..weights import Checkpoint, open_checkpoint
from .lora_inputs import families

SORTINGS = ("time", "name", "steps", "given")
_STEP_IN_NAME = re.compile(r"step[-_]?(\d+)|[-_](\d{9})$")  # of ours and kohya's; of AI Toolkit


@dataclass(frozen=True)
class SavedLora:
    """One of the files; ``step`` is the number of optimizer steps done, if that is known."""

    path: Path
    checkpoint: Checkpoint
    metadata: dict[str, str]
    step: int | None


def open_series(sources: Sequence[Path], sort: str) -> list[SavedLora]:
    """The files from the oldest to the newest.

    Args:
        sort: one of `SORTINGS`; of files that were changed in one moment, steps and name decide.

    Raises:
        EngineError: a file cannot be read or is given twice, there are less than two, or ``sort``
            needs steps that are not known.
    """
    if sort not in SORTINGS:
        raise ConfigError(f"sort = {sort!r} is unknown; choose one of {', '.join(SORTINGS)}")
    if len(sources) < 2:
        raise ConfigError(f"sources: a mean needs at least two LoRA files, got {len(sources)}")
    files = [_source(path) for path in sources]
    places = [path.resolve() for path in sources]
    if twice := next((each for each in places if places.count(each) > 1), None):
        raise ConfigError(f"{twice}: the file is given twice; give every file once")
    if sort == "given":
        return files
    if sort == "name":
        return sorted(files, key=lambda file: _natural(file.path))
    if sort == "steps":
        check_steps(files, increasing=False)
        return sorted(files, key=lambda file: (file.step or 0, _age(file)))
    return sorted(files, key=_age)


def check_steps(files: Sequence[SavedLora], *, increasing: bool = True) -> None:
    """See that the steps of all are known; with ``increasing``, that they rise from 1.

    Raises:
        ConfigError: they do not.
    """
    seen: dict[int, Path] = {}
    last = 0
    for file in files:
        if file.step is None:
            raise ConfigError(
                f"{file.path}: neither ss_steps in the file nor its name says after how many steps "
                "it was saved; sort by time or name, without by_steps"
            )
        if increasing and file.step in seen:
            raise ConfigError(
                f"{file.path}: it was saved after {file.step} steps, as was {seen[file.step]}; "
                "leave one of them out"
            )
        if increasing and file.step < 1:
            raise ConfigError(
                f"{file.path}: it was saved before the first step, so that it counts for no time "
                "by steps; leave it out"
            )
        if increasing and file.step <= last:
            raise ConfigError(
                f"{file.path}: it was saved after {file.step} steps but follows one of {last}; "
                "give sort = 'steps'"
            )
        seen[file.step] = file.path
        last = file.step


def check_alike(files: Sequence[SavedLora]) -> set[str]:
    """See that all have the same tensors; gives the keys whose values are the same in all.

    Those are alpha, which may be stored in any type and be rounded by that, and whole numbers.

    Raises:
        CheckpointError: a tensor is only in one file, has another shape there or another alpha, or
            the files say that they are of different models.
    """
    first, *others = files
    keys = lora_formats.parse(first.path, first.checkpoint.entries)
    fixed = {parts["alpha"] for parts in keys.modules.values() if "alpha" in parts}
    fixed |= {key for key in keys.other if key.endswith(".alpha")}
    fixed |= {k for k, e in first.checkpoint.entries.items() if not e.dtype.is_floating_point}
    for other in others:
        _check_keys(first, other)
        _check_metadata(first, other)
        for key in fixed:
            _check_same(first, other, key)
    return fixed


def described(file: SavedLora, architecture: str) -> str:
    """How many layers it has of which model, for people.

    Raises:
        EngineError: it is no LoRA, or ``architecture`` is not "auto" and it is not for that.
    """
    keys = lora_formats.parse(file.path, file.checkpoint.entries)
    number = f"{len(keys.modules)} layers"
    try:
        located = lora_family.find(
            file.path,
            list(keys.modules),
            families(architecture),
            metadata=file.metadata,
        )
    except (CheckpointError, ConfigError):
        if architecture != "auto":
            raise
        said = lora_family.claim(file.metadata)  # nothing here depends on the family
        return f"{number} of {said or 'an unknown model'}"
    return f"{number} of {located.names.family}"


def _source(path: Path) -> SavedLora:
    checkpoint = open_checkpoint(path)
    # Others write numbers into it, which a header may not hold.
    metadata = {key: text for key, text in checkpoint.metadata.items() if isinstance(text, str)}
    return SavedLora(path, checkpoint, metadata, _step_of(path, metadata))


def _step_of(path: Path, metadata: dict[str, str]) -> int | None:
    """Optimizer steps that were done, by what the file says or else by its name."""
    if (steps := steps_done(metadata)) is not None:
        return steps
    match = _STEP_IN_NAME.search(path.stem)
    return int(match[1] or match[2]) if match else None


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts "step9" before "step10"."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _age(file: SavedLora) -> tuple[int, int, list[tuple[int, str]]]:
    return file.path.stat().st_mtime_ns, file.step or 0, _natural(file.path)


def _check_keys(first: SavedLora, other: SavedLora) -> None:
    here, there = first.checkpoint.entries, other.checkpoint.entries
    if different := sorted(here.keys() ^ there.keys()):
        has, lacks = (first, other) if different[0] in here else (other, first)
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise CheckpointError(
            f"{lacks.path}: there is no {different[0]}{more}, which {has.path} has; average files "
            "of one training, in one format"
        )
    for key, entry in there.items():
        if entry.shape != here[key].shape:
            raise CheckpointError(
                f"{other.path}: {key} is {list(entry.shape)}, but {list(here[key].shape)} in "
                f"{first.path}; if the ranks differ, resize the files to the same rank first"
            )


def _check_metadata(first: SavedLora, other: SavedLora) -> None:
    for key in ("ss_base_model_version", "lora_adapter_metadata"):
        here, there = (each.metadata.get(key) for each in (first, other))
        if here is not None and there is not None and here != there:
            raise CheckpointError(
                f"{other.path}: {key} is {_shortened(there)}, but {_shortened(here)} in "
                f"{first.path}; average files of one training"
            )


def _check_same(first: SavedLora, other: SavedLora, key: str) -> None:
    here, there = (each.checkpoint.read(key) for each in (first, other))
    coarsest = max(
        torch.finfo(each.dtype).eps if each.is_floating_point() else 0.0 for each in (here, there)
    )
    if not torch.allclose(here.double(), there.double(), rtol=max(coarsest, 1e-5), atol=0):
        raise CheckpointError(
            f"{other.path}: {key} is {_values(there)}, but {_values(here)} in {first.path}; a mean "
            "of both would mean nothing, average files of one training"
        )


def _values(tensor: Tensor) -> str:
    values = ", ".join(f"{value:g}" for value in tensor.flatten()[:3].tolist())
    return values if tensor.numel() <= 3 else f"{values}, ..."


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
