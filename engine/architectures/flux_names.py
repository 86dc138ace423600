"""How the layers of FLUX.1 are called; published are the names of Black Forest Labs.

https://github.com/black-forest-labs/flux. ComfyUI uses the same.
"""

from __future__ import annotations

from ..key_table import Row
from ..layer_names import LayerNames


def _double(published: str, *inner: str, weight_name: str = "weight") -> Row:
    inner = tuple(f"transformer_blocks.{{}}.{name}" for name in inner)
    return Row(f"double_blocks.{{}}.{published}", inner, weight_name)


def _single(
    published: str, *inner: str, weight_name: str = "weight", parts: tuple[int, ...] = ()
) -> Row:
    inner = tuple(f"single_transformer_blocks.{{}}.{name}" for name in inner)
    return Row(f"single_blocks.{{}}.{published}", inner, weight_name, parts=parts)


TABLE: tuple[Row, ...] = (
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    Row("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Row("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    Row("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Row("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Row("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Row("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    _double("img_mod.lin", "norm1.linear"),
    _double("txt_mod.lin", "norm1_context.linear"),
    _double("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    _double("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    _double("img_attn.norm.query_norm", "attn.norm_q", weight_name="scale"),
    _double("img_attn.norm.key_norm", "attn.norm_k", weight_name="scale"),
    _double("txt_attn.norm.query_norm", "attn.norm_added_q", weight_name="scale"),
    _double("txt_attn.norm.key_norm", "attn.norm_added_k", weight_name="scale"),
    _double("img_attn.proj", "attn.to_out.0"),
    _double("txt_attn.proj", "attn.to_add_out"),
    _double("img_mlp.0", "ff.net.0.proj"),
    _double("img_mlp.2", "ff.net.2"),
    _double("txt_mlp.0", "ff_context.net.0.proj"),
    _double("txt_mlp.2", "ff_context.net.2"),
    _single("modulation.lin", "norm.linear"),
    _single("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", parts=(1, 1, 1, 4)),
    _single("linear2", "proj_out"),
    _single("norm.query_norm", "attn.norm_q", weight_name="scale"),
    _single("norm.key_norm", "attn.norm_k", weight_name="scale"),
    Row("final_layer.linear", ("proj_out",)),
    # Published as (shift, scale); diffusers keeps (scale, shift).
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
)

NAMES = LayerNames(
    family="flux_kontext",
    # As this pack and its peers write it, and as sd-scripts does for FLUX.1.
    base_models=("flux_kontext", "Flux.1-dev", "flux1", "flux-1-dev"),
    table=TABLE,
    blocks=("double_blocks.", "single_blocks."),
    default_excludes=(r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*",),
    always_excludes=(r".*(norm).*",),
    own_excludes_replace=True,
    never_quantized=(r".*(norm|mod).*",),
    depth=(("double_blocks", 19), ("single_blocks", 38)),
)
