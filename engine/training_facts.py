"""What the metadata of a LoRA file say about its training, whoever trained it.

Read are the ``ss_*`` keys of kohya's trainers, musubi-tuner and this pack, ``modelspec.*``
(https://github.com/Stability-AI/ModelSpec) and the keys of AI Toolkit (``software``,
``training_info``). Whatever stands there was written by others, so that all is made short, and
printable, on one line.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

_LONGEST = 100
_MOST_TAGS = 12
_MOST_FOLDERS = 4
_ABSENT = ("", "None", "null", "{}", "[]")

Fact = Callable[[Mapping[str, str]], str]


def training_facts(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is known, by its name, in the order in which people want to know it."""
    found = ((name, printable(fact(metadata))) for name, fact in _FACTS.items())
    return [(name, text) for name, text in found if text]


def steps_done(metadata: Mapping[str, str]) -> int | None:
    """Optimizer steps after which the file was saved; None if nothing tells."""
    for said in (metadata.get("ss_steps", ""), _inside(metadata, "training_info", "step")):
        if (steps := _whole(said)) is not None:
            return steps
    return None


def printable(text: str, longest: int = _LONGEST) -> str:
    """On one line, without control characters, shortened at the end."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * longest]).split())
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."


def _first(*keys: str) -> Fact:
    """What the first of these keys says that says anything."""

    def fact(metadata: Mapping[str, str]) -> str:
        said = (metadata.get(key, "").strip() for key in keys)
        return next((text for text in said if text not in _ABSENT), "")

    return fact


def _joined(separator: str, *facts: Fact) -> Fact:
    def fact(metadata: Mapping[str, str]) -> str:
        return separator.join(dict.fromkeys(filter(None, (each(metadata) for each in facts))))

    return fact


def _with(prefix: str, fact: Fact) -> Fact:
    return lambda metadata: f"{prefix}{text}" if (text := fact(metadata)) else ""


def _parsed(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return None


def _inside(metadata: Mapping[str, str], key: str, name: str) -> str:
    """A number or text in a JSON object."""
    value = _parsed(metadata, key)
    value = value.get(name) if isinstance(value, dict) else None
    return str(value) if isinstance(value, str | int | float) else ""


def _software(metadata: Mapping[str, str]) -> str:
    name, version = (_inside(metadata, "software", each) for each in ("name", "version"))
    return f"{name} {version}".strip()


def _steps(metadata: Mapping[str, str]) -> str:
    done, planned = steps_done(metadata), _whole(metadata.get("ss_max_train_steps", ""))
    if done is None:
        return ""
    return f"{done:,}" if planned in (None, done) else f"{done:,} of {planned:,}"


def _epochs(metadata: Mapping[str, str]) -> str:
    done, planned = metadata.get("ss_epoch", ""), metadata.get("ss_num_epochs", "")
    done = done if done not in _ABSENT else _inside(metadata, "training_info", "epoch")
    return f"{done} of {planned}" if done and planned not in (*_ABSENT, done) else done


def _time(metadata: Mapping[str, str]) -> str:
    """When it was finished, and how long it took."""
    started, finished = (
        _seconds(metadata.get(f"ss_training_{each}_at", "")) for each in ("started", "finished")
    )
    if finished is None:
        return _first("modelspec.date")(metadata)
    date = datetime.fromtimestamp(finished, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if started is None or not 0 < finished - started < 1e8:
        return date
    minutes = round((finished - started) / 60)
    return f"{date}, after {minutes // 60}:{minutes % 60:02d} h"


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _seconds(text: str) -> float | None:
    """Since 1970, between then and the year 2100."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 < value < 4_102_444_800 else None


def _images(metadata: Mapping[str, str]) -> str:
    number = _first("ss_num_train_items", "ss_num_train_images")(metadata)
    folders = _parsed(metadata, "ss_dataset_dirs")
    if not isinstance(folders, dict) or not folders:
        return number
    named = [
        f"{name} ({folder.get('img_count', '?')} x {folder.get('n_repeats', 1)})"
        for name, folder in list(folders.items())[:_MOST_FOLDERS]
        if isinstance(folder, dict)
    ]
    more = f" and {len(folders) - _MOST_FOLDERS} more" if len(folders) > _MOST_FOLDERS else ""
    return f"{number}{': ' if number else ''}{', '.join(named)}{more}"


def _tags(metadata: Mapping[str, str]) -> str:
    """The most frequent ones, which are the words that call what was trained."""
    counts: Counter[str] = Counter()
    folders = _parsed(metadata, "ss_tag_frequency")
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(_MOST_TAGS))


def _mean_of(metadata: Mapping[str, str]) -> str:
    record = _parsed(metadata, "lora_loom.ema")
    files = record.get("files") if isinstance(record, dict) else None
    return f"mean of {len(files)} checkpoints" if isinstance(files, list) else ""


_FACTS: dict[str, Fact] = {
    "title": _first("modelspec.title", "ss_output_name", "name"),
    "author": _first("modelspec.author"),
    "description": _first("modelspec.description"),
    "comment": _first("ss_training_comment"),
    "trigger": _first("modelspec.trigger_phrase"),
    "license": _first("modelspec.license"),
    "tags": _first("modelspec.tags"),
    "base model": _joined(
        ", ",
        _first("ss_base_model_version", "modelspec.architecture"),
        _first("ss_sd_model_name"),
    ),
    "made with": _joined(
        ", ", _software, _first("modelspec.implementation"), _first("ss_network_module")
    ),
    "made by": _joined("; ", _first("lora_loom.operation"), _mean_of),
    "made from": _first("modelspec.merged_from"),
    "finished": _time,
    "steps": _steps,
    "epochs": _epochs,
    "learning rate": _joined(
        ", ",
        _first("ss_learning_rate", "ss_unet_lr"),
        _first("ss_lr_scheduler_type", "ss_lr_scheduler"),
        _with("warm-up ", _first("ss_lr_warmup_steps")),
    ),
    "optimizer": _joined(" ", _first("ss_optimizer"), _first("ss_optimizer_args")),
    "batch": _joined(
        ", ",
        _first("ss_total_batch_size", "ss_batch_size_per_device"),
        _with("gradients of ", _first("ss_gradient_accumulation_steps")),
    ),
    "images": _images,
    "frequent tags": _tags,
    "resolution": _first("modelspec.resolution", "ss_resolution"),
    "noise levels": _joined(
        ", ",
        _first("ss_timestep_sampling"),
        _with("shift ", _first("ss_discrete_flow_shift")),
        _with("range ", _first("modelspec.timestep_range")),
    ),
    "loss": _joined(", ", _first("ss_loss_type"), _first("ss_weighting_scheme")),
    "network": _joined(
        ", ",
        _with("dim ", _first("ss_network_dim")),
        _with("alpha ", _first("ss_network_alpha")),
        _with("dropout ", _first("ss_network_dropout")),
        _first("ss_network_args"),
    ),
    "precision": _first("ss_mixed_precision"),
    "seed": _first("ss_seed"),
}
