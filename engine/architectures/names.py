"""How the layers of every family are called, by the name of the family.

Some of them have no adapter in this package yet: LoRA files are read and written without one.
"""

from __future__ import annotations

from ..layer_names import LayerNames
from . import flux_names, framepack_names, hunyuan_video_names, qwen_image_names, wan_names

LAYER_NAMES: dict[str, LayerNames] = {
    names.family: names
    for names in (
        flux_names.NAMES,
        wan_names.NAMES,
        qwen_image_names.NAMES,
        hunyuan_video_names.NAMES,
        framepack_names.NAMES,
    )
}
