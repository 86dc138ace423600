from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.lora_family import find, nearest
from pack.engine.lora_file import write_lora

from .lora_examples import layers

PATH = Path("a.safetensors")
ALL = tuple(LAYER_NAMES.values())
FLUX, HUNYUAN, FRAMEPACK = (
    LAYER_NAMES[family] for family in ("flux_kontext", "hunyuan_video", "framepack")
)


def family(modules: list[str], **metadata: str) -> str:
    return find(PATH, modules, ALL, metadata=metadata).names.family


def test_names_that_one_family_has_say_which_it_is() -> None:
    assert family(["blocks.0.self_attn.q"]) == "wan"
    assert family(["lora_unet_transformer_blocks_59_img_mod_1"]) == "qwen_image"
    assert family(["double_blocks.0.img_attn_qkv", "double_blocks.0.img_mlp.fc1"]) == (
        "hunyuan_video"
    )


@pytest.mark.parametrize("module", ["img_attn_qkv", "img_attn_proj", "txt_attn_qkv"])
def test_names_that_several_share_are_told_apart_by_metadata(module: str) -> None:
    shared = [f"lora_unet_double_blocks_0_{module}"]
    with pytest.raises(ConfigError, match="flux_kontext or hunyuan_video.*set the architecture"):
        family(shared)
    assert family(shared, ss_base_model_version="hunyuan_video") == "hunyuan_video"
    assert family(shared, **{"modelspec.architecture": "Flux.1-dev/lora"}) == "flux_kontext"


@pytest.mark.parametrize(
    "spelling", ["lora_unet_{}_blocks_{}_{}", "diffusion_model.{}_blocks.{}.{}"]
)
def test_numbers_of_blocks_tell_flux_from_hunyuan_video(spelling: str) -> None:
    def modules(double: int, single: int) -> list[str]:
        return [
            *(spelling.format("double", i, "img_attn_qkv") for i in range(double)),
            *(spelling.format("single", i, "linear1") for i in range(single)),
        ]

    if "unet" in spelling:
        assert family(modules(19, 38)) == "flux_kontext"
    assert family(modules(20, 40)) == "hunyuan_video"
    assert family(modules(20, 38)) == "hunyuan_video"


def test_numbers_of_blocks_tell_families_in_diffusers_spelling_apart() -> None:
    def modules(count: int) -> list[str]:
        return [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(count)]

    assert family(modules(60)) == "qwen_image"
    assert family(modules(19)) == "flux_kontext"
    with pytest.raises(ConfigError, match="hunyuan_video or framepack"):
        family(modules(20))


def test_the_layers_of_the_model_at_hand_tell_families_apart() -> None:
    found = find(
        PATH,
        ["lora_unet_double_blocks_0_img_attn_qkv"],
        ALL,
        metadata={},
        layers=["double_blocks.0.img_attn_qkv"],
    )
    assert found.names is HUNYUAN


def test_names_win_over_metadata_that_cannot_be_true() -> None:
    assert family(["blocks.0.ffn.0"], ss_base_model_version="qwen_image") == "wan"


def test_a_family_that_the_user_names_is_taken_with_a_remark() -> None:
    found = find(
        PATH,
        ["lora_unet_double_blocks_19_img_attn_qkv"],
        [FLUX],
        metadata={"ss_base_model_version": "hunyuan_video"},
    )
    assert found.names is FLUX
    assert found.remarks == (
        "the file says that it is for hunyuan_video, but was read as one for flux_kontext",
        "double_blocks.19 is beyond the blocks of the published flux_kontext model",
    )


def test_a_layer_that_the_family_does_not_have_is_named_with_the_nearest() -> None:
    with pytest.raises(
        CheckpointError, match=r"flux_kontext does not have; the nearest is 'double"
    ):
        family(["double_blocks.3.img_attn.proj", "double_blocks.3.img_attn.qvk"])
    with pytest.raises(CheckpointError, match="no layer of .* or of any other model"):
        family(["lora_unet_input_blocks_1_1_proj_in"])
    assert nearest(FLUX, "lora_unet_single_blocks_7_linaer1") == "single_blocks.7.linear1"


@pytest.mark.parametrize("names", ALL, ids=lambda names: names.family)
def test_metadata_as_written_by_us_say_which_family_it_is(names, tmp_path: Path) -> None:
    from pack.engine.lora_file import read_lora

    given = layers(names, "lora", torch.Generator().manual_seed(0), blocks=(0,))
    path = tmp_path / "a.safetensors"
    for base in names.base_models:
        metadata = {"modelspec.architecture": f"{base}/lora"}
        write_lora(path, given, names, dtype=torch.float32, metadata=metadata)
        assert read_lora(path, ALL).names is names
