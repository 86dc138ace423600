"""Tests of MagCache on the transformers of families whose blocks are called in another way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pack.engine.block_cache import BlockStreams, cached_blocks, calibrated_blocks
from pack.engine.magcache import planned
from torch import Tensor, nn

PLAN = planned([1.0] * 3, [True, False, True])


class Blocks:
    """An architecture, as far as the cache asks for one."""

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        lists = ("transformer_blocks", "single_transformer_blocks", "blocks")
        children = dict(transformer.named_children())
        return [block for name in lists if name in children for block in children[name].children()]


def tiny_wan() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 5, 8),
    }
    return model, inputs


def tiny_qwen() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 16, 8),  # as many as the image has
        "encoder_hidden_states_mask": torch.ones(1, 16).long(),
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [[(1, 4, 4)]],
    }
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:
        inputs["txt_seq_lens"] = [16]  # diffusers 0.36 asks for them
    return model, inputs


def tiny_hunyuan() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 8, 8),  # as many as the image has
        "encoder_attention_mask": torch.ones(1, 8),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.full((1,), 6000.0),
    }
    return model, inputs


def tiny_framepack() -> tuple[nn.Module, dict[str, Tensor]]:
    """A section of 3 latent frames, with clean frames and two resolutions of history."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_proj_dim=20,
        has_image_proj=True,
        has_clean_x_embedder=True,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 8, 8),
        "encoder_attention_mask": torch.ones(1, 8),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.full((1,), 10_000.0),
        "image_embeds": torch.randn(1, 5, 20),
        "indices_latents": torch.arange(3, 6),
        "latents_clean": torch.randn(1, 4, 2, 8, 8),
        "indices_latents_clean": torch.tensor([0, 6]),
        "latents_history_2x": torch.randn(1, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.tensor([1, 2]),
        "latents_history_4x": torch.randn(1, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.tensor([20, 21, 22, 23]),
    }
    return model, inputs


@pytest.mark.parametrize(
    ("make", "streams"),
    [
        (tiny_framepack, BlockStreams(outputs=("hidden_states", "encoder_hidden_states"))),
        (tiny_wan, BlockStreams(outputs=("hidden_states",))),
        (tiny_qwen, BlockStreams()),
        (tiny_hunyuan, BlockStreams(outputs=("hidden_states", "encoder_hidden_states"))),
    ],
)
def test_the_blocks_of_other_families_are_skipped_too(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]], streams: BlockStreams
) -> None:
    """With the same input, a residual that is reused gives what was computed."""
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().requires_grad_(False)
    expected = model(**inputs, return_dict=False)[0]
    with cached_blocks(Blocks(), model, PLAN, streams=streams) as cache:
        first, skipped, third = (model(**inputs, return_dict=False)[0] for _ in range(3))
    assert torch.equal(first, expected) and torch.equal(third, expected)
    # in + (out - in) is out but for the rounding of numbers of order 1
    torch.testing.assert_close(skipped, expected, rtol=0, atol=1e-5)
    assert cache.block_calls == 2 * len(Blocks().blocks(model))


def test_every_section_of_a_framepack_video_begins_anew_and_has_ratios_of_its_own() -> None:
    """As the peer resets before each section; the sections have other inputs."""
    torch.manual_seed(0)
    model, inputs = tiny_framepack()
    model.eval().requires_grad_(False)
    streams = BlockStreams(outputs=("hidden_states", "encoder_hidden_states"))
    sections = [inputs | {"hidden_states": torch.randn(1, 4, 3, 8, 8)} for _ in range(2)]
    times = [torch.full((1,), time) for time in (900.0, 500.0, 100.0)]
    ratios: list[tuple[float, ...]] = []
    for section in sections:
        with calibrated_blocks(Blocks(), model, len(times), streams=streams) as cache:
            for time in times:
                model(**section | {"timestep": time}, return_dict=False)
        [calibration] = cache.calibration().values()
        ratios.append(calibration.ratios)
    assert ratios[0] != ratios[1] and all(len(each) == 3 and each[0] == 1 for each in ratios)

    alone = [model(**section, return_dict=False)[0] for section in sections]
    for section, expected in zip(sections, alone, strict=True):
        with cached_blocks(Blocks(), model, PLAN, streams=streams) as cache:
            first, skipped = (model(**section, return_dict=False)[0] for _ in range(2))
        assert torch.equal(first, expected)  # nothing of the section before is left
        torch.testing.assert_close(skipped, expected, rtol=0, atol=1e-5)
