"""How the layers of Wan 2.1 and 2.2 are called; published are the names of the makers.

https://github.com/Wan-Video/Wan2.1. ComfyUI uses the same.
"""

from __future__ import annotations

from ..key_table import Row
from ..layer_names import LayerNames


def _block(published: str, inner: str, *, bare: bool = False) -> Row:
    return Row(f"blocks.{{}}.{published}", (f"blocks.{{}}.{inner}",), bare=bare)


def _attention(published: str, inner: str) -> tuple[Row, ...]:
    return (
        _block(f"{published}.q", f"{inner}.to_q"),
        _block(f"{published}.k", f"{inner}.to_k"),
        _block(f"{published}.v", f"{inner}.to_v"),
        _block(f"{published}.o", f"{inner}.to_out.0"),
        _block(f"{published}.norm_q", f"{inner}.norm_q"),
        _block(f"{published}.norm_k", f"{inner}.norm_k"),
    )


TABLE: tuple[Row, ...] = (
    Row("patch_embedding", ("patch_embedding",)),
    Row("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
    Row("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
    Row("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
    Row("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
    Row("time_projection.1", ("condition_embedder.time_proj",)),
    # What CLIP saw in the first image: image to video of Wan 2.1 ...
    Row("img_emb.proj.0", ("condition_embedder.image_embedder.norm1",)),
    Row("img_emb.proj.1", ("condition_embedder.image_embedder.ff.net.0.proj",)),
    Row("img_emb.proj.3", ("condition_embedder.image_embedder.ff.net.2",)),
    Row("img_emb.proj.4", ("condition_embedder.image_embedder.norm2",)),
    # ... and which of two images it is, where first and last frame are given.
    Row("img_emb.emb_pos", ("condition_embedder.image_embedder.pos_embed",), bare=True),
    _block("modulation", "scale_shift_table", bare=True),
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    _block("cross_attn.k_img", "attn2.add_k_proj"),
    _block("cross_attn.v_img", "attn2.add_v_proj"),
    _block("cross_attn.norm_k_img", "attn2.norm_added_k"),
    # Numbered by diffusers in the order of use, by the makers in that of definition.
    _block("norm3", "norm2"),
    _block("ffn.0", "ffn.net.0.proj"),
    _block("ffn.2", "ffn.net.2"),
    Row("head.modulation", ("scale_shift_table",), bare=True),
    Row("head.head", ("proj_out",)),
)

NAMES = LayerNames(
    family="wan",
    # As this pack and its peers write it, then ai-toolkit.
    base_models=("wan", "wan2.1", "wan_2.1", "wan_2.2_14b"),
    table=TABLE,
    blocks=("blocks.",),
    default_excludes=(
        r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",
    ),
    # No other family has the names, and models of 30 and of 40 blocks were published.
    depth=(),
)
