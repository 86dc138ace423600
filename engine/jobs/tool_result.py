"""What a tool for LoRA files gives back, for the shell and for nodes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ConfigError, EngineError
from ..memory import size_in_words


@dataclass(frozen=True)
class ToolResult:
    """``report`` is text of several lines for people; ``path`` is the file that was written."""

    report: str
    path: Path | None = None
    picture: Image.Image | None = None


def check_output(path: Path, *, overwrite: bool) -> None:
    """Make sure that a file can be written, before anything is computed.

    Raises:
        ConfigError: it is there already, has the wrong ending, or its folder is missing.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: the file to write must end in .safetensors")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; create it first")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: the file exists; choose another name, or allow overwriting")


def check_not_an_input(output: Path, inputs: Iterable[Path]) -> None:
    """Make sure that no file is written over while it is read.

    Raises:
        ConfigError: ``output`` is one of ``inputs``.
    """
    if output.exists() and any(path.exists() and path.samefile(output) for path in inputs):
        raise ConfigError(
            f"{output}: the file to write is one of those that are read; choose another name"
        )


def check_room(output: Path, needed: int) -> None:
    """Make sure that the disk has room for a file of ``needed`` bytes.

    Raises:
        EngineError: it has not.
    """
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise EngineError(
            f"{output.parent}: the file needs {size_in_words(needed)}, but only "
            f"{size_in_words(free)} are free; make room or choose another folder"
        )
