"""Tiny random checkpoints in the published single-file layouts, and the parity cases on them.

Every tensor comes from a seeded CPU generator, so the same call gives the same bits anywhere.
``tests/data/parity/<case>.safetensors`` holds the velocity that an independent implementation
computed from ``build(case)`` in float32 on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

HEAD_DIM = 128


@dataclass
class _Layers:
    """Draws the tensors of a checkpoint one after the other."""

    generator: torch.Generator
    state: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str, out_features: int, in_features: int) -> None:
        weight = torch.randn(out_features, in_features, generator=self.generator)
        self.state[f"{name}.weight"] = weight * (1.0 / in_features) ** 0.5
        self.state[f"{name}.bias"] = torch.randn(out_features, generator=self.generator) * 0.02

    def patches(self, name: str, out_channels: int, in_channels: int) -> None:
        weight = torch.randn(out_channels, in_channels, 1, 2, 2, generator=self.generator)
        self.state[f"{name}.weight"] = weight * 0.1
        self.state[f"{name}.bias"] = torch.zeros(out_channels)

    def modulation(self, name: str, num_vectors: int, width: int) -> None:
        """A parameter of its own, in no layer."""
        vectors = torch.randn(1, num_vectors, width, generator=self.generator)
        self.state[name] = vectors / width**0.5

    def scale(self, name: str, width: int) -> None:
        self.state[name] = torch.ones(width)

    def norm(self, name: str, width: int) -> None:
        """With a bias."""
        self.state[f"{name}.weight"] = torch.ones(width)
        self.state[f"{name}.bias"] = torch.zeros(width)

    def query_key_scales(self, name: str) -> None:
        self.scale(f"{name}.query_norm.scale", HEAD_DIM)
        self.scale(f"{name}.key_norm.scale", HEAD_DIM)


def _layers(seed: int) -> _Layers:
    return _Layers(torch.Generator().manual_seed(seed))


def flux(
    hidden: int = 128,
    depth: int = 1,
    single: int = 1,
    text_width: int = 64,
    pooled_width: int = 32,
    guidance: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A FLUX.1 transformer with 16 latent channels; ``hidden`` is a multiple of 128."""
    layers = _layers(seed)
    layers.linear("img_in", hidden, 64)
    layers.linear("txt_in", hidden, text_width)
    embedders = [("time_in", 256), ("vector_in", pooled_width)]
    for name, width in embedders + ([("guidance_in", 256)] if guidance else []):
        layers.linear(f"{name}.in_layer", hidden, width)
        layers.linear(f"{name}.out_layer", hidden, hidden)
    for block in range(depth):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            layers.linear(f"{prefix}_mod.lin", 6 * hidden, hidden)
            layers.linear(f"{prefix}_attn.qkv", 3 * hidden, hidden)
            layers.linear(f"{prefix}_attn.proj", hidden, hidden)
            layers.query_key_scales(f"{prefix}_attn.norm")
            layers.linear(f"{prefix}_mlp.0", 4 * hidden, hidden)
            layers.linear(f"{prefix}_mlp.2", hidden, 4 * hidden)
    for block in range(single):
        prefix = f"single_blocks.{block}"
        layers.linear(f"{prefix}.linear1", 7 * hidden, hidden)
        layers.linear(f"{prefix}.linear2", hidden, 5 * hidden)
        layers.linear(f"{prefix}.modulation.lin", 3 * hidden, hidden)
        layers.query_key_scales(f"{prefix}.norm")
    layers.linear("final_layer.linear", 64, hidden)
    layers.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return layers.state


