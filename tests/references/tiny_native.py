"""Tiny checkpoints of every family that ComfyUI has, with inputs for its ``apply_model``.

ComfyUI reads the sizes from the tensors, within limits: widths are multiples of its head of 128,
Wan's text has 4096 features, HunyuanVideo's pooled text 768.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiny_checkpoints import flux, hunyuan_video, qwen_image, wan

# Model -> its family.
MODELS = {
    "FLUX.1 Kontext": "flux_kontext",
    "Wan 2.1 t2v": "wan",
    "Wan 2.1 i2v": "wan",
    "Wan 2.2 i2v": "wan",
    "Qwen-Image": "qwen_image",
    "HunyuanVideo": "hunyuan_video",
}


def build(model: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint and the inputs of one of `MODELS`."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if model == "FLUX.1 Kontext":
        inputs = {"x": normal(1, 16, 8, 8), "c_crossattn": normal(1, 12, 64), "y": normal(1, 32)}
        inputs["guidance"] = torch.tensor([2.5])
        state = flux(depth=2, single=2, seed=2)
    elif model == "HunyuanVideo":
        inputs = {
            "x": normal(1, 16, 2, 8, 8),
            "c_crossattn": normal(1, 10, 64),
            "y": normal(1, 768),
            "guidance": torch.tensor([6.0]),
        }
        state = hunyuan_video(depth=2, single=2, seed=3)
    elif model == "Qwen-Image":
        inputs = {"x": normal(1, 16, 1, 8, 8), "c_crossattn": normal(1, 11, 64)}
        state = qwen_image(depth=2, seed=4)
    else:
        # Text embeddings of Wan are small numbers.
        inputs = {"x": normal(1, 16, 2, 8, 8), "c_crossattn": normal(1, 9, 4096) * 0.1}
        if model != "Wan 2.1 t2v":
            inputs["c_concat"] = normal(1, 20, 2, 8, 8)
        if model == "Wan 2.1 i2v":
            inputs["clip_fea"] = normal(1, 257, 1280)
        in_channels = 36 if "c_concat" in inputs else 16
        state = wan(depth=2, in_channels=in_channels, clip="clip_fea" in inputs, seed=5)
    return state, inputs | {"t": torch.tensor([0.6])}
