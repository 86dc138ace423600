"""Models written in 8 bits and read again, by this package and by the rules of the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import ConfigError, NotFiniteError
from pack.engine.quantization_report import total_error
from pack.engine.quantize import dequantize, quantize
from pack.engine.quantized_file import plan_file, write_file
from pack.engine.quantized_loading import (
    QuantizationSettings,
    QuantizedSource,
    quantized_source,
)
from pack.engine.weights import open_checkpoint
from pack.tests.engine.test_quantized_loading import (
    FLUX,
    QKV,
    flux,
    musubi,
    peers_rounding,
    source_of,
)
from pack.tests.engine.test_quantized_model import velocity
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
TENSOR = QuantizationSettings(mode="tensor")


def written(source: QuantizedSource, layout: str, path: Path, **metadata: str) -> State:
    plan = plan_file(source, layout, metadata)
    sizes: list[int] = []
    write_file(source, plan, path, on_written=sizes.append)
    assert path.stat().st_size == plan.num_bytes
    assert sizes == sorted(sizes) and sizes[-1] == sum(
        entry.num_bytes for entry in open_checkpoint(path).entries.values()
    )
    return load_file(path)


def comfyui_source(
    path: Path, state: Mapping[str, Tensor], settings: QuantizationSettings = TENSOR
) -> QuantizedSource:
    save_file(dict(state), path / "model.safetensors")
    checkpoint = open_checkpoint(path / "model.safetensors")
    return quantized_source(checkpoint, FLUX, settings, only_tensor_mode=True)


def test_the_blockwise_layout_is_the_peers(tmp_path: Path) -> None:
    state = flux()
    source = source_of(tmp_path, state, QuantizationSettings(compat=True))
    found = written(source, "blockwise", tmp_path / "out.safetensors", note="kept")
    for key in source.eight_bit:
        codes, scale = peers_rounding(state[key])
        stored = found.pop(f"{key.removesuffix('.weight')}.scale_weight")
        assert torch.equal(found.pop(key).view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(stored, scale) and stored.dtype == torch.bfloat16
    assert found.keys() == state.keys() - source.eight_bit.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = dict(file.metadata())
    layers = json.loads(metadata.pop("_quantization_metadata"))["layers"]
    # ComfyUI's loader names a format that it does not know rather than to read codes as weights.
    assert layers and all("format" not in config for config in layers.values())
    assert metadata == {"note": "kept"}


@pytest.mark.parametrize(
    ("mode", "shape"), [("block", [384, 2, 1]), ("channel", [384, 1]), ("tensor", [])]
)
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "int8"])
def test_what_is_written_is_read_as_the_same_model(
    tmp_path: Path, mode: str, shape: list[int], format: str
) -> None:
    settings = QuantizationSettings(mode=mode, format=format)
    source = source_of(tmp_path, flux(), settings)
    path = tmp_path / "out.safetensors"
    found = written(source, "blockwise", path)
    assert list(found[f"{QKV}.scale_weight"].shape) == shape
    model = FluxKontext()
    original, options = tmp_path / "model.safetensors", {"dtype": torch.bfloat16}
    first = model.load_transformer(original, quantization=settings, **options).state_dict()
    second = model.load_transformer(path, **options).state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8)
        )


@pytest.mark.parametrize(
    ("format", "name"),
    [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2"), ("int8", "int8_tensorwise")],
)
def test_the_layout_for_comfyui_has_one_scale_and_says_what_it_is(
    tmp_path: Path, format: str, name: str
) -> None:
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in flux().items()}
    source = comfyui_source(tmp_path, state, QuantizationSettings(mode="tensor", format=format))
    found = written(source, "comfyui", tmp_path / "out.safetensors")
    for key in source.eight_bit:
        layer = key.removesuffix(".weight")
        wanted = quantize(state[key], mode="tensor", format=format)
        scale = found[f"{layer}.weight_scale"]
        assert scale.shape == () and scale.dtype == torch.float32
        assert torch.equal(scale, wanted.scale)
        assert torch.equal(found[key].view(torch.uint8), wanted.codes.view(torch.uint8))
        config = json.loads(bytes(found[f"{layer}.comfy_quant"].tolist()))
        assert config["format"] == name
        assert config.get("full_precision_matrix_mult", True)
    assert len(found) == len(state) + 2 * len(source.eight_bit)


def test_comfyuis_layout_has_no_place_for_blocks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block"):
        plan_file(source_of(tmp_path, flux()), "comfyui", {})
    with pytest.raises(ConfigError, match="blockwise or comfyui"):
        plan_file(source_of(tmp_path, flux()), "gguf", {})


def test_a_file_in_blocks_becomes_one_for_comfyui(tmp_path: Path) -> None:
    state = flux()
    file = musubi(state, source_of(tmp_path, state).eight_bit)
    source = comfyui_source(tmp_path, file)
    found = written(source, "comfyui", tmp_path / "out.safetensors")
    key = f"{QKV}.weight"
    before = file[key].float().unflatten(1, (-1, 64)) * file[f"{QKV}.scale_weight"].float()
    after = found[key].float() * found[f"{QKV}.weight_scale"]
    error = (after - before.flatten(1)).norm() / before.norm()
    assert 0.01 < error < 0.03
    assert f"{QKV}.scale_weight" not in found


def test_a_file_of_comfyui_becomes_one_for_the_peers_without_being_rounded(tmp_path: Path) -> None:
    state = flux()
    first = written(comfyui_source(tmp_path, state), "comfyui", tmp_path / "comfyui.safetensors")
    source = source_of(tmp_path, first, QuantizationSettings())
    assert not source.is_changed
    second = written(source, "blockwise", tmp_path / "out.safetensors")
    assert second.keys() == state.keys() | {
        f"{key.removesuffix('.weight')}.scale_weight" for key in source.eight_bit
    }
    for key in source.eight_bit:
        assert torch.equal(second[key].view(torch.uint8), first[key].view(torch.uint8))


def test_other_models_in_the_file_are_copied_as_they_are(tmp_path: Path) -> None:
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in flux().items()}
    others = {
        "text_encoders.t5.layer.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "text_encoders.t5.layer.scale_weight": torch.tensor(0.5),
        "vae.encoder.bias": torch.ones(3, dtype=torch.float16),
        "text_encoders.position_ids": torch.arange(5),
    }
    found = written(source_of(tmp_path, state | others), "blockwise", tmp_path / "out.safetensors")
    for key, tensor in others.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_what_the_header_says_of_quantized_layers_is_not_kept(tmp_path: Path) -> None:
    state = flux()
    first = quantize(state[f"{QKV}.weight"], mode="tensor")
    state |= {f"{QKV}.weight": first.codes, f"{QKV}.weight_scale": first.scale}
    layers = {"layers": {QKV: {"format": "float8_e4m3fn"}}}
    metadata = {"_quantization_metadata": json.dumps(layers), "author": "me"}
    save_file(state, tmp_path / "model.safetensors", metadata)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    source = quantized_source(checkpoint, FLUX, QuantizationSettings())
    written(source, "blockwise", tmp_path / "out.safetensors", **checkpoint.metadata)
    metadata = dict(open_checkpoint(tmp_path / "out.safetensors").metadata)
    assert "float8_e4m3fn" not in metadata.pop("_quantization_metadata")
    assert metadata == {"author": "me"}


def test_a_cast_file_gets_scales_of_1_and_ordinary_norms(tmp_path: Path) -> None:
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in flux().items()}
    found = written(source_of(tmp_path, state), "blockwise", tmp_path / "out.safetensors")
    assert float(found[f"{QKV}.scale_weight"]) == 1.0
    assert found["img_in.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        models = [
            FluxKontext().load_transformer(tmp_path / name, dtype=torch.float32)
            for name in ("model.safetensors", "out.safetensors")
        ]
        assert torch.equal(velocity(models[0]), velocity(models[1]))


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path) -> None:
    state = flux()
    state["single_blocks.0.linear2.weight"][0, 0] = torch.nan
    source = source_of(tmp_path, state)
    with pytest.raises(NotFiniteError, match=r"single_blocks\.0\.linear2"):
        write_file(source, plan_file(source, "blockwise", {}), tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_reports_add_up_to_what_the_file_has(tmp_path: Path) -> None:
    state = flux()
    source = source_of(tmp_path, state)
    plan = plan_file(source, "blockwise", {})
    layers = write_file(source, plan, tmp_path / "out.safetensors", measure=True)
    found = load_file(tmp_path / "out.safetensors")
    assert [layer.name for layer in layers] == [
        key.removesuffix(".weight") for key in source.tensors() if key in source.eight_bit
    ]
    error = weight = 0.0
    for layer in layers:
        key = f"{layer.name}.weight"
        scale = found[f"{layer.name}.scale_weight"]
        assert layer.num_bytes == found[key].nbytes + scale.nbytes
        assert layer.bytes_before == state[key].nbytes
        restored = found[key].double().unflatten(1, (-1, 64)) * scale
        difference = restored.flatten(1) - state[key].double()
        error += float(difference.square().sum())
        weight += float(state[key].double().square().sum())
        expected = difference.norm() / state[key].double().norm()
        assert layer.error == pytest.approx(float(expected), rel=1e-3)
        assert dequantize(quantize(state[key])).shape == restored.flatten(1).shape
    assert total_error(layers) == pytest.approx((error / weight) ** 0.5, rel=1e-3)
