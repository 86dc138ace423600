"""What a tool for LoRA files gives back, for the shell and for nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ConfigError


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
