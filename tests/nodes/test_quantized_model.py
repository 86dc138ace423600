"""Models in 8 bits, as far as they go without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import EngineError
from pack.engine.quantize import Quantized, dequantize, quantize
from pack.engine.quantized_loading import QuantizationSettings, QuantizedSource, quantized_source
from pack.engine.quantized_stream import stored_tensors
from pack.engine.weights import open_checkpoint
from pack.tests.nodes.stand_ins import ExecutionBlocker, FolderPaths
from pack.tests.references import checkpoint_layouts, tiny_native
from safetensors.torch import save_file
from torch import Tensor

# With other names in diffusers, and several modules for a layer.
SPLIT = ("FLUX.1 Kontext", "HunyuanVideo", "Wan 2.1 i2v")
SETTINGS = {
    "quantize_format": "int8",
    "quantize_mode": "channel",
    "quantize_block_size": 32,
    "quantize_search": True,
    "quantize_scale_dtype": "bf16",
    "quantize_compat": False,
    "quantize_exclude_patterns": "double_blocks\\.0\\..*\n\n single_blocks.*linear2 ",
}


@pytest.fixture
def eight_bit_model(load: Callable[[str], Any]) -> Any:
    return load("eight_bit_model")


@pytest.fixture
def quantized_model(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("quantized_model")


def source_of(
    path: Path, tensors: dict[str, Tensor], family: str, settings: QuantizationSettings | None
) -> QuantizedSource:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return quantized_source(open_checkpoint(path), LAYER_NAMES[family], settings)


def read(source: QuantizedSource) -> Iterator[tuple[str, Tensor | Quantized]]:
    for stored in stored_tensors(source, source.tensors(), dtype=None):
        yield stored.key, stored.value


def restored(value: Tensor | Quantized) -> Tensor:
    return dequantize(value) if isinstance(value, Quantized) else value


@pytest.mark.parametrize("model", SPLIT)
def test_a_file_of_diffusers_gets_the_names_that_comfyui_knows(
    eight_bit_model: Any, tmp_path: Path, model: str
) -> None:
    state, _ = tiny_native.build(model)
    family = tiny_native.MODELS[model]
    split = checkpoint_layouts.as_diffusers(state, LAYER_NAMES[family])
    source = source_of(tmp_path / "model.safetensors", split, family, None)
    found = dict(eight_bit_model._native_tensors(source, read(source), torch.float32))

    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("mode", ["block", "channel"])
@pytest.mark.parametrize("model", SPLIT)
def test_pieces_in_8_bits_become_the_layer_that_rounding_it_whole_gives(
    eight_bit_model: Any, tmp_path: Path, model: str, mode: str
) -> None:
    state, _ = tiny_native.build(model)
    family, settings = tiny_native.MODELS[model], QuantizationSettings(mode=mode)
    split = checkpoint_layouts.as_diffusers(state, LAYER_NAMES[family])
    sources = {
        name: source_of(tmp_path / f"{name}.safetensors", tensors, family, settings)
        for name, tensors in (("split", split), ("whole", state))
    }
    found, wanted = (
        dict(eight_bit_model._native_tensors(source, read(source), torch.float32))
        for source in sources.values()
    )

    assert sum(isinstance(value, Quantized) for value in wanted.values()) == (
        24 if family == "wan" else 20
    )
    for key, value in wanted.items():
        assert torch.equal(restored(found[key]), restored(value)), key
        assert isinstance(found[key], Quantized) == isinstance(value, Quantized), key


def test_names_of_comfyui_and_unknown_ones_stay_as_they_are(
    eight_bit_model: Any, tmp_path: Path
) -> None:
    state, _ = tiny_native.build("HunyuanVideo")
    renamed = {key.replace("_attn_qkv", "_attn.qkv"): tensor for key, tensor in state.items()}
    renamed["something.new"] = torch.ones(3)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in renamed.items()}
    source = source_of(tmp_path / "model.safetensors", prefixed, "hunyuan_video", None)
    found = dict(eight_bit_model._native_tensors(source, read(source), torch.float32))

    assert found.keys() == renamed.keys()


def test_pieces_with_one_scale_each_get_that_for_each_row(eight_bit_model: Any) -> None:
    weights = [torch.randn(4, 16) * size for size in (1.0, 100.0)]
    pieces = [quantize(weight, mode="tensor") for weight in weights]
    whole = eight_bit_model._joined(pieces, torch.float32)

    assert whole.mode == "channel"
    assert torch.equal(dequantize(whole), torch.cat([dequantize(piece) for piece in pieces]))


@pytest.mark.parametrize("second", ["e5m2", "plain"])
def test_pieces_of_different_kinds_are_restored(eight_bit_model: Any, second: str) -> None:
    weight = torch.randn(4, 64)
    pieces = [quantize(weight), weight if second == "plain" else quantize(weight, format=second)]
    whole = eight_bit_model._joined(pieces, torch.bfloat16)

    wanted = torch.cat([restored(piece).bfloat16() for piece in pieces])
    assert torch.equal(whole, wanted)


def test_an_older_comfyui_is_told_what_it_lacks(load: Callable[[str], Any]) -> None:
    # The stand-ins know nothing of quantized weights.
    with pytest.raises(EngineError, match="0.27 or newer .* update ComfyUI"):
        load("block_layout").check_comfyui()


def test_widgets_become_settings(quantized_model: Any) -> None:
    found = quantized_model._settings("Node", {**SETTINGS, "lora_1": "none"})

    assert found == QuantizationSettings(
        format="int8",
        mode="channel",
        block_size=32,
        scale_dtype="bf16",
        search=True,
        exclude=(r"double_blocks\.0\..*", "single_blocks.*linear2"),
    )


def test_a_value_out_of_range_is_refused(quantized_model: Any) -> None:
    with pytest.raises(EngineError, match="Node.*quantize_block_size"):
        quantized_model._settings("Node", {**SETTINGS, "quantize_block_size": 0})


def test_defaults_of_the_widgets_are_those_of_the_settings(
    quantized_model: Any, node_types: dict[str, Any]
) -> None:
    for node_id in ("LoraLoom_LoadQuantizedModel", "LoraLoom_QuantizeModel"):
        inputs = node_types[node_id].define_schema().inputs
        defaults = {
            each.id: each.options["default"] for each in inputs if each.id.startswith("quantize_")
        }
        assert quantized_model._settings("Node", defaults) == QuantizationSettings()


def test_loras_are_optional_and_those_without_strength_left_out(
    quantized_model: Any, comfyui: FolderPaths
) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (comfyui.base / "models" / "loras" / name).touch()
    none = {
        key: value
        for number in range(1, 5)
        for key, value in ((f"lora_{number}", "none"), (f"strength_{number}", 1.0))
    }
    chosen = none | {"lora_1": "a.safetensors", "strength_1": 0.0, "lora_3": "b.safetensors"}

    assert quantized_model._loras(none) == ()
    [(path, strength)] = quantized_model._loras(chosen)
    assert (path.name, strength) == ("b.safetensors", 1.0)


def test_without_measurements_no_picture_is_given(quantized_model: Any) -> None:
    loaded = quantized_model.LoadedModel(None, [], "")

    assert isinstance(quantized_model._error_picture(Path("model"), loaded), ExecutionBlocker)