def hunyuan_video(
    hidden: int = 128, depth: int = 1, single: int = 1, text_width: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """A HunyuanVideo transformer under Tencent's names; ``hidden`` is a multiple of 128."""
    layers = _layers(seed)
    layers.patches("img_in.proj", hidden, 16)
    for name in ("time_in", "guidance_in"):
        layers.linear(f"{name}.mlp.0", hidden, 256)
        layers.linear(f"{name}.mlp.2", hidden, hidden)
    layers.linear("vector_in.in_layer", hidden, 768)
    layers.linear("vector_in.out_layer", hidden, hidden)
    layers.linear("txt_in.input_embedder", hidden, text_width)
    layers.linear("txt_in.t_embedder.mlp.0", hidden, 256)
    layers.linear("txt_in.t_embedder.mlp.2", hidden, hidden)
    layers.linear("txt_in.c_embedder.linear_1", hidden, text_width)
    layers.linear("txt_in.c_embedder.linear_2", hidden, hidden)
    for block in range(2):
        prefix = f"txt_in.individual_token_refiner.blocks.{block}"
        layers.linear(f"{prefix}.adaLN_modulation.1", 2 * hidden, hidden)
        layers.linear(f"{prefix}.self_attn_qkv", 3 * hidden, hidden)
        layers.linear(f"{prefix}.self_attn_proj", hidden, hidden)
        layers.norm(f"{prefix}.norm1", hidden)
        layers.norm(f"{prefix}.norm2", hidden)
        layers.linear(f"{prefix}.mlp.fc1", 4 * hidden, hidden)
        layers.linear(f"{prefix}.mlp.fc2", hidden, 4 * hidden)
    for block in range(depth):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            layers.linear(f"{prefix}_mod.linear", 6 * hidden, hidden)
            layers.linear(f"{prefix}_attn_qkv", 3 * hidden, hidden)
            layers.linear(f"{prefix}_attn_proj", hidden, hidden)
            layers.scale(f"{prefix}_attn_q_norm.weight", HEAD_DIM)
            layers.scale(f"{prefix}_attn_k_norm.weight", HEAD_DIM)
            layers.linear(f"{prefix}_mlp.fc1", 4 * hidden, hidden)
            layers.linear(f"{prefix}_mlp.fc2", hidden, 4 * hidden)
    for block in range(single):
        prefix = f"single_blocks.{block}"
        layers.linear(f"{prefix}.linear1", 7 * hidden, hidden)
        layers.linear(f"{prefix}.linear2", hidden, 5 * hidden)
        layers.linear(f"{prefix}.modulation.linear", 3 * hidden, hidden)
        layers.scale(f"{prefix}.q_norm.weight", HEAD_DIM)
        layers.scale(f"{prefix}.k_norm.weight", HEAD_DIM)
    layers.linear("final_layer.linear", 64, hidden)
    layers.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return layers.state


def wan(
    dim: int = 128,
    ffn_dim: int = 256,
    depth: int = 1,
    in_channels: int = 16,
    clip: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A Wan transformer; ``in_channels`` is 36 for image to video, with ``clip`` in Wan 2.1."""
    layers = _layers(seed)
    layers.patches("patch_embedding", dim, in_channels)
    layers.linear("text_embedding.0", dim, 4096)
    layers.linear("text_embedding.2", dim, dim)
    layers.linear("time_embedding.0", dim, 256)
    layers.linear("time_embedding.2", dim, dim)
    layers.linear("time_projection.1", 6 * dim, dim)
    for block in range(depth):
        layers.modulation(f"blocks.{block}.modulation", 6, dim)
        for attention in ("self_attn", "cross_attn"):
            prefix = f"blocks.{block}.{attention}"
            for name in "qkvo":
                layers.linear(f"{prefix}.{name}", dim, dim)
            layers.scale(f"{prefix}.norm_q.weight", dim)
            layers.scale(f"{prefix}.norm_k.weight", dim)
            if clip and attention == "cross_attn":
                layers.linear(f"{prefix}.k_img", dim, dim)
                layers.linear(f"{prefix}.v_img", dim, dim)
                layers.scale(f"{prefix}.norm_k_img.weight", dim)
        layers.norm(f"blocks.{block}.norm3", dim)
        layers.linear(f"blocks.{block}.ffn.0", ffn_dim, dim)
        layers.linear(f"blocks.{block}.ffn.2", dim, ffn_dim)
    if clip:
        layers.norm("img_emb.proj.0", 1280)
        layers.linear("img_emb.proj.1", 1280, 1280)
        layers.linear("img_emb.proj.3", dim, 1280)
        layers.norm("img_emb.proj.4", dim)
    layers.modulation("head.modulation", 2, dim)
    layers.linear("head.head", 64, dim)
    return layers.state


def qwen_image(
    heads: int = 1, depth: int = 1, text_width: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """A Qwen-Image transformer with 16 latent channels."""
    layers = _layers(seed)
    width = heads * HEAD_DIM
    layers.linear("time_text_embed.timestep_embedder.linear_1", width, 256)
    layers.linear("time_text_embed.timestep_embedder.linear_2", width, width)
    layers.scale("txt_norm.weight", text_width)
    layers.linear("img_in", width, 64)
    layers.linear("txt_in", width, text_width)
    for block in range(depth):
        prefix = f"transformer_blocks.{block}"
        for stream in ("img", "txt"):
            layers.linear(f"{prefix}.{stream}_mod.1", 6 * width, width)
            layers.linear(f"{prefix}.{stream}_mlp.net.0.proj", 4 * width, width)
            layers.linear(f"{prefix}.{stream}_mlp.net.2", width, 4 * width)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            layers.linear(f"{prefix}.attn.{name}", width, width)
        layers.linear(f"{prefix}.attn.to_out.0", width, width)
        layers.linear(f"{prefix}.attn.to_add_out", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            layers.scale(f"{prefix}.attn.{name}.weight", HEAD_DIM)
    layers.linear("norm_out.linear", 2 * width, width)
    layers.linear("proj_out", 64, width)
    return layers.state


def build(
    case: str, seed: int = 0, size: str = "small"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Checkpoint and inputs of one parity case; ``size`` is "small" or "large"."""
    large = size == "large"
    hidden, depth = (256, 2) if large else (128, 1)
    height, width = (8, 12) if large else (8, 8)
    t = torch.tensor([0.37, 0.81] if large else [0.25, 0.9])

    def draw(index: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + index))

    if case in ("flux_t2i", "flux_kontext"):
        state = flux(hidden, depth, depth + (1 if large else 0), seed=seed + 1)
        inputs = {
            "noisy_latents": draw(1, 2, 16, height, width),
            "t": t,
            "text_embeds": draw(2, 2, 12, 64),
            "pooled": draw(3, 2, 32),
            "guidance": torch.tensor([2.5, 1.0]),
        }
        if case == "flux_kontext":
            inputs["control_latents"] = draw(4, 2, 16, height, width + 4)
    elif case == "hunyuan_video":
        state = hunyuan_video(hidden, depth, depth + (1 if large else 0), seed=seed + 2)
        inputs = {
            "noisy_latents": draw(11, 2, 16, 3, height, width),
            "t": t,
            "text_embeds": draw(12, 2, 10, 64),
            "pooled": draw(13, 2, 768),
            "guidance": torch.tensor([6.0, 1.0]),
        }
    elif case in ("wan_t2v", "wan22_i2v", "wan21_i2v"):
        own_seed = seed + {"wan_t2v": 3, "wan22_i2v": 4, "wan21_i2v": 5}[case]
        in_channels, clip = (16 if case == "wan_t2v" else 36), case == "wan21_i2v"
        state = wan(hidden, 384, depth, in_channels, clip, seed=own_seed)
        text = draw(22, 2, 512, 4096) * 0.1
        text[:, 9:] = 0  # Padding up to 512 tokens takes part in attention.
        inputs = {"noisy_latents": draw(21, 2, 16, 3, height, width), "t": t, "text_embeds": text}
        if in_channels > 16:
            inputs["image_latents"] = draw(23, 2, 20, 3, height, width)
        if clip:
            inputs["clip_embeds"] = draw(24, 2, 257, 1280)
    elif case == "qwen_image":
        state = qwen_image(2 if large else 1, depth, 96, seed=seed + 6)
        inputs = {
            "noisy_latents": draw(31, 2, 16, 1, height, width),
            "t": t,
            "text_embeds": draw(32, 2, 11, 96),
        }
    else:
        raise KeyError(case)
    return state, inputs
