"""What is drawn with a model."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..config_types import (
    Multipliers,
    PathSetting,
    Prompts,
    Size,
)
from .group import Group


class GenerateConfig(Group):
    """Generating"""

    prompt: Prompts = Field(
        default=[], description="What to draw; several prompts give several pictures."
    )
    from_file: PathSetting | None = Field(
        default=None, description="Text file with one prompt per line; lines with # are left out."
    )
    image_size: Size = Field(
        default=(1024, 1024),
        description="Size of the picture in pixels, as [width, height] or one side.",
    )
    infer_steps: int = Field(default=25, ge=1, le=1000, description="Sampling steps.")
    embedded_cfg_scale: float = Field(
        default=2.5, ge=0, le=1000, description="Guidance value that the model is given."
    )
    flow_shift: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Shift towards noise; unset: the family's for the size.",
    )
    lora_weight: list[PathSetting] = Field(default=[], description="LoRA files to apply.")
    lora_multiplier: Multipliers = Field(
        default=[], description="Strength of each LoRA, in the same order; 1.0 where missing."
    )
    control_image_path: list[PathSetting] = Field(
        default=[], description="Control images, for editing models."
    )
    save_path: PathSetting | None = Field(default=None, description="Folder of the pictures.")

    @property
    def loras(self) -> list[tuple[Path, float]]:
        """Each LoRA file with its multiplier."""
        missing = len(self.lora_weight) - len(self.lora_multiplier)
        return list(zip(self.lora_weight, [*self.lora_multiplier, *[1.0] * missing], strict=True))
