"""FLUX.1's forward pass over the published tensor names: slow, plain, without a model class.

Written from the description that Black Forest Labs published with the model
(https://github.com/black-forest-labs/flux, arXiv:2506.15742 for the control images), to check
another implementation against. Works in the type of the tensors that it is given.

Shapes: B batch, L text tokens, N tokens of text and images, H heads, D head width, W model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

AXES = (16, 56, 56)  # head width spent on image index, row and column

State = Mapping[str, Tensor]


class Placed(NamedTuple):
    """A control image [B, C, h, w] and where its upper left token lies among the positions."""

    latents: Tensor
    top: int
    left: int


class Inputs(NamedTuple):
    """Everything that the model is given: t and guidance [B], text [B, L, .], pooled [B, .]."""

    noisy_BChw: Tensor
    t_B: Tensor
    text_BL: Tensor
    pooled_B: Tensor
    guidance_B: Tensor | None
    controls: Sequence[Placed] = ()


def velocity(state: State, inputs: Inputs, axes: Sequence[int] = AXES) -> Tensor:
    """The model's output for the noisy latents, in their shape."""
    channels, height, width = inputs.noisy_BChw.shape[1:]
    images = [
        _patches(inputs.noisy_BChw),
        *(_patches(control.latents) for control in inputs.controls),
    ]
    positions = [
        torch.zeros(inputs.text_BL.shape[1], 3),
        _grid(height // 2, width // 2, index=0, top=0, left=0),
    ]
    for latents, top, left in inputs.controls:
        rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
        positions.append(_grid(rows, columns, index=1, top=top, left=left))
    angles_ND = _angles(torch.cat(positions), axes)

    vector_BW = _embed(state, "time_in", _wave(inputs.t_B)) + _embed(
        state, "vector_in", inputs.pooled_B
    )
    if inputs.guidance_B is not None:
        vector_BW = vector_BW + _embed(state, "guidance_in", _wave(inputs.guidance_B))

    image = _linear(state, "img_in", torch.cat(images, dim=1))
    text = _linear(state, "txt_in", inputs.text_BL)
    for block in range(_count(state, "double_blocks")):
        text, image = _double(state, f"double_blocks.{block}", text, image, vector_BW, angles_ND)
    both = torch.cat([text, image], dim=1)
    for block in range(_count(state, "single_blocks")):
        both = _single(state, f"single_blocks.{block}", both, vector_BW, angles_ND)

    shift, scale = _modulation(state, "final_layer.adaLN_modulation.1", vector_BW, 2)
    first = text.shape[1]
    noisy = both[:, first : first + images[0].shape[1]]
    output = _linear(state, "final_layer.linear", _norm(noisy) * (1 + scale) + shift)
    return _pictures(output, channels, height, width)


def _double(
    state: State, name: str, text: Tensor, image: Tensor, vector_BW: Tensor, angles_ND: Tensor
) -> tuple[Tensor, Tensor]:
    streams = {"txt": text, "img": image}
    parts = {key: _modulation(state, f"{name}.{key}_mod.lin", vector_BW, 6) for key in streams}
    heads = []
    for key, tokens in streams.items():
        shift, scale = parts[key][:2]
        qkv = _linear(state, f"{name}.{key}_attn.qkv", _norm(tokens) * (1 + scale) + shift)
        heads.append(_heads(state, f"{name}.{key}_attn.norm", qkv))
    query, key_, value = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
    mixed = _attention(query, key_, value, angles_ND)
    results = []
    for key, attended in (
        ("txt", mixed[:, : text.shape[1]]),
        ("img", mixed[:, text.shape[1] :]),
    ):
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = parts[key]
        tokens = streams[key] + gate * _linear(state, f"{name}.{key}_attn.proj", attended)
        inner = _linear(state, f"{name}.{key}_mlp.0", _norm(tokens) * (1 + mlp_scale) + mlp_shift)
        tokens = tokens + mlp_gate * _linear(state, f"{name}.{key}_mlp.2", _gelu(inner))
        results.append(tokens)
    return results[0], results[1]


def _single(
    state: State, name: str, tokens: Tensor, vector_BW: Tensor, angles_ND: Tensor
) -> Tensor:
    shift, scale, gate = _modulation(state, f"{name}.modulation.lin", vector_BW, 3)
    both = _linear(state, f"{name}.linear1", _norm(tokens) * (1 + scale) + shift)
    qkv, inner = both[..., : 3 * tokens.shape[-1]], both[..., 3 * tokens.shape[-1] :]
    attended = _attention(*_heads(state, f"{name}.norm", qkv), angles_ND)
    joined = torch.cat([attended, _gelu(inner)], dim=-1)
    return tokens + gate * _linear(state, f"{name}.linear2", joined)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _embed(state: State, name: str, x: Tensor) -> Tensor:
    return _linear(state, f"{name}.out_layer", F.silu(_linear(state, f"{name}.in_layer", x)))


def _modulation(state: State, name: str, vector_BW: Tensor, parts: int) -> list[Tensor]:
    return list(_linear(state, name, F.silu(vector_BW))[:, None].chunk(parts, dim=-1))


def _wave(value_B: Tensor) -> Tensor:
    """256 numbers for a time or a guidance strength: 128 cosines, then 128 sines.

    In float32 whatever the model's type is, as published and trained: an angle of 900 is rounded
    by up to 3e-5 there, which moves the output by more than all other rounding together.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = 1000 * value_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(value_B.dtype)


def _norm(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _heads(state: State, norm: str, qkv: Tensor) -> list[Tensor]:
    """Query, key and value [B, H, N, D]; the first two normalised to length and scaled."""
    scales = [state[f"{norm}.query_norm.scale"], state[f"{norm}.key_norm.scale"]]
    parts = [part.unflatten(-1, (-1, len(scales[0]))).transpose(1, 2) for part in qkv.chunk(3, -1)]
    for index, scale in enumerate(scales):
        square = parts[index].square().mean(dim=-1, keepdim=True)
        parts[index] = parts[index] / (square + 1e-6).sqrt() * scale
    return parts


def _attention(query: Tensor, key: Tensor, value: Tensor, angles_ND: Tensor) -> Tensor:
    query, key = _rotate(query, angles_ND), _rotate(key, angles_ND)
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def _rotate(x: Tensor, angles_ND: Tensor) -> Tensor:
    """Turn each pair of neighbouring numbers by its angle."""
    pairs = x.unflatten(-1, (-1, 2))
    cosine, sine = angles_ND.cos().to(x.dtype), angles_ND.sin().to(x.dtype)
    first = cosine * pairs[..., 0] - sine * pairs[..., 1]
    second = sine * pairs[..., 0] + cosine * pairs[..., 1]
    return torch.stack([first, second], dim=-1).flatten(-2)


def _angles(positions_N3: Tensor, axes: Sequence[int]) -> Tensor:
    """One angle per token and pair of numbers of a head."""
    parts = []
    for axis, width in enumerate(axes):
        powers = torch.arange(0, width, 2, dtype=torch.float64) / width
        parts.append(positions_N3[:, axis, None].double() / 10000**powers)
    return torch.cat(parts, dim=-1)


def _grid(rows: int, columns: int, *, index: int, top: int, left: int) -> Tensor:
    cells = [(index, top + row, left + column) for row in range(rows) for column in range(columns)]
    return torch.tensor(cells, dtype=torch.float64)


def _patches(latents_BChw: Tensor) -> Tensor:
    """One token per 2x2 latents, the channel outermost within a token."""
    return F.unfold(latents_BChw, kernel_size=2, stride=2).transpose(1, 2)


def _pictures(tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
    assert tokens.shape[-1] == 4 * channels
    return F.fold(tokens.transpose(1, 2), (height, width), kernel_size=2, stride=2)


def _count(state: State, name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})
