"""The KL autoencoder of latent diffusion and FLUX over its published tensor names, without a class.

Slow and plain, to check another implementation against. The layout is that of ``ae.safetensors``
(https://github.com/black-forest-labs/flux), which is the one of
https://github.com/CompVis/latent-diffusion; that adds the 1x1 convolutions ``quant_conv`` and
``post_quant_conv``.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]


def random_state(
    widths: Sequence[int], *, blocks: int, latent_channels: int, quant: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights whose outputs have about the size of their inputs.

    Args:
        widths: channels of each level, multiples of 32.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        quant: with the two 1x1 convolutions of latent diffusion.
    """
    draw = _Draw(seed)
    draw.convolution("encoder.conv_in", widths[0], 3)
    inputs = widths[0]
    for level, width in enumerate(widths):
        draw.blocks(f"encoder.down.{level}.block", blocks, inputs, width)
        if level < len(widths) - 1:
            draw.convolution(f"encoder.down.{level}.downsample.conv", width, width)
        inputs = width
    draw.middle("encoder.mid", inputs)
    draw.norm("encoder.norm_out", inputs)
    draw.convolution("encoder.conv_out", 2 * latent_channels, inputs)

    draw.convolution("decoder.conv_in", inputs, latent_channels)
    draw.middle("decoder.mid", inputs)
    for level in reversed(range(len(widths))):
        draw.blocks(f"decoder.up.{level}.block", blocks + 1, inputs, widths[level])
        inputs = widths[level]
        if level > 0:
            draw.convolution(f"decoder.up.{level}.upsample.conv", inputs, inputs)
    draw.norm("decoder.norm_out", inputs)
    draw.convolution("decoder.conv_out", 3, inputs)
    if quant:
        draw.convolution("quant_conv", 2 * latent_channels, 2 * latent_channels, side=1)
        draw.convolution("post_quant_conv", latent_channels, latent_channels, side=1)
    return draw.state


class _Draw:
    """Adds the random tensors of one layer after the other to ``state``."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Tensor] = {}

    def convolution(self, name: str, outputs: int, inputs: int, side: int = 3) -> None:
        weight = torch.randn(outputs, inputs, side, side, generator=self.generator)
        self.state[f"{name}.weight"] = weight / (inputs * side * side) ** 0.5
        self.state[f"{name}.bias"] = torch.randn(outputs, generator=self.generator) * 0.1

    def norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=self.generator)
        self.state[f"{name}.bias"] = torch.randn(channels, generator=self.generator) * 0.1

    def blocks(self, name: str, count: int, inputs: int, outputs: int) -> None:
        for index in range(count):
            self.block(f"{name}.{index}", inputs if index == 0 else outputs, outputs)

    def block(self, name: str, inputs: int, outputs: int) -> None:
        self.norm(f"{name}.norm1", inputs)
        self.convolution(f"{name}.conv1", outputs, inputs)
        self.norm(f"{name}.norm2", outputs)
        self.convolution(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.convolution(f"{name}.nin_shortcut", outputs, inputs, side=1)

    def middle(self, name: str, channels: int) -> None:
        self.block(f"{name}.block_1", channels, channels)
        self.norm(f"{name}.attn_1.norm", channels)
        for projection in ("q", "k", "v", "proj_out"):
            self.convolution(f"{name}.attn_1.{projection}", channels, channels, side=1)
        self.block(f"{name}.block_2", channels, channels)


def encode(state: State, pixels_BCHW: Tensor) -> Tensor:
    """The mean of the posterior, not normalised."""
    x = _convolution(state, "encoder.conv_in", pixels_BCHW)
    for level in range(_count(state, "encoder.down")):
        for index in range(_count(state, f"encoder.down.{level}.block")):
            x = _block(state, f"encoder.down.{level}.block.{index}", x)
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            # One row below and one column to the right, where stride 2 would fall short.
            padded = F.pad(x, (0, 1, 0, 1))
            x = _convolution(state, f"encoder.down.{level}.downsample.conv", padded, stride=2)
    x = _middle(state, "encoder.mid", x)
    x = _convolution(state, "encoder.conv_out", _swish(_norm(state, "encoder.norm_out", x)))
    if "quant_conv.weight" in state:
        x = _convolution(state, "quant_conv", x)
    return x[:, : x.shape[1] // 2]


def decode(state: State, latents_BCHW: Tensor) -> Tensor:
    """Pixels, not clamped, of latents that are not normalised."""
    x = latents_BCHW
    if "post_quant_conv.weight" in state:
        x = _convolution(state, "post_quant_conv", x)
    x = _middle(state, "decoder.mid", _convolution(state, "decoder.conv_in", x))
    for level in reversed(range(_count(state, "decoder.up"))):
        for index in range(_count(state, f"decoder.up.{level}.block")):
            x = _block(state, f"decoder.up.{level}.block.{index}", x)
        if f"decoder.up.{level}.upsample.conv.weight" in state:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _convolution(state, f"decoder.up.{level}.upsample.conv", x)
    return _convolution(state, "decoder.conv_out", _swish(_norm(state, "decoder.norm_out", x)))


def _block(state: State, name: str, x: Tensor) -> Tensor:
    inner = _convolution(state, f"{name}.conv1", _swish(_norm(state, f"{name}.norm1", x)))
    inner = _convolution(state, f"{name}.conv2", _swish(_norm(state, f"{name}.norm2", inner)))
    if f"{name}.nin_shortcut.weight" in state:
        x = _convolution(state, f"{name}.nin_shortcut", x)
    return x + inner


def _middle(state: State, name: str, x: Tensor) -> Tensor:
    x = _block(state, f"{name}.block_1", x)
    normal = _norm(state, f"{name}.attn_1.norm", x)
    query, key, value = (
        _convolution(state, f"{name}.attn_1.{part}", normal).flatten(2).transpose(1, 2)
        for part in ("q", "k", "v")
    )
    weights = (query @ key.transpose(1, 2) / math.sqrt(x.shape[1])).softmax(dim=-1)
    attended = (weights @ value).transpose(1, 2).reshape(x.shape)
    x = x + _convolution(state, f"{name}.attn_1.proj_out", attended)
    return _block(state, f"{name}.block_2", x)


def _convolution(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """As many pixels as before, unless the stride says otherwise."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    padding = weight.shape[-1] // 2 if stride == 1 else 0
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    grouped = x.unflatten(1, (32, -1))
    centred = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
    variance = centred.square().mean(dim=(2, 3, 4), keepdim=True)
    normal = (centred / (variance + 1e-6).sqrt()).flatten(1, 2)
    return normal * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _count(state: State, name: str) -> int:
    start = len(name) + 1
    return len({key[start:].split(".")[0] for key in state if key.startswith(f"{name}.")})
