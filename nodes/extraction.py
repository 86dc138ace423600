"""What Extract LoRA sets, and its run in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy_api.latest import io
from PIL import Image

from ..engine.jobs.tool_result import ToolResult
from . import paths
from .progress import NodeProgress, free_memory
from .ranks import chosen_ranks
from .tool_runs import run_in_child


def inputs() -> list[io.Input]:
    """The widgets beside those of ranks and files."""
    return [
        io.Float.Input(
            "min_difference",
            default=0.0,
            min=0.0,
            max=1e6,
            step=1e-6,
            round=False,
            tooltip="Leave out layers that nowhere differ by more.",
            advanced=True,
        ),
        io.Float.Input(
            "clamp_quantile",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            round=False,
            tooltip="Limit outliers to this quantile, which other tools set to 0.99; 0: unset.",
            advanced=True,
        ),
        io.Boolean.Input(
            "full_rest",
            default=False,
            tooltip="Take biases and norms that differ, too, as whole differences.",
            advanced=True,
        ),
        io.String.Input(
            "include_patterns",
            default="",
            multiline=True,
            tooltip="Only these layers: regular expressions that match the whole name, one a line.",
            advanced=True,
        ),
        io.String.Input(
            "exclude_patterns",
            default="",
            multiline=True,
            tooltip="Layers to leave out, one pattern a line.",
            advanced=True,
        ),
    ]


def arguments(inputs: Mapping[str, Any]) -> list[str]:
    """The widgets as arguments of the tool in the shell, but for those of files.

    Raises:
        ConfigError: a rank cannot be.
    """
    ranks = chosen_ranks(inputs)
    values = {
        "rank": ranks.rank,
        "amount": ranks.amount,
        "method": ranks.method,
        "max_rank": ranks.max_rank,
        "dtype": inputs["dtype"],
        "format": inputs["format"],
        "architecture": inputs["architecture"],
        "min_difference": inputs["min_difference"],
        "clamp_quantile": inputs["clamp_quantile"] or None,
    }
    words = [
        word for name, value in values.items() if value is not None for word in (f"--{name}", value)
    ]
    words += ["--full_rest"] if inputs["full_rest"] else []
    words += ["--include_patterns", *_patterns(inputs["include_patterns"])]
    words += ["--exclude_patterns", *_patterns(inputs["exclude_patterns"])]
    return [str(word) for word in words]


def run(
    *,
    tuned: Path,
    base: Path,
    output: Path,
    arguments: list[str],
    overwrite: bool,
    report: NodeProgress,
) -> ToolResult:
    """Extract as ``python -m engine lora extract`` does, on the device that ComfyUI uses.

    Raises:
        EngineError: a file or an argument cannot be used.
        InterruptProcessingException: the user cancelled.
    """
    free_memory()
    drawn = paths.temporary_file(f"{output.stem}.png")
    drawn.parent.mkdir(parents=True, exist_ok=True)
    drawn.unlink(missing_ok=True)
    device = "cpu" if comfy.model_management.cpu_mode() else "auto"
    words = [str(tuned), str(base), str(output), *arguments]
    words += ["--picture", str(drawn), "--device", device]
    text = run_in_child("extract", [*words, *(["--overwrite"] if overwrite else [])], report)
    picture = None
    if drawn.exists():
        with Image.open(drawn) as image:
            picture = image.convert("RGB")
    return ToolResult(text, output, picture)


def _patterns(text: str) -> list[str]:
    """One of each line, none of which the command line takes for an option."""
    lines = filter(None, map(str.strip, text.splitlines()))
    return [f"(?:){line}" if line.startswith("-") else line for line in lines]
