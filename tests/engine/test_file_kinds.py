from __future__ import annotations

import pytest
from pack.engine.file_kinds import describe

FLUX = ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (FLUX, "a FLUX.1 transformer"),
        ([f"model.diffusion_model.{key}" for key in FLUX], "a FLUX.1 transformer"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], "a LoRA file"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA file"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "an autoencoder (VAE)"),
        (["taesd_encoder.0.weight"], "a TAESD autoencoder"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "a CLIP text encoder"),
        (["blocks.0.self_attn.q.weight", "patch_embedding.weight"], "a Wan transformer"),
        (
            ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"],
            "a Qwen-Image transformer",
        ),
        (
            ["double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.x"],
            "a HunyuanVideo transformer",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"],
            "an SDXL checkpoint",
        ),
        (["something.else"], "a file that we do not know (first tensor 'something.else')"),
        ([], "an empty file"),
    ],
)
def test_files_are_named_by_their_tensors(keys: list[str], kind: str) -> None:
    assert describe(keys) == kind
