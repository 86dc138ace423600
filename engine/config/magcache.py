"""A cache of what the model's blocks do, for drawing in fewer computed steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..config_types import PathSetting
from .group import Group


class MagCacheConfig(Group):
    """MagCache"""

    magcache_mag_ratios: str | None = Field(
        default=None,
        description='Leave out steps by these ratios, with commas between; "0" for the published '
        'ones of the family, "auto" for the best there are.',
    )
    magcache_retention_ratio: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Part of the steps at the beginning that are always computed.",
    )
    magcache_threshold: float = Field(
        default=0.24, ge=0, le=1000, description="Largest sum of errors of steps left out in a row."
    )
    magcache_k: int = Field(
        default=6, ge=0, le=1000, description="Most steps that are left out in a row."
    )
    magcache_steps: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Compute so many steps, where they matter most; used instead of the threshold.",
    )
    magcache_prediction: Literal["reuse", "linear"] = Field(
        default="reuse",
        description="A step that is left out does what the last computed one did, or goes on along "
        "a line through the last two.",
    )
    magcache_calibration: bool = Field(
        default=False, description="Compute every step, and tell (and store) the model's ratios."
    )
    magcache_curves: PathSetting | None = Field(
        default=None, description="Folder of ratios that were measured, for calibration and auto."
    )
