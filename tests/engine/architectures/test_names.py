"""The tables of all families, against diffusers' classes and what others know of their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from pack.engine import lora_targets, weights
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.key_table import fusions, key_map, published_state_dict
from pack.engine.layer_names import locate, published_layers
from pack.tests.conftest import ROOT
from pack.tests.references import tiny_checkpoints
from pack.tests.references.qwen_inputs import text_lengths
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# What the reference may differ by, in standard deviations of its output.
PARITY = 5e-5


class Model(NamedTuple):
    """A published model and the layers that LoRA files of musubi-tuner have for it.

    Blocks, how many there are, and the layers of each with underscores in place of dots.
    """

    family: str
    create: Callable[..., nn.Module]
    settings: dict[str, Any]
    layers: tuple[tuple[str, int, str], ...]
    num_layers: int


FLUX = "img_attn_qkv img_attn_proj img_mlp_0 img_mlp_2 txt_attn_qkv txt_attn_proj txt_mlp_0"
HUNYUAN = "img_attn_qkv img_attn_proj img_mlp_fc1 img_mlp_fc2 txt_attn_qkv txt_attn_proj"
ATTENTION = (
    "attn_to_q attn_to_k attn_to_v attn_add_q_proj attn_add_k_proj attn_add_v_proj attn_to_out_0 "
    "attn_to_add_out"
)
QWEN = "img_mod_1 txt_mod_1 img_mlp_net_0_proj img_mlp_net_2 txt_mlp_net_0_proj txt_mlp_net_2"
FRAMEPACK = "ff_net_0_proj ff_net_2 ff_context_net_0_proj ff_context_net_2"
WAN = (
    "self_attn_q self_attn_k self_attn_v self_attn_o cross_attn_q cross_attn_k cross_attn_v "
    "cross_attn_o ffn_0 ffn_2"
)
WAN_IMAGE = f"{WAN} cross_attn_k_img cross_attn_v_img"
IMAGE_SETTINGS = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# Settings that differ from the defaults of the class, by transformer/config.json of the
# repositories on huggingface.co that are named.
MODELS = {
    "black-forest-labs/FLUX.1-Kontext-dev": Model(
        "flux_kontext",
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        (("double_blocks", 19, f"{FLUX} txt_mlp_2"), ("single_blocks", 38, "linear1 linear2")),
        228,
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Model(
        "wan",
        diffusers.WanTransformer3DModel,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        (("blocks", 30, WAN),),
        300,
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Model(
        "wan", diffusers.WanTransformer3DModel, {}, (("blocks", 40, WAN),), 400
    ),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": Model(
        "wan", diffusers.WanTransformer3DModel, IMAGE_SETTINGS, (("blocks", 40, WAN_IMAGE),), 480
    ),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": Model(
        "wan",
        diffusers.WanTransformer3DModel,
        {**IMAGE_SETTINGS, "pos_embed_seq_len": 514},
        (("blocks", 40, WAN_IMAGE),),
        480,
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": Model(
        "wan", diffusers.WanTransformer3DModel, {"in_channels": 36}, (("blocks", 40, WAN),), 400
    ),
    "hunyuanvideo-community/HunyuanVideo": Model(
        "hunyuan_video",
        diffusers.HunyuanVideoTransformer3DModel,
        {},
        (
            ("double_blocks", 20, f"{HUNYUAN} txt_mlp_fc1 txt_mlp_fc2"),
            ("single_blocks", 40, "linear1 linear2"),
        ),
        240,
    ),
    "lllyasviel/FramePackI2V_HY": Model(
        "framepack",
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        {"has_image_proj": True, "has_clean_x_embedder": True},
        (
            ("transformer_blocks", 20, f"{ATTENTION} {FRAMEPACK}"),
            (
                "single_transformer_blocks",
                40,
                "attn_to_q attn_to_k attn_to_v proj_mlp proj_out",
            ),
        ),
        440,
    ),
    "Qwen/Qwen-Image": Model(
        "qwen_image",
        diffusers.QwenImageTransformer2DModel,
        {"guidance_embeds": False},
        (("transformer_blocks", 60, f"{ATTENTION} {QWEN}"),),
        840,
    ),
}
# Of tests/references/tiny_checkpoints.py: 1 head of 128, as all of them.
TINY = {
    "hunyuan_video": (
        diffusers.HunyuanVideoTransformer3DModel,
        {
            "num_attention_heads": 1,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 64,
        },
    ),
    "wan_t2v": (diffusers.WanTransformer3DModel, {"in_channels": 16}),
    "wan22_i2v": (diffusers.WanTransformer3DModel, {"in_channels": 36}),
    "wan21_i2v": (
        diffusers.WanTransformer3DModel,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128},
    ),
    "qwen_image": (
        diffusers.QwenImageTransformer2DModel,
        {"num_attention_heads": 1, "num_layers": 1, "joint_attention_dim": 96},
    ),
}
WAN_SIZES = {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 384}


def empty(model: Model) -> nn.Module:
    with init_empty_weights():
        return model.create(**model.settings)


def tiny(case: str) -> nn.Module:
    create, settings = TINY[case]
    sizes = WAN_SIZES if family_of(case) == "wan" else {}
    with init_empty_weights():
        return create(**sizes, **settings)


def family_of(case: str) -> str:
    return "wan" if case.startswith("wan") else case


@pytest.mark.parametrize("name", MODELS)
def test_the_default_selection_has_the_layers_that_peers_train(name: str) -> None:
    model = MODELS[name]
    names = LAYER_NAMES[model.family]
    layers = {key: layer.shape for key, layer in published_layers(names, empty(model)).items()}
    selected = [key.replace(".", "_") for key in lora_targets.select(layers, names)]
    expected = {
        f"{blocks}_{block}_{layer}"
        for blocks, number, found in model.layers
        for block in range(number)
        for layer in found.split()
    }
    assert len(selected) == len(expected) == model.num_layers
    assert set(selected) == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_a_real_size_model_is_in_the_table_once(name: str) -> None:
    model = MODELS[name]
    transformer = empty(model)
    table = LAYER_NAMES[model.family].table
    published = published_state_dict(table, transformer)
    used = [inner for fusion in fusions(table, transformer) for inner in fusion.inner]
    assert len(used) == len(set(used))
    assert sum(value.numel() for value in published.values()) == sum(
        value.numel() for value in transformer.state_dict().values()
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_blocks_is_that_of_the_published_model(name: str) -> None:
    model = MODELS[name]
    depth = LAYER_NAMES[model.family].depth
    assert not depth or depth == tuple((blocks, number) for blocks, number, _ in model.layers)


@pytest.mark.parametrize("case", TINY)
def test_a_published_file_loads_strictly_and_is_written_back_the_same(
    tmp_path: Path, case: str
) -> None:
    state, _ = tiny_checkpoints.build(case)
    generator = torch.Generator().manual_seed(1)
    state = {  # not all norms are 1 then
        name: torch.randn(value.shape, generator=generator) for name, value in state.items()
    }
    transformer = loaded(case, {f"p.{name}": value for name, value in state.items()}, tmp_path)
    written = published_state_dict(LAYER_NAMES[family_of(case)].table, transformer)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def loaded(case: str, state: dict[str, Tensor], folder: Path) -> nn.Module:
    """Through the table, as a file whose names have the prefix ``p.``."""
    save_file(state, folder / "model.safetensors")
    transformer = tiny(case)
    sources = key_map(LAYER_NAMES[family_of(case)].table, transformer, prefix="p.")
    checkpoint = weights.open_checkpoint(folder / "model.safetensors")
    weights.load_into(transformer, checkpoint, sources, dtype=torch.float32)
    return transformer.eval()


@pytest.mark.parametrize("case", TINY)
@torch.no_grad()
def test_the_loaded_model_computes_what_an_independent_implementation_does(
    tmp_path: Path, case: str
) -> None:
    state, inputs = tiny_checkpoints.build(case)
    transformer = loaded(case, {f"p.{name}": value for name, value in state.items()}, tmp_path)
    reference = load_file(ROOT / f"tests/data/parity/{case}.safetensors")["velocity"]
    velocity = VELOCITIES[family_of(case)](transformer, inputs)
    assert (velocity - reference).abs().max() <= PARITY * reference.std()


def hunyuan_video(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return transformer(
        hidden_states=inputs["noisy_latents"],
        timestep=1000 * inputs["t"],
        encoder_hidden_states=inputs["text_embeds"],
        encoder_attention_mask=torch.ones(inputs["text_embeds"].shape[:2], dtype=torch.bool),
        pooled_projections=inputs["pooled"],
        guidance=1000 * inputs["guidance"],
        return_dict=False,
    )[0]


def wan(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    image = [inputs["image_latents"]] if "image_latents" in inputs else []
    return transformer(
        hidden_states=torch.cat([inputs["noisy_latents"], *image], dim=1),
        timestep=1000 * inputs["t"],
        encoder_hidden_states=inputs["text_embeds"],
        encoder_hidden_states_image=inputs.get("clip_embeds"),
        return_dict=False,
    )[0]


def qwen_image(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    latents = inputs["noisy_latents"]
    batch, channels, _, height, width = latents.shape
    tokens = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
    output = transformer(
        hidden_states=tokens,
        encoder_hidden_states=inputs["text_embeds"],
        timestep=inputs["t"],
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        **text_lengths(transformer, batch, inputs["text_embeds"].shape[1]),
        return_dict=False,
    )[0]
    output = output.view(batch, height // 2, width // 2, channels, 2, 2)
    return output.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


VELOCITIES = {"hunyuan_video": hunyuan_video, "wan": wan, "qwen_image": qwen_image}


@pytest.mark.parametrize(
    ("case", "convert", "beyond"),
    [
        ("wan_t2v", single_file_utils.convert_wan_transformer_to_diffusers, ""),
        ("wan21_i2v", single_file_utils.convert_wan_transformer_to_diffusers, ""),
        # Its converter takes these to be 3072 wide.
        (
            "hunyuan_video",
            single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
            "single_blocks.0.linear1",
        ),
    ],
)
def test_the_table_agrees_with_the_converter_of_diffusers(
    case: str, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], beyond: str
) -> None:
    state, _ = tiny_checkpoints.build(case)
    # Every tensor gets a value of its own, and each of its rows too.
    marked = {
        name: torch.arange(len(value)).view(-1, *(1 for _ in value.shape[1:])) + 10_000 * position
        for position, (name, value) in enumerate(state.items())
        if not beyond or not name.startswith(beyond)
    }
    sources = key_map(LAYER_NAMES[family_of(case)].table, tiny(case))
    converted = convert(dict(marked))
    assert len(converted) == len(sources) - (8 if beyond else 0)
    for inner, value in converted.items():
        source = sources[inner]
        key, transform = source if isinstance(source, tuple) else (source, lambda each: each)
        assert torch.equal(transform(marked[key]), value), inner


@pytest.mark.parametrize("family", LAYER_NAMES)
@pytest.mark.parametrize("separator", [".", "_"])
def test_every_spelling_of_a_layer_leads_to_it(family: str, separator: str) -> None:
    names = LAYER_NAMES[family]
    for row in names.table:
        index = [17] * row.published.count("{}")
        for other in (row.published, *row.aliases):
            place = locate(names, other.format(*index).replace(".", separator))
            assert place == (row.published.format(*index), row, None), other
        for part, inner in enumerate(row.inner):
            place = locate(names, inner.format(*index).replace(".", separator))
            assert place and (place.published, place.row) == (row.published.format(*index), row)
            if len(row.inner) > 1:
                assert place.part == part


def test_the_first_alias_of_a_layer_of_hunyuan_video_is_its_name_in_comfyui() -> None:
    # The replacements of comfy/supported_models.py, HunyuanVideo.process_unet_state_dict (0.33).
    replacements = """
        txt_in.t_embedder.mlp.0.=txt_in.t_embedder.in_layer.
        txt_in.t_embedder.mlp.2.=txt_in.t_embedder.out_layer.
        txt_in.c_embedder.linear_1.=txt_in.c_embedder.in_layer.
        txt_in.c_embedder.linear_2.=txt_in.c_embedder.out_layer.
        _mod.linear.=_mod.lin. _attn_qkv.=_attn.qkv. mlp.fc1.=mlp.0. mlp.fc2.=mlp.2.
        _attn_q_norm.weight=_attn.norm.query_norm.weight
        _attn_k_norm.weight=_attn.norm.key_norm.weight
        .q_norm.weight=.norm.query_norm.weight .k_norm.weight=.norm.key_norm.weight
        _attn_proj.=_attn.proj. .modulation.linear.=.modulation.lin.
        _in.mlp.2.=_in.out_layer. _in.mlp.0.=_in.in_layer.
    """
    for row in LAYER_NAMES["hunyuan_video"].table:
        comfyui = f"{row.published}.weight"
        for replacement in replacements.split():
            comfyui = comfyui.replace(*replacement.split("="))
        aliases = (comfyui.removesuffix(".weight"),)
        assert row.aliases == (aliases if aliases != (row.published,) else ()), row.published


def test_no_two_families_answer_to_the_same_base_model() -> None:
    every = [base.lower() for names in LAYER_NAMES.values() for base in names.base_models]
    assert len(every) == len(set(every))
    assert all(family in names.base_models for family, names in LAYER_NAMES.items())


def test_framepack_is_called_as_the_parts_of_hunyuan_video() -> None:
    hunyuan = {name for row in LAYER_NAMES["hunyuan_video"].table for name in row.inner}
    framepack = {row.published for row in LAYER_NAMES["framepack"].table}
    assert {name.partition(".")[0] for name in framepack - hunyuan} == {
        "clean_x_embedder",
        "image_projection",
    }
