"""What Post-hoc EMA averages, and how much each file counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..engine.errors import DataError
from ..engine.jobs.outputs import RunFiles
from . import paths
from .tool_runs import source

if TYPE_CHECKING:
    from ..engine.jobs.lora_ema import Averaging

_NUMBER = re.compile(r"-(step\d{8}|\d{6})$")
_LONGEST = 200  # characters of a pattern of names
_SORTINGS = ("steps", "time", "name")


def sigma_rel_input() -> io.Input:
    """Width of the mean."""
    return io.Float.Input(
        "sigma_rel",
        default=0.2,
        min=0.0,
        max=0.288,
        step=0.01,
        round=False,
        tooltip="Width of the mean as a part of the training, usually 0.05 to 0.25: smaller is "
        "nearer to the last file; 0: beta decides.",
    )


def more_inputs() -> list[io.Input]:
    """The rest of the widgets."""
    names = {"beta": "Part of the mean that each file leaves of it, such as 0.95; 0: unset."}
    names["beta2"] = "That of the last file, if it is another; 0: unset."
    betas = [
        io.Float.Input(
            name,
            default=0.0,
            min=0.0,
            max=0.9999,
            step=0.01,
            round=False,
            tooltip=tooltip,
            advanced=True,
        )
        for name, tooltip in names.items()
    ]
    return [
        *betas,
        io.Boolean.Input(
            "keep_first",
            default=False,
            tooltip="With sigma_rel, let the oldest file count, too.",
            advanced=True,
        ),
        io.Boolean.Input(
            "by_steps",
            default=False,
            tooltip="With sigma_rel, let each file count for the steps since the one before.",
            advanced=True,
        ),
        io.Combo.Input(
            "sort",
            options=list(_SORTINGS),
            tooltip="Which file is older: by its steps, the time it was changed, or its name.",
            advanced=True,
        ),
        io.String.Input(
            "files",
            default="",
            tooltip="Names of files in ComfyUI's list of LoRAs instead, with * for anything: "
            "my_style-step*.",
            advanced=True,
        ),
    ]


def chosen(inputs: Mapping[str, Any]) -> Averaging:
    """What the widgets mean.

    Raises:
        ConfigError: they contradict each other, or one is out of range.
    """
    from ..engine.jobs.lora_ema import Averaging

    return Averaging(
        beta=inputs["beta"] or None,
        beta2=inputs["beta2"] or None,
        sigma_rel=inputs["sigma_rel"] or None,
        keep_first=inputs["keep_first"],
        by_steps=inputs["by_steps"],
    )


def saved_loras(inputs: Mapping[str, Any], output: Path) -> list[Path]:
    """The files to average: those that ``files`` names, or all of the run of one LoRA.

    The file to write is none of them. Of those that a run saved after the same step, only one is.

    Raises:
        EngineError: there are none, or one cannot be read.
    """
    if names := _matching(inputs["files"]):
        found = [path for path in map(paths.lora, names) if path != output]
    elif inputs["files"].strip():
        raise DataError(
            f"files: {inputs['files']!r} is the name of no LoRA; write names as ComfyUI lists "
            "them, with * for anything"
        )
    else:
        of_run = _of_run(source(inputs["lora"], inputs.get("lora_path")))
        found = _one_of_each_step([path for path in of_run if path != output])
    if len(found) < 2:
        raise DataError(
            f"Post-hoc EMA: a mean needs at least two files, and there is {len(found)}; train with "
            "save_every_n_steps, or name the files"
        )
    return found


def named(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Names of LoRAs that count besides the chosen one, for `tool_runs.fingerprint`."""
    files, lora = inputs.get("files"), inputs.get("lora")
    if isinstance(files, str) and files.strip():
        names = _matching(files)
    elif isinstance(lora, str):
        stem = _NUMBER.sub("", lora.removesuffix(".safetensors"))
        names = [name for name in paths.loras() if name.startswith(stem)]
    else:
        names = []
    return {f"file {place}": name for place, name in enumerate(names)}


def _matching(pattern: str) -> list[str]:
    pattern = pattern.strip()[:_LONGEST]
    return [
        name
        for name in paths.loras()
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.safetensors")
    ]


def _of_run(path: Path) -> list[Path]:
    files = RunFiles(path.parent, _NUMBER.sub("", path.stem))
    return [*files.numbered(".safetensors"), *([files.lora] if files.lora.exists() else [])]


def _one_of_each_step(found: list[Path]) -> list[Path]:
    from ..engine.jobs.lora_series import open_series

    if len(found) < 2:
        return found
    steps: dict[int, Path] = {}
    unknown: list[Path] = []
    for file in open_series(found, "given"):
        if file.step is None:
            unknown.append(file.path)
        else:
            steps.setdefault(file.step, file.path)
    return [*steps.values(), *unknown]
