"""How the layers of FramePack are called: HunyuanVideo's, by the names of their parts in diffusers.

It was published so (https://github.com/lllyasviel/FramePack), with the layers of its own for
frames that are done and for what SigLIP saw in the first image.
"""

from __future__ import annotations

from ..key_table import Row
from ..layer_names import LayerNames
from .hunyuan_video_names import TABLE as HUNYUAN_VIDEO_TABLE

_OWN = (
    "clean_x_embedder.proj",
    "clean_x_embedder.proj_2x",
    "clean_x_embedder.proj_4x",
    "image_projection.up",
    "image_projection.down",
)

TABLE: tuple[Row, ...] = (
    *(Row(name, (name,)) for row in HUNYUAN_VIDEO_TABLE for name in row.inner),
    *(Row(name, (name,)) for name in _OWN),
)

NAMES = LayerNames(
    family="framepack",
    base_models=("framepack",),
    table=TABLE,
    blocks=("transformer_blocks.", "single_transformer_blocks."),
    default_excludes=(r".*(norm).*",),
    never_quantized=(r".*(norm).*",),
    depth=(("transformer_blocks", 20), ("single_transformer_blocks", 40)),
)
