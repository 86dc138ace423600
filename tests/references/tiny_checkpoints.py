"""Tiny random checkpoints in the published single-file layouts, and the parity cases on them.

Every tensor comes from a seeded CPU generator, so the same call gives the same bits anywhere.
``tests/data/parity/<case>.safetensors`` holds the velocity that an independent implementation
computed from ``build(case)`` in float32 on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIM = 128


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
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, out_features: int, in_features: int) -> None:
        weight = torch.randn(out_features, in_features, generator=generator)
        state[f"{name}.weight"] = weight * (1.0 / in_features) ** 0.5
        state[f"{name}.bias"] = torch.randn(out_features, generator=generator) * 0.02

    def norm(name: str) -> None:
        state[f"{name}.query_norm.scale"] = torch.ones(HEAD_DIM)
        state[f"{name}.key_norm.scale"] = torch.ones(HEAD_DIM)

    linear("img_in", hidden, 64)
    linear("txt_in", hidden, text_width)
    embedders = [("time_in", 256), ("vector_in", pooled_width)]
    for name, width in embedders + ([("guidance_in", 256)] if guidance else []):
        linear(f"{name}.in_layer", hidden, width)
        linear(f"{name}.out_layer", hidden, hidden)
    for block in range(depth):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            linear(f"{prefix}_mod.lin", 6 * hidden, hidden)
            linear(f"{prefix}_attn.qkv", 3 * hidden, hidden)
            linear(f"{prefix}_attn.proj", hidden, hidden)
            norm(f"{prefix}_attn.norm")
            linear(f"{prefix}_mlp.0", 4 * hidden, hidden)
            linear(f"{prefix}_mlp.2", hidden, 4 * hidden)
    for block in range(single):
        prefix = f"single_blocks.{block}"
        linear(f"{prefix}.linear1", 7 * hidden, hidden)
        linear(f"{prefix}.linear2", hidden, 5 * hidden)
        linear(f"{prefix}.modulation.lin", 3 * hidden, hidden)
        norm(f"{prefix}.norm")
    linear("final_layer.linear", 64, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return state


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

    if case not in ("flux_t2i", "flux_kontext"):
        raise KeyError(case)
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
    return state, inputs
