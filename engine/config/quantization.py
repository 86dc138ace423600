"""Models whose weights are kept in 8 bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config_types import PathSetting
from .group import Group
from .network import Patterns


class QuantizationConfig(Group):
    """Models in 8 bits"""

    fp8_scaled: bool = Field(
        default=False,
        description="Keep the weights of the model's blocks in 8 bits with scales: half the memory "
        "of bf16. For a training give fp8_base, too, for generating fp8.",
    )
    fp8_base: bool = Field(
        default=False, description="Train on such a model; goes with fp8_scaled only."
    )
    fp8: bool = Field(
        default=False, description="Generate with such a model; goes with fp8_scaled only."
    )
    quantize_format: Literal["e4m3", "e5m2", "int8"] = Field(
        default="e4m3",
        description="Kind of numbers: FP8 with 3 or 2 bits of mantissa, or INT8, which has a "
        "quarter of the error at the same size.",
    )
    quantize_mode: Literal["block", "channel", "tensor"] = Field(
        default="block", description="What has a scale of its own: so many inputs, a row, a layer."
    )
    quantize_block_size: int = Field(
        default=64, ge=16, le=4096, description="Inputs in a block of quantize_mode block."
    )
    quantize_scale_dtype: Literal["fp32", "bf16", "weight"] = Field(
        default="fp32", description="Number type of the scales; weight: that of the weight."
    )
    quantize_search: bool = Field(
        default=False,
        description="Look for the scale of the least error: about 5 % less, loading takes longer.",
    )
    quantize_compat: bool = Field(
        default=False, description="Compute scales and codes exactly as musubi-tuner does."
    )
    quantize_exclude_patterns: Patterns = Field(
        default=[], description="Layers to keep as they are: patterns of their whole names."
    )
    quantized_cache: PathSetting | None = Field(
        default=None,
        description="Folder that keeps the model in 8 bits, so that the next start only reads it.",
    )
