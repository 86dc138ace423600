"""Every kind of adapter of every family through every pair of formats."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import FullWeights, LoRAWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import ConfigError, NotFiniteError
from pack.engine.lora_file import read_lora, save_adapters, write_lora
from pack.engine.lora_formats import FORMATS
from safetensors.torch import load_file

from .lora_examples import KINDS, adapter, layers

ALL = LAYER_NAMES.values()
# Diffusers' files hold no more than LoRAs: the first cannot be one at all, the others need a
# rank as large as the weight, or have magnitudes that diffusers does not know.
NOT_FOR_DIFFUSERS = ("full", "lokr_whole", "dora_columns")


@pytest.mark.parametrize("family", LAYER_NAMES)
@pytest.mark.parametrize(("first", "second"), list(product(FORMATS, FORMATS)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_the_same_after_two_formats(
    tmp_path: Path, family: str, first: str, second: str, kind: str
) -> None:
    names = LAYER_NAMES[family]
    given = layers(names, kind, torch.Generator().manual_seed(0), blocks=(3,))
    metadata = {"ss_base_model_version": names.base_models[0]}
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    if "diffusers" in (first, second) and kind in NOT_FOR_DIFFUSERS:
        with pytest.raises(ConfigError, match="choose the format comfyui"):
            write_lora(a, given, names, format="diffusers", dtype=torch.float32, metadata=metadata)
        assert not a.exists()
        return
    write_lora(a, given, names, format=first, dtype=torch.float32, metadata=metadata)
    once = read_lora(a, [names])
    write_lora(b, once.layers, names, format=second, dtype=torch.float32, metadata=metadata)
    twice = read_lora(b, ALL)
    assert (once.format, twice.format) == (first, second)
    assert once.names is twice.names is names
    assert set(twice.layers) == set(given)
    for name, wanted in given.items():
        found, expected = delta(twice.layers[name]), delta(wanted)
        if kind.startswith(("lora", "dora", "full")) or "diffusers" not in (first, second):
            # Alpha over rank is a power of two, so that nothing is rounded.
            assert torch.equal(found, expected)
        else:
            # A product of at most five factors and a sum of at most four terms, in another order.
            bound = 16 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (found - expected).abs().max() <= bound
        if kind.startswith("dora"):
            assert torch.equal(twice.layers[name].magnitude, wanted.magnitude)


@pytest.mark.parametrize("first", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_comes_back_with_its_kernel(tmp_path: Path, kind: str, first: str) -> None:
    names, shape = LAYER_NAMES["wan"], (8, 6, 1, 2, 2)
    wanted = adapter(kind, shape, torch.Generator().manual_seed(0))
    path = tmp_path / "a.safetensors"
    save_adapters(
        path,
        {"patch_embedding": wanted},
        names,
        {"patch_embedding": shape},
        format=first,
        dtype=torch.float32,
        metadata={},
    )
    found = read_lora(path, [names], shapes={"patch_embedding": shape}).layers["patch_embedding"]
    assert found.shape == shape
    assert type(found) is type(wanted)
    assert torch.equal(delta(found), delta(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_factors_are_rounded_once_to_the_type_that_was_asked_for(
    tmp_path: Path, dtype: torch.dtype, format: str
) -> None:
    names = LAYER_NAMES["flux_kontext"]
    lora = adapter("lora", (12, 6), torch.Generator().manual_seed(0), alpha=3.0)
    assert isinstance(lora, LoRAWeights)
    layer = "double_blocks.0.img_attn.qkv"
    path = tmp_path / "a.safetensors"
    write_lora(path, {layer: lora}, names, format=format, dtype=dtype, metadata={})
    tensors = load_file(path)
    assert {each.dtype for key, each in tensors.items() if ".alpha" not in key} == {dtype}
    if format == "diffusers":
        second = tensors["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"]
        assert torch.equal(second, (lora.up[4:8] * 1.5).to(dtype))
        return
    stem, end = {
        "comfyui": (f"diffusion_model.{layer}", "lora_B"),
        "kohya": ("lora_unet_double_blocks_0_img_attn_qkv", "lora_up"),
    }[format]
    assert torch.equal(tensors[f"{stem}.{end}.weight"], lora.up.to(dtype))
    assert tensors[f"{stem}.alpha"].dtype == torch.float32
    assert tensors[f"{stem}.alpha"].item() == 3.0


def test_hunyuan_video_has_comfyuis_names_in_kohyas_spelling_and_its_own_in_comfyuis(
    tmp_path: Path,
) -> None:
    names, path = LAYER_NAMES["hunyuan_video"], tmp_path / "a.safetensors"
    generator = torch.Generator().manual_seed(0)
    given = {
        name: adapter("lora", (12, 6), generator)
        for name in ("double_blocks.0.img_mlp.fc1", "time_in.mlp.0")
    }
    given["double_blocks.0.img_attn_q_norm"] = FullWeights(torch.ones(4))
    keys: dict[str, set[str]] = {}
    for format in ("kohya", "comfyui"):
        write_lora(path, given, names, format=format, dtype=torch.float32, metadata={})
        keys[format] = {key for key in load_file(path) if key.endswith(("alpha", "diff"))}
    assert keys == {
        "kohya": {
            "lora_unet_double_blocks_0_img_mlp_0.alpha",
            "lora_unet_time_in_in_layer.alpha",
            "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff",
        },
        # ComfyUI maps the makers' names of the blocks' linear layers, and no others.
        "comfyui": {
            "diffusion_model.double_blocks.0.img_mlp.fc1.alpha",
            "diffusion_model.time_in.in_layer.alpha",
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff",
        },
    }


def test_a_value_too_large_for_fp16_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    names, path = LAYER_NAMES["qwen_image"], tmp_path / "a.safetensors"
    lora = adapter("lora", (8, 6), torch.Generator().manual_seed(0))
    assert isinstance(lora, LoRAWeights)
    lora.up[1, 1] = 70_000.0
    given = {"transformer_blocks.1.attn.to_q": lora}
    with pytest.raises(NotFiniteError, match=r"to_q.lora_B.weight has .* 7e\+04.* bf16 or fp32"):
        write_lora(path, given, names, dtype=torch.float16, metadata={})
    lora.up[1, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="became NaN"):
        write_lora(path, given, names, dtype=torch.float32, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_does_not_fit_the_model_is_a_bug(tmp_path: Path) -> None:
    names, path = LAYER_NAMES["wan"], tmp_path / "a.safetensors"
    given = {"blocks.0.ffn.0": adapter("lora", (8, 6), torch.Generator().manual_seed(0))}
    options = {"dtype": torch.float32, "metadata": {}}
    with pytest.raises(ValueError, match="no layer of the model"):
        save_adapters(path, given, names, {}, **options)
    with pytest.raises(ValueError, match="not \\(8, 7\\)"):
        save_adapters(path, given, names, {"blocks.0.ffn.0": (8, 7)}, **options)
    with pytest.raises(ValueError, match="no layer of wan"):
        write_lora(path, {"nothing": given["blocks.0.ffn.0"]}, names, **options)
    with pytest.raises(ConfigError, match="no format 'webui'"):
        write_lora(path, given, names, format="webui", **options)
