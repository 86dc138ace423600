"""Tests of the pictures of LoRA files: that what is to be seen is there, for every model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pack.engine.adapter_weights import FullWeights, LoRAWeights
from pack.engine.lora_plots import checkpoint_weights, layer_map
from pack.engine.lora_statistics import LayerStatistics, layer_statistics
from PIL import Image

DARK, LIGHT, ABSENT = (0x1F, 0x4E, 0x8C), (0x9D, 0xB4, 0xD3), (0xEC, 0xEC, 0xEC)


def pixels(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(image) == colour).all(axis=-1)


def layers(*names: str, size: float = 1.0) -> list[LayerStatistics]:
    generator = torch.Generator().manual_seed(0)
    return [
        layer_statistics(
            name,
            LoRAWeights(
                torch.randn(3, 8, generator=generator),
                torch.randn(6, 3, generator=generator) * size,
                alpha=3.0,
            ),
            torch.ones(6, 8),
        )
        for name in names
    ]


def heights(image: Image.Image) -> list[int]:
    """Of the bars, from left to right, in pixels."""
    columns = pixels(image, DARK).sum(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns > 0, [0]]).astype(int)))
    return [int(columns[a:b].max()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_bars_are_as_high_as_the_weights() -> None:
    image = checkpoint_weights(
        [0.0, 0.1, 0.3, 0.6], ["a", "b", "c", "d"], title="a mean", axis="checkpoint"
    )
    found = heights(image)
    assert image.mode == "RGB" and image.size == (960, 540) and len(found) == 3
    # A bar begins and ends within a pixel; lines of the grid lie above the bars.
    for height, weight in zip(found, (0.1, 0.3, 0.6), strict=True):
        assert height == pytest.approx(found[-1] * weight / 0.6, abs=6)


def test_a_hundred_checkpoints_with_long_names_fit() -> None:
    names = [f"a-very-long-name-of-a-training-{n:06d}" for n in range(100)]
    image = checkpoint_weights([0.01] * 100, names, title="a mean", axis="checkpoint")
    assert image.size == (960, 540) and len(heights(image)) > 50


MODELS = {
    "FLUX": [f"double_blocks.{n}.img_attn.qkv" for n in range(19)]
    + [f"single_blocks.{n}.{kind}" for n in range(38) for kind in ("linear1", "linear2")],
    "Wan": [f"blocks.{n}.{kind}" for n in range(40) for kind in ("self_attn.q", "ffn.0")],
    "Qwen-Image": [f"transformer_blocks.{n}.attn.to_q" for n in range(60)] + ["img_in"],
    "one layer": ["final_layer.linear"],
}


@pytest.mark.parametrize("model", MODELS)
def test_every_block_of_a_model_has_a_bar(model: str) -> None:
    image = layer_map(layers(*MODELS[model]), title="a LoRA", relative=False)
    bars = pixels(image, DARK)[: image.height // 3].any(axis=0)
    number = int((np.diff(np.concatenate([[0], bars]).astype(int)) == 1).sum())
    assert number == len({layer.place.block for layer in layers(*MODELS[model])})


def test_layers_that_a_lora_does_not_have_are_left_blank() -> None:
    whole = [f"blocks.{n}.{kind}" for n in range(4) for kind in ("q", "k", "v")]
    image = layer_map(layers(*whole), title="a LoRA", relative=False)
    assert pixels(image, ABSENT).sum() < 500  # edges of letters
    image = layer_map(layers(*whole[:-3], "blocks.3.q"), title="a LoRA", relative=False)
    assert pixels(image, ABSENT).sum() > 5000


def test_layers_of_an_unknown_or_broken_norm_do_not_hide_the_others() -> None:
    broken = layer_statistics("blocks.0.q", FullWeights(torch.full((3, 3), math.nan)))
    image = layer_map([broken, *layers("blocks.1.q")], title="a LoRA", relative=False)
    assert pixels(image, DARK).any() and pixels(image, ABSENT).sum() > 5000


def test_biases_alone_have_no_effective_ranks_to_show() -> None:
    bias = layer_statistics("blocks.0.q", FullWeights(None, torch.ones(4)))
    with_ranks = layer_map(layers("blocks.0.q"), title="a LoRA", relative=False)
    without = layer_map([bias], title="a LoRA", relative=False)
    assert without.height < with_ranks.height
    assert pixels(with_ranks, LIGHT).any() and not pixels(without, LIGHT).any()


def test_relative_norms_need_a_weight() -> None:
    found = [*layers("blocks.0.q"), layer_statistics("blocks.1.q", FullWeights(torch.ones(3, 3)))]
    image = layer_map(found, title="a LoRA", relative=True)
    assert pixels(image, ABSENT).sum() > 5000


def test_a_lora_without_layers_has_no_picture() -> None:
    with pytest.raises(ValueError, match="no layers"):
        layer_map([], title="a LoRA", relative=False)
