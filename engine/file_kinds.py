"""Says what a model file is, so that a wrong file is named for what it is.

Only names of tensors and first bytes are looked at. The first rule that matches wins, so rules
that need more evidence stand above those that need less.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# (what the user has, patterns that must each match the end part of some tensor name)
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a LoRA file",
        (r"(.*\.)?(lora_(A|B|down|up)|\w*lora\d?\.(down|up)|lora_(A|B)\.\w+)\.weight",),
    ),
    ("a LoHa file", (r".*\.hada_w1_a",)),
    ("a LoKr file", (r".*\.lokr_w1(_a)?",)),
    (
        "a ControlNet",
        (r"(.*\.)?(controlnet_(blocks|x_embedder|cond_embedding)|control_model)\..*",),
    ),
    ("an SD 1.x/2.x checkpoint", (r"model\.diffusion_model\.input_blocks\..*", r"cond_stage_.*")),
    ("an SDXL checkpoint", (r"model\.diffusion_model\.input_blocks\..*", r"conditioner\..*")),
    ("a UNet of the Stable Diffusion family", (r"(.*\.)?(input_blocks|down_blocks)\..*attn2.*",)),
    (
        "a HunyuanVideo transformer",
        (r"(.*\.)?double_blocks\.0\..*", r"(.*\.)?txt_in\.individual_token_refiner\..*"),
    ),
    ("a Chroma transformer", (r"(.*\.)?distilled_guidance_layer\..*",)),
    ("a FLUX.2 transformer", (r"(.*\.)?double_stream_modulation_img\..*",)),
    ("an SD3 transformer", (r"(.*\.)?joint_blocks\.0\..*",)),
    (
        "an SD3 transformer",
        (r"(.*\.)?pos_embed\.proj\.weight", r"(.*\.)?context_embedder\.weight"),
    ),
    (
        "a FLUX.1 transformer",
        (r"(.*\.)?double_blocks\.0\.img_attn\.qkv\.weight", r"(.*\.)?(vector_in|img_in)\..*"),
    ),
    (
        "a FLUX.1 transformer in the diffusers layout",
        (r"(.*\.)?single_transformer_blocks\.0\..*", r"(.*\.)?context_embedder\.weight"),
    ),
    (
        "a Qwen-Image transformer",
        (r"(.*\.)?transformer_blocks\.0\.img_mod\.1\.weight", r"(.*\.)?txt_norm\.weight"),
    ),
    (
        "a Wan transformer",
        (r"(.*\.)?blocks\.0\.self_attn\.q\.weight", r"(.*\.)?patch_embedding\..*"),
    ),
    ("a Wan VAE", (r"(.*\.)?encoder\.downsamples\..*", r"(.*\.)?decoder\.upsamples\..*")),
    ("a HunyuanVideo VAE", (r"(.*\.)?encoder\.down(_blocks)?\.0\..*\.conv1\.conv\.weight",)),
    ("a TAESD autoencoder", (r"taesd_(en|de)coder\..*",)),
    (
        "an autoencoder (VAE)",
        (r"(.*\.)?encoder\.down(_blocks)?\.0\..*", r"(.*\.)?decoder\.conv_in\..*"),
    ),
    ("a tiny autoencoder (VAE)", (r"encoder\.layers\.\d+\..*", r"decoder\.layers\.\d+\..*")),
    ("half of a TAESD autoencoder", (r"\d+\.conv\.0\.weight", r"\d+\.weight")),
    (
        "a UMT5 text encoder",
        (r"(.*\.)?encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",),
    ),
    ("a T5 text encoder", (r"(.*\.)?encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",)),
    ("a CLIP model", (r"vision_model\.encoder\.layers\.0\..*", r"text_model\.encoder\..*")),
    ("a CLIP vision encoder", (r"(.*\.)?vision_model\.encoder\.layers\.0\..*",)),
    ("a CLIP text encoder", (r"(.*\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",)),
    (
        "a language model",
        (r"(.*\.)?layers\.0\.self_attn\.q_proj\.weight", r"(.*\.)?embed_tokens\..*"),
    ),
)


def describe(keys: Iterable[str]) -> str:
    """What a file with these tensor names is, as a noun phrase with its article."""
    names = list(keys)
    for kind, patterns in _KINDS:
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            return kind
    return f"a file that we do not know (first tensor {names[0]!r})" if names else "an empty file"


def foreign(start: bytes) -> str | None:
    """What a file that begins with ``start`` is if it is clearly not safetensors, else None."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!", b"<html", b"<head", b"<body", b"<?xml")):
        return (
            "this is a web page that was saved under a model's name, not a model; download the "
            "file itself (a log-in or licence page may have been in the way)"
        )
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the model; run `git lfs pull` or download the file"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return "this is a pickled PyTorch file, which can run code; use a .safetensors file"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file, which is not supported; use a .safetensors file"
    return None


def describe_bytes(start: bytes) -> str:
    """A sentence about a file that begins with ``start`` and is not readable safetensors."""
    if problem := foreign(start):
        return problem
    if not start:
        return "the file is empty; download it again"
    return "this is not a safetensors file or its header is damaged; download it again"
