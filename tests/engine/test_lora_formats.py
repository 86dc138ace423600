from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError
from pack.engine.lora_file import read_lora
from pack.engine.lora_formats import parse
from safetensors.torch import save_file

FLUX, WAN, QWEN, HUNYUAN = (
    LAYER_NAMES[family] for family in ("flux_kontext", "wan", "qwen_image", "hunyuan_video")
)
PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my_adapter_2.weight", "lora_B.my_adapter_2.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora_down", "lora_up"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
# (family, what a key begins with, published layer, spelling)
MODULES = (
    (WAN, "blocks.3.ffn.0", "blocks.3.ffn.0", "comfyui"),
    (WAN, "diffusion_model.blocks.3.ffn.0", "blocks.3.ffn.0", "comfyui"),
    (WAN, "model.diffusion_model.blocks.3.ffn.0", "blocks.3.ffn.0", "comfyui"),
    (WAN, "lora_unet_blocks_3_ffn_0", "blocks.3.ffn.0", "kohya"),
    (WAN, "lora_unet__blocks_3_cross_attn_k_img", "blocks.3.cross_attn.k_img", "kohya"),
    (WAN, "transformer.blocks.3.attn1.to_out.0", "blocks.3.self_attn.o", "diffusers"),
    (WAN, "base_model.model.blocks.3.self_attn.o", "blocks.3.self_attn.o", "diffusers"),
    (WAN, "pipe.dit.blocks.3.self_attn.o", "blocks.3.self_attn.o", "comfyui"),
    (FLUX, "lora_unet_double_blocks_18_img_attn_proj", "double_blocks.18.img_attn.proj", "kohya"),
    (
        FLUX,
        "lora_transformer_single_transformer_blocks_3_proj_out",
        "single_blocks.3.linear2",
        "kohya",
    ),
    (FLUX, "lycoris_transformer_blocks_3_ff_net_0_proj", "double_blocks.3.img_mlp.0", "kohya"),
    (FLUX, "transformer.transformer_blocks.3.ff.net.2", "double_blocks.3.img_mlp.2", "diffusers"),
    (
        FLUX,
        "transformer.base_model.model.transformer_blocks.3.ff.net.2",
        "double_blocks.3.img_mlp.2",
        "diffusers",
    ),
    (
        FLUX,
        "transformer_blocks.3.attn.processor.to_out",
        "double_blocks.3.img_attn.proj",
        "diffusers",
    ),
    (QWEN, "transformer_blocks.3.img_mod.1", "transformer_blocks.3.img_mod.1", "diffusers"),
    (
        QWEN,
        "transformer.transformer_blocks.3.img_mod.1",
        "transformer_blocks.3.img_mod.1",
        "diffusers",
    ),
    (
        QWEN,
        "diffusion_model.transformer_blocks.3.img_mod.1",
        "transformer_blocks.3.img_mod.1",
        "comfyui",
    ),
    (QWEN, "unet.transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q", "diffusers"),
    (HUNYUAN, "lora_unet_double_blocks_3_img_mlp_fc1", "double_blocks.3.img_mlp.fc1", "kohya"),
    (HUNYUAN, "lora_unet_double_blocks_3_img_mlp_0", "double_blocks.3.img_mlp.fc1", "kohya"),
    (
        HUNYUAN,
        "transformer.double_blocks.3.img_mod.linear",
        "double_blocks.3.img_mod.linear",
        "diffusers",
    ),
    (
        HUNYUAN,
        "diffusion_model.single_blocks.3.modulation.lin",
        "single_blocks.3.modulation.linear",
        "comfyui",
    ),
)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, generator=generator), torch.randn(8, 2, generator=generator)


