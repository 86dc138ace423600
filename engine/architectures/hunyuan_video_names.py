"""How the layers of HunyuanVideo are called; published are Tencent's names.

https://github.com/Tencent-Hunyuan/HunyuanVideo. ComfyUI renames the layers to be called as those
of FLUX when it loads a model.
"""

from __future__ import annotations

from ..key_table import Row
from ..layer_names import LayerNames

_REFINER = "txt_in.individual_token_refiner.blocks.{}"


def _row(published: str, *inner: str, comfyui: str = "") -> Row:
    return Row(published, inner, aliases=(comfyui,) if comfyui else ())


def _embedder(published: str, inner: str, *, layers: tuple[str, str]) -> tuple[Row, Row]:
    """Two linear layers with an activation between them."""
    return (
        _row(f"{published}.{layers[0]}", f"{inner}.linear_1", comfyui=f"{published}.in_layer"),
        _row(f"{published}.{layers[1]}", f"{inner}.linear_2", comfyui=f"{published}.out_layer"),
    )


def _refiner(published: str, *inner: str, comfyui: str = "") -> Row:
    inner = tuple(f"context_embedder.token_refiner.refiner_blocks.{{}}.{name}" for name in inner)
    alias = comfyui and f"{_REFINER}.{comfyui}"
    return _row(f"{_REFINER}.{published}", *inner, comfyui=alias)


def _double(published: str, *inner: str, comfyui: str) -> Row:
    inner = tuple(f"transformer_blocks.{{}}.{name}" for name in inner)
    alias = f"double_blocks.{{}}.{comfyui}"
    return _row(f"double_blocks.{{}}.{published}", *inner, comfyui=alias)


def _single(published: str, *inner: str, comfyui: str = "", parts: tuple[int, ...] = ()) -> Row:
    inner = tuple(f"single_transformer_blocks.{{}}.{name}" for name in inner)
    aliases = (f"single_blocks.{{}}.{comfyui}",) if comfyui else ()
    return Row(f"single_blocks.{{}}.{published}", inner, parts=parts, aliases=aliases)


TABLE: tuple[Row, ...] = (
    _row("img_in.proj", "x_embedder.proj"),
    *_embedder("time_in", "time_text_embed.timestep_embedder", layers=("mlp.0", "mlp.2")),
    Row("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Row("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    *_embedder("guidance_in", "time_text_embed.guidance_embedder", layers=("mlp.0", "mlp.2")),
    _row("txt_in.input_embedder", "context_embedder.proj_in"),
    *_embedder(
        "txt_in.t_embedder",
        "context_embedder.time_text_embed.timestep_embedder",
        layers=("mlp.0", "mlp.2"),
    ),
    *_embedder(
        "txt_in.c_embedder",
        "context_embedder.time_text_embed.text_embedder",
        layers=("linear_1", "linear_2"),
    ),
    _refiner("norm1", "norm1"),
    _refiner("norm2", "norm2"),
    _refiner("self_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v", comfyui="self_attn.qkv"),
    _refiner("self_attn_proj", "attn.to_out.0", comfyui="self_attn.proj"),
    _refiner("mlp.fc1", "ff.net.0.proj", comfyui="mlp.0"),
    _refiner("mlp.fc2", "ff.net.2", comfyui="mlp.2"),
    _refiner("adaLN_modulation.1", "norm_out.linear"),
    _double("img_mod.linear", "norm1.linear", comfyui="img_mod.lin"),
    _double("txt_mod.linear", "norm1_context.linear", comfyui="txt_mod.lin"),
    _double("img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v", comfyui="img_attn.qkv"),
    _double(
        "txt_attn_qkv",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        comfyui="txt_attn.qkv",
    ),
    _double("img_attn_q_norm", "attn.norm_q", comfyui="img_attn.norm.query_norm"),
    _double("img_attn_k_norm", "attn.norm_k", comfyui="img_attn.norm.key_norm"),
    _double("txt_attn_q_norm", "attn.norm_added_q", comfyui="txt_attn.norm.query_norm"),
    _double("txt_attn_k_norm", "attn.norm_added_k", comfyui="txt_attn.norm.key_norm"),
    _double("img_attn_proj", "attn.to_out.0", comfyui="img_attn.proj"),
    _double("txt_attn_proj", "attn.to_add_out", comfyui="txt_attn.proj"),
    _double("img_mlp.fc1", "ff.net.0.proj", comfyui="img_mlp.0"),
    _double("img_mlp.fc2", "ff.net.2", comfyui="img_mlp.2"),
    _double("txt_mlp.fc1", "ff_context.net.0.proj", comfyui="txt_mlp.0"),
    _double("txt_mlp.fc2", "ff_context.net.2", comfyui="txt_mlp.2"),
    _single("modulation.linear", "norm.linear", comfyui="modulation.lin"),
    _single("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", parts=(1, 1, 1, 4)),
    _single("linear2", "proj_out"),
    _single("q_norm", "attn.norm_q", comfyui="norm.query_norm"),
    _single("k_norm", "attn.norm_k", comfyui="norm.key_norm"),
    _row("final_layer.linear", "proj_out"),
    # Published as (shift, scale); diffusers keeps (scale, shift).
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
)

NAMES = LayerNames(
    family="hunyuan_video",
    base_models=("hunyuan_video", "hunyuan-video"),
    table=TABLE,
    blocks=("double_blocks.", "single_blocks."),
    default_excludes=(r".*(img_mod|txt_mod|modulation).*",),
    never_quantized=(r".*(norm|_mod|modulation).*",),
    depth=(("double_blocks", 20), ("single_blocks", 40)),
)
