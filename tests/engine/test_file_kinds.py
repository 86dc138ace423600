from __future__ import annotations

import pytest
from pack.engine.file_kinds import describe

T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
FLUX = ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (FLUX, "a FLUX.1 transformer"),
        ([f"model.diffusion_model.{key}" for key in FLUX], "a FLUX.1 transformer"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], "a LoRA file"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA file"),
        (["base_model.model.single_blocks.0.linear1.lora_B.default.weight"], "a LoRA file"),
        (["double_blocks.0.processor.proj_lora1.down.weight"], "a LoRA file"),
        (["unet.down_blocks.0.attn1.processor.to_q_lora.up.weight"], "a LoRA file"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "an autoencoder (VAE)"),
        (["taesd_encoder.0.weight"], "a TAESD autoencoder"),
        (["shared.weight", T5], "a T5 text encoder"),
        ([CLIP], "a CLIP text encoder"),
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
        (
            ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"],
            "a UNet of the Stable Diffusion family",
        ),
        (
            ["control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"],
            "a ControlNet",
        ),
        (
            ["down_blocks.0.attentions.0.attn2.to_k.weight", "controlnet_cond_embedding.x.weight"],
            "a ControlNet",
        ),
        ([*FLUX, "distilled_guidance_layer.in_proj.weight"], "a Chroma transformer"),
        ([*FLUX, "double_stream_modulation_img.lin.weight"], "a FLUX.2 transformer"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "an SD3 transformer"),
        (
            ["encoder.down.0.block.0.conv1.conv.weight", "decoder.conv_in.conv.weight"],
            "a HunyuanVideo VAE",
        ),
        (["0.weight", "1.conv.0.weight"], "half of a TAESD autoencoder"),
        (["encoder.layers.0.weight", "decoder.layers.0.weight"], "a tiny autoencoder (VAE)"),
        (
            [T5, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"],
            "a UMT5 text encoder",
        ),
        ([CLIP, "vision_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP model"),
        (["vision_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP vision encoder"),
        (
            ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"],
            "a language model",
        ),
        (["something.else"], "a file that we do not know (first tensor 'something.else')"),
        ([], "an empty file"),
    ],
)
def test_files_are_named_by_their_tensors(keys: list[str], kind: str) -> None:
    assert describe(keys) == kind
