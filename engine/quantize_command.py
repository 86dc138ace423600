"""``python -m engine quantize``: a model file in 8 bits, made by the settings of a training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Config
from .events import Reporter
from .lora_command import save_picture

if TYPE_CHECKING:
    from .jobs.tool_result import ToolResult

LAYOUTS = ("blockwise", "comfyui")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What is no setting; the model is ``dit``, the LoRAs to merge ``lora_weight``."""
    command.description = (
        "Write a model in 8 bits: --dit is the model, --quantize_... say how, --lora_weight names "
        "LoRAs to merge before."
    )
    command.add_argument("--config_file", type=Path, help="TOML file with settings")
    command.add_argument("--output", type=Path, required=True, help="file to write")
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="blockwise",
        help="blockwise: for this package and musubi-tuner; comfyui: for ComfyUI's own loader, one "
        "scale for each layer",
    )
    command.add_argument("--picture", type=Path, help="PNG file for the picture of the errors")


def run(parsed: argparse.Namespace, config: Config, report: Reporter) -> ToolResult:
    """Do what the command line says.

    Raises:
        EngineError: a file or setting cannot be used.
    """
    from .jobs import quantize
    from .jobs.model import quantization_settings

    config.require("dit")
    assert config.model.dit is not None
    result = quantize.run(
        dit=config.model.dit,
        output=parsed.output,
        settings=quantization_settings(config.quantization),
        loras=config.generate.loras,
        layout=parsed.layout,
        architecture=config.model.architecture,
        overwrite=config.output.overwrite,
        report=report,
    )
    save_picture(result, parsed.picture)
    return result
