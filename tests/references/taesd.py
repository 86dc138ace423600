"""TAESD, the tiny autoencoder, over its published tensor names, without a class.

Slow and plain, to check another implementation against. Two sequences of layers, counted from 0;
a layer is known by the names of its tensors (https://github.com/madebyollin/taesd). It works on
pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]


def random_halves(
    *,
    latent_channels: int,
    width: int = 64,
    encoder_blocks: Sequence[int] = (1, 3, 3, 3),
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random encoder and decoder; the decoder has the mirrored number of blocks per level."""
    generator = torch.Generator().manual_seed(seed)

    def convolution(state: dict[str, Tensor], name: str, *shape: int, bias: bool = True) -> None:
        weight = torch.randn(*shape, 3, 3, generator=generator)
        state[f"{name}.weight"] = weight * (1.5 / (shape[1] * 9)) ** 0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def blocks(state: dict[str, Tensor], first: int, count: int) -> int:
        for layer in range(first, first + count):
            for index in (0, 2, 4):
                convolution(state, f"{layer}.conv.{index}", width, width)
        return first + count

    encoder: dict[str, Tensor] = {}
    convolution(encoder, "0", width, 3)
    layer = blocks(encoder, 1, encoder_blocks[0])
    for count in encoder_blocks[1:]:
        convolution(encoder, f"{layer}", width, width, bias=False)  # stride 2
        layer = blocks(encoder, layer + 1, count)
    convolution(encoder, f"{layer}", latent_channels, width)

    decoder: dict[str, Tensor] = {}
    convolution(decoder, "1", width, latent_channels)  # 0 is the clamp, 2 a ReLU
    layer = 3
    for count in reversed(encoder_blocks[1:]):
        layer = blocks(decoder, layer, count) + 1  # then doubling the size, without tensors
        convolution(decoder, f"{layer}", width, width, bias=False)
        layer += 1
    layer = blocks(decoder, layer, encoder_blocks[0])
    convolution(decoder, f"{layer}", 3, width)
    # Most pixels then lie within [0, 1].
    decoder[f"{layer}.weight"] *= 0.03
    decoder[f"{layer}.bias"] += 0.5
    return encoder, decoder


def encode(encoder: State, pixels: Tensor) -> Tensor:
    """Latents of pixels in [0, 1]."""
    x = pixels
    for layer in range(_num_layers(encoder)):
        if f"{layer}.conv.0.weight" in encoder:
            x = _block(encoder, layer, x)
        else:
            # Of the plain layers only those between two levels have no bias; they halve the size.
            x = _convolution(encoder, f"{layer}", x, stride=1 + (f"{layer}.bias" not in encoder))
    return x


def decode(decoder: State, latents: Tensor) -> Tensor:
    """Pixels, about in [0, 1]."""
    x = torch.tanh(latents / 3) * 3
    x = F.relu(_convolution(decoder, "1", x))
    for layer in range(3, _num_layers(decoder)):
        if f"{layer}.conv.0.weight" in decoder:
            x = _block(decoder, layer, x)
        elif f"{layer}.weight" in decoder:
            x = _convolution(decoder, f"{layer}", x)
        else:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x


def _block(state: State, layer: int, x: Tensor) -> Tensor:
    inner = F.relu(_convolution(state, f"{layer}.conv.0", x))
    inner = F.relu(_convolution(state, f"{layer}.conv.2", inner))
    return F.relu(_convolution(state, f"{layer}.conv.4", inner) + x)


def _convolution(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    bias = state.get(f"{name}.bias")
    return F.conv2d(x, state[f"{name}.weight"], bias, stride=stride, padding=1)


def _num_layers(state: State) -> int:
    return 1 + max(int(key.split(".")[0]) for key in state)
