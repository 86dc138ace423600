from __future__ import annotations

from collections.abc import Callable

import pytest
from accelerate import init_empty_weights
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import ConfigError
from pack.engine.layer_names import published_layers
from pack.engine.quantized_layers import layers_to_quantize, linears_of_blocks
from torch import nn

Shapes = dict[str, tuple[int, ...]]


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def wan(**settings: object) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**settings)


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


def hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel()


def framepack() -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(has_image_proj=True, has_clean_x_embedder=True)


def shapes_of(build: Callable[[], nn.Module], family: str) -> Shapes:
    with init_empty_weights():
        model = build()
    return {
        name: layer.shape for name, layer in published_layers(LAYER_NAMES[family], model).items()
    }


@pytest.mark.parametrize(
    ("family", "build", "count"),
    [
        # 8 in a double block, 2 in a single one: 19 * 8 + 38 * 2.
        ("flux_kontext", flux, 228),
        # 4 each in two attentions, 2 behind them; image to video has 2 more.
        ("wan", lambda: wan(num_layers=40), 400),
        ("wan", lambda: wan(num_layers=40, added_kv_proj_dim=5120, image_dim=1280), 480),
        ("qwen_image", qwen_image, 840),
        ("hunyuan_video", hunyuan_video, 20 * 8 + 40 * 2),
        ("framepack", framepack, 440),
    ],
)
def test_the_published_models_have_so_many_layers(
    family: str, build: Callable[[], nn.Module], count: int
) -> None:
    shapes = shapes_of(build, family)
    chosen = layers_to_quantize(shapes, LAYER_NAMES[family])
    assert len(chosen) == count
    assert chosen == [name for name in shapes if name in set(chosen)]
    # All of them can be divided into blocks of 64, so that none falls back to rows.
    assert all(len(shapes[name]) == 2 and shapes[name][1] % 64 == 0 for name in chosen)
    # Of the weights of a block nothing else is worth it.
    size = sum(shapes[name][0] * shapes[name][1] for name in chosen)
    whole = sum(
        shapes[name][0] * shapes[name][1] for name in linears_of_blocks(shapes, LAYER_NAMES[family])
    )
    assert size > 0.7 * whole


SHAPES: Shapes = {
    "double_blocks.0.img_mod.lin": (768, 128),
    "double_blocks.0.img_attn.qkv": (384, 128),
    "double_blocks.0.img_attn.norm.query_norm": (128,),
    "double_blocks.1.img_attn.qkv": (384, 128),
    "single_blocks.0.linear1": (896, 128),
    "img_in": (128, 64),
}
NAMES = LAYER_NAMES["flux_kontext"]


def test_modulation_norms_and_what_is_outside_of_the_blocks_stay_as_they_are() -> None:
    assert layers_to_quantize(SHAPES, NAMES) == [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.img_attn.qkv",
        "single_blocks.0.linear1",
    ]
    assert linears_of_blocks(SHAPES, NAMES) == [
        "double_blocks.0.img_mod.lin",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.img_attn.qkv",
        "single_blocks.0.linear1",
    ]


def test_whole_names_are_excluded_by_pattern() -> None:
    exclude = (r"double_blocks\.0\..*", r".*linear1")
    assert layers_to_quantize(SHAPES, NAMES, exclude=exclude) == ["double_blocks.1.img_attn.qkv"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("img_attn", "only a part of double_blocks.0.img_attn.qkv"),
        (r"double_blocks\.7\..*", "matches none of the 3 layers that are kept in 8 bits"),
        # Not in 8 bits anyway.
        (".*mod.*", "matches none"),
        ("(", "no regular expression"),
        (".*", "leave none of the 3 layers"),
    ],
)
def test_a_pattern_that_does_nothing_or_too_much_is_an_error(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match="quantize_exclude_patterns") as raised:
        layers_to_quantize(SHAPES, NAMES, exclude=(pattern,))
    assert words in str(raised.value)