@pytest.mark.parametrize(("names", "module", "published", "format"), MODULES)
@pytest.mark.parametrize(("down_end", "up_end"), PAIRS)
def test_every_spelling_is_read(
    tmp_path: Path, names, module: str, published: str, format: str, down_end: str, up_end: str
) -> None:
    down, up = factors()
    path = tmp_path / "a.safetensors"
    save_file({f"{module}.{down_end}": down, f"{module}.{up_end}": up}, path)
    read = read_lora(path, [names])
    assert list(read.layers) == [published]
    lora = read.layers[published]
    assert isinstance(lora, LoRAWeights)
    assert torch.equal(lora.down, down) and torch.equal(lora.up, up) and lora.scale == 1
    assert read.format == format


def test_diffusers_first_spelling_has_the_modules_name_before_an_underscore(
    tmp_path: Path,
) -> None:
    down, up = factors()
    stem, path = "transformer_blocks.0.attn.processor.to_out_lora", tmp_path / "a.safetensors"
    save_file({f"{stem}.down.weight": down, f"{stem}.up.weight": up}, path)
    assert list(read_lora(path, [FLUX]).layers) == ["double_blocks.0.img_attn.proj"]


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q.hada_w1_a",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "text_encoders.llama.transformer.model.layers.0.mlp.up_proj.lora_A.weight",
        "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "bundle_emb.token.t5_out",
    ],
)
def test_keys_of_text_encoders_are_kept_as_they_are(tmp_path: Path, key: str) -> None:
    down, up = factors()
    path = tmp_path / "a.safetensors"
    kept = torch.arange(3, dtype=torch.int32)
    stem = "diffusion_model.blocks.0.ffn.0"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, key: kept}, path)
    read = read_lora(path, [WAN])
    assert list(read.other) == [key] and torch.equal(read.other[key], kept)
    assert read.remarks == ("1 keys of text encoders are kept as they are",)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        ("lora_unet_blocks_0_ffn_0.oft_blocks", "OFT"),
        ("diffusion_model.blocks.0.ffn.0.oft_R.weight", "OFT"),
        ("diffusion_model.blocks.0.ffn.0.boft_R", "BOFT"),
        ("lora_unet_blocks_0_ffn_0.a1.weight", "GLoRA"),
        ("lora_unet_blocks_0_ffn_0.on_input", "IA3"),
        ("base_model.model.blocks.0.ffn.0.ia3_l", "IA3"),
        ("base_model.model.blocks.0.ffn.0.vera_lambda_b", "VeRA"),
        ("base_model.model.blocks.0.ffn.0.lora_E", "AdaLoRA"),
        ("lora_unet_blocks_0_ffn_0.lambda_layer", "T-LoRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("single_blocks.0.norm.key_norm.set_weight", "control LoRA"),
        ("transformer_blocks.0.qkv_proj.qweight", "SVDQuant"),
    ],
)
def test_an_algorithm_that_is_not_supported_is_named(
    tmp_path: Path, key: str, algorithm: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(2, 2), "blocks.0.ffn.0.alpha": torch.ones(())}, path)
    with pytest.raises(CheckpointError, match=f"{algorithm}.* which is not supported; use a LoRA"):
        read_lora(path, [WAN])


def test_two_adapters_in_one_file_are_not_mixed() -> None:
    keys = [f"blocks.0.ffn.0.lora_A.{name}.weight" for name in ("default", "second")]
    with pytest.raises(CheckpointError, match="holds two LoRAs"):
        parse(Path("a.safetensors"), keys)


def test_a_key_that_would_be_lost_is_an_error() -> None:
    keys = ["blocks.0.ffn.0.lora_A.weight", "blocks.0.ffn.0.lora_C.weight"]
    with pytest.raises(CheckpointError, match=r"'blocks.0.ffn.0.lora_C.weight' is not a key"):
        parse(Path("a.safetensors"), keys)


def test_what_is_no_lora_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"taesd_encoder.0.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="TAESD"):
        read_lora(path, [WAN])
    save_file({"lora_te_x.alpha": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="for text encoders only"):
        read_lora(path, [WAN])
