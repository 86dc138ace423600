"""How the layers of Qwen-Image and its editing models are called.

It was published as a model of diffusers, and everybody uses those names.
https://github.com/QwenLM/Qwen-Image
"""

from __future__ import annotations

from ..key_table import Row
from ..layer_names import LayerNames

_OUTSIDE = (
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.addition_t_embedding",  # of Qwen-Image-Layered only
    "txt_norm",
    "img_in",
    "txt_in",
    "norm_out.linear",
    "proj_out",
)
_IN_A_BLOCK = (
    "img_mod.1",
    "txt_mod.1",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.norm_q",
    "attn.norm_k",
    "attn.norm_added_q",
    "attn.norm_added_k",
    "attn.to_out.0",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)

TABLE: tuple[Row, ...] = tuple(
    Row(name, (name,))
    for name in (*_OUTSIDE, *(f"transformer_blocks.{{}}.{name}" for name in _IN_A_BLOCK))
)

NAMES = LayerNames(
    family="qwen_image",
    base_models=(
        "qwen_image",
        "qwen_image_edit",
        "qwen_image_layered",
        "Qwen-Image",
        "Qwen-Image-Edit",
        "Qwen-Image-Edit-Plus",
        "Qwen-Image-Edit-2511",
        "Qwen-Image-Layered",
    ),
    table=TABLE,
    blocks=("transformer_blocks.",),
    # Matches none of the published names: the modulation layers (img_mod.1, txt_mod.1) are
    # trained in this family. Kept so that LoRAs have the same layers as those of other trainers.
    default_excludes=(r".*(_mod_).*",),
    depth=(("transformer_blocks", 60),),
)
