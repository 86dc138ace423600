"""What becomes of each tensor of a file, and the tensors themselves, against plain float64 sums."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pack.engine import quantized_stream
from pack.engine.adapter_weights import AdapterWeights, FullWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.checkpoint_merge import write_merged
from pack.engine.errors import CheckpointError, ConfigError, NotFiniteError
from pack.engine.lora_file import write_lora
from pack.engine.quantize import Quantized, dequantize, quantize
from pack.engine.quantized_loading import (
    QuantizationSettings,
    QuantizedSource,
    quantized_source,
    read_loras,
    remarks,
)
from pack.engine.quantized_stream import Stored, stored_tensors
from pack.engine.weights import open_checkpoint
from pack.tests.references import random_adapters, tiny_checkpoints
from pack.tests.references.checkpoint_layouts import as_diffusers, save_split
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
FLUX = LAYER_NAMES["flux_kontext"]
QKV = "double_blocks.0.img_attn.qkv"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
STATES = {
    "flux_kontext": lambda: tiny_checkpoints.flux(depth=2, single=1),
    "hunyuan_video": tiny_checkpoints.hunyuan_video,
    "wan": lambda: tiny_checkpoints.wan(in_channels=36, clip=True),
    "qwen_image": tiny_checkpoints.qwen_image,
}


def cast(state: Mapping[str, Tensor], dtype: torch.dtype = BF16) -> State:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


def flux(dtype: torch.dtype = BF16) -> State:
    return cast(tiny_checkpoints.flux(), dtype)


def source_of(
    path: Path,
    state: Mapping[str, Tensor],
    settings: QuantizationSettings | None = QuantizationSettings(),  # noqa: B008  (frozen)
    loras: Mapping[str, AdapterWeights] | None = None,
    *,
    multiplier: float = 1.0,
    family: str = "flux_kontext",
) -> QuantizedSource:
    file = path / "model.safetensors"
    save_file(dict(state), file)
    given = [(loras, multiplier)] if loras else []
    return quantized_source(open_checkpoint(file), LAYER_NAMES[family], settings, given)


def read(source: QuantizedSource, **options: object) -> dict[str, Stored]:
    options = {"dtype": None} | options
    return {each.key: each for each in stored_tensors(source, source.tensors(), **options)}


def quantized(stored: Stored) -> Quantized:
    assert isinstance(stored.value, Quantized)
    return stored.value


def peers_rounding(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes, and scales in the type of the weight, each step written out."""
    blocks = weight.view(weight.shape[0], -1, block_size)
    scale = (blocks.abs().amax(2, keepdim=True) / 448.0).clamp(min=1e-8)
    codes = torch.clamp(blocks.float() / scale.float(), -448.0, 448.0).to(E4M3)
    return codes.view(weight.shape), scale


def assert_same(found: Quantized, wanted: Quantized) -> None:
    assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(found.scale, wanted.scale) and found.scale.dtype == wanted.scale.dtype
    assert (found.mode, found.block_size) == (wanted.mode, wanted.block_size)


@pytest.mark.parametrize("family", STATES)
def test_every_layer_is_rounded_and_all_else_is_as_it_was(tmp_path: Path, family: str) -> None:
    state = cast(STATES[family]())
    source = source_of(tmp_path, state, family=family)
    found = read(source)
    assert list(found) == open_checkpoint(tmp_path / "model.safetensors").in_file_order()
    for key, stored in found.items():
        if key in source.eight_bit:
            assert_same(quantized(stored), quantize(state[key]))
        else:
            assert isinstance(stored.value, Tensor) and stored.value.dtype == BF16
            assert torch.equal(stored.value, state[key])
    # Outside are embeddings, norms, biases and modulation.
    assert all(key.endswith(".weight") and state[key].dim() == 2 for key in source.eight_bit)
    assert remarks(source) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_and_threads_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    state = flux()
    # Several pieces of several rows, and the last one shorter; two pieces for one thread.
    monkeypatch.setattr(quantized_stream, "_PIECE", 128 * 50)
    monkeypatch.setattr(quantized_stream, "num_workers", lambda device: threads)
    for mode in ("block", "channel", "tensor"):
        source = source_of(tmp_path, state, QuantizationSettings(mode=mode, search=True))
        for key, stored in read(source).items():
            if key in source.eight_bit:
                assert_same(quantized(stored), quantize(state[key], mode=mode, search=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_in_compat_codes_and_scales_are_bit_for_bit_the_peers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = flux(dtype)
    found = read(source_of(tmp_path, state, QuantizationSettings(compat=True)))
    for key in source_of(tmp_path, state).eight_bit:
        codes, scale = peers_rounding(state[key])
        ours = quantized(found[key])
        assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(ours.scale, scale) and ours.scale.dtype == dtype


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("fp32", BF16, torch.float32),
        ("bf16", torch.float16, BF16),
        ("weight", torch.float16, torch.float16),
        ("weight", torch.float64, torch.float32),
    ],
)
def test_scales_have_the_type_that_was_asked_for(
    tmp_path: Path, name: str, stored: torch.dtype, expected: torch.dtype
) -> None:
    source = source_of(tmp_path, flux(stored), QuantizationSettings(scale_dtype=name))
    key = f"{QKV}.weight"
    found = quantized(read(source)[key])
    assert found.scale.dtype == expected == source.eight_bit[key].empty("meta").scale.dtype
    error = dequantize(found, torch.float64) - flux(stored)[key].double()
    assert error.norm() < 0.03 * flux(stored)[key].double().norm()


def test_measured_errors_are_those_of_plain_sums(tmp_path: Path) -> None:
    state = flux()
    for mode in ("block", "tensor"):
        source = source_of(tmp_path, state, QuantizationSettings(mode=mode))
        for key, stored in read(source, measure=True).items():
            if key in source.eight_bit:
                weight = state[key].double()
                error = dequantize(quantized(stored), torch.float32).double() - weight
                assert stored.squares is not None
                # Sums of up to 2**18 squares in float32, in 16 parts at least.
                assert stored.squares.error == pytest.approx(float(error.square().sum()), 2**-11)
                assert stored.squares.weight == pytest.approx(float(weight.square().sum()), 2**-11)
            else:
                assert stored.squares is None


def test_excluded_layers_keep_their_type(tmp_path: Path) -> None:
    settings = QuantizationSettings(exclude=(r"double_blocks\..*",))
    source = source_of(tmp_path, flux(), settings)
    assert sorted(source.eight_bit) == [
        "single_blocks.0.linear1.weight",
        "single_blocks.0.linear2.weight",
    ]
    assert isinstance(read(source)[f"{QKV}.weight"].value, Tensor)


def test_what_cannot_be_divided_into_blocks_is_said_once_for_each_kind(tmp_path: Path) -> None:
    settings = QuantizationSettings(block_size=96)
    source = source_of(tmp_path, cast(tiny_checkpoints.flux(depth=2)), settings)
    assert {way.mode for way in source.eight_bit.values()} == {"channel"}
    told = remarks(source)
    assert len(told) == 10
    assert told[0].startswith(
        "double_blocks.*.img_attn.proj (2): 128 inputs cannot be divided into"
    )
    assert "blocks of 96, so it has a scale for each row" in told[0]
    assert_same(
        quantized(read(source)[f"{QKV}.weight"]),
        quantize(cast(tiny_checkpoints.flux(depth=2))[f"{QKV}.weight"], mode="channel"),
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (QuantizationSettings(compat=True, format="int8"), "no int8"),
        (QuantizationSettings(compat=True, search=True), "quantize_search"),
        (QuantizationSettings(exclude=("nothing",)), "quantize_exclude_patterns"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, settings: QuantizationSettings, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        source_of(tmp_path, flux(), settings)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", ["block", "tensor"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, mode: str) -> None:
    state = flux()
    state["single_blocks.0.linear2.weight"][5, 77] = value
    source = source_of(tmp_path, state, QuantizationSettings(mode=mode))
    with pytest.raises(NotFiniteError, match=r"model\.safetensors: single_blocks\.0\.linear2"):
        read(source)


# LoRAs


def adapters(state: Mapping[str, Tensor], kind: str) -> dict[str, AdapterWeights]:
    names = (QKV, "single_blocks.0.linear2", "double_blocks.0.txt_mod.lin")
    some = {f"{name}.weight": state[f"{name}.weight"].float() for name in names}
    found = random_adapters.KINDS[kind](some)
    bias = torch.full((384,), 0.25)
    found["double_blocks.0.txt_attn.qkv"] = FullWeights(None, bias_diff=bias)
    return found


def trained(
    state: Mapping[str, Tensor], layers: Mapping[str, AdapterWeights], times: float
) -> State:
    """In float64, without magnitudes."""
    result = {key: tensor.double() for key, tensor in state.items()}
    for name, adapter in layers.items():
        if adapter.shape is not None:
            result[f"{name}.weight"] += times * delta(adapter, torch.float64)
        if adapter.bias_diff is not None:
            result[f"{name}.bias"] += times * adapter.bias_diff.double()
    return result


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
@pytest.mark.parametrize("pieces", [False, True])
def test_loras_are_merged_before_weights_are_rounded(
    tmp_path: Path, kind: str, pieces: bool
) -> None:
    state = flux()
    layers = adapters(state, kind)
    wanted = trained(state, layers, 0.7)
    given = as_diffusers(state, FLUX) if pieces else state
    exact = as_diffusers(wanted, FLUX) if pieces else wanted
    source = source_of(tmp_path, given, QuantizationSettings(), layers, multiplier=0.7)
    found = read(source)
    assert found.keys() == given.keys()
    for key, stored in found.items():
        if key in source.eight_bit:
            # Rounded once to the type of the file, then to 8 bits.
            in_file_type = exact[key].to(BF16).double()
            restored = dequantize(quantized(stored), torch.float64)
            scale = quantized(stored).scale.double().expand(-1, -1, 64).reshape(in_file_type.shape)
            # Half a unit of 8 bits, and a whole one of bfloat16 where float32 sums differ.
            bound = in_file_type.abs() * (1 / 16 + 2**-7) + scale * 2**-10 + 1e-6
            assert ((restored - in_file_type).abs() <= bound).all(), key
        else:
            assert isinstance(stored.value, Tensor) and stored.value.dtype == BF16
            bound = exact[key].abs() * 2**-8 + 1e-6
            assert ((stored.value.double() - exact[key]).abs() <= bound).all(), key


@pytest.mark.parametrize("kind", random_adapters.KINDS)
@pytest.mark.parametrize("pieces", [False, True])
def test_merging_at_once_is_merging_into_a_file_first(
    tmp_path: Path, kind: str, pieces: bool
) -> None:
    state = flux()
    layers = random_adapters.KINDS[kind](cast(state, torch.float32))
    given = as_diffusers(state, FLUX) if pieces else state
    at_once = read(source_of(tmp_path, given, QuantizationSettings(), layers, multiplier=0.7))
    source = source_of(tmp_path, given, None, layers, multiplier=0.7)
    assert source.merge is not None
    write_merged(source.merge, tmp_path / "merged.safetensors", on_written=lambda _: None)
    checkpoint = open_checkpoint(tmp_path / "merged.safetensors")
    later = read(quantized_source(checkpoint, FLUX, QuantizationSettings()))
    assert at_once.keys() == later.keys()
    for key, stored in at_once.items():
        first, second = (each.value for each in (stored, later[key]))
        if isinstance(first, Quantized):
            assert isinstance(second, Quantized)
            first, second = (dequantize(each, torch.float64) for each in (first, second))
        # The last bit of a product in float32 may depend on where in memory its factors lie. Where
        # that decides a rounding to bfloat16, a code may be the next one, 1/8 away at most.
        differs = first != second
        assert differs.sum() <= max(1, differs.numel() // 1000), key
        assert ((first - second).abs() <= first.abs() / 8 + 1e-3 * first.abs().amax()).all(), key


def test_a_lora_in_float32_does_not_change_the_type_of_scales(tmp_path: Path) -> None:
    state = flux()
    settings = QuantizationSettings(compat=True)
    source = source_of(tmp_path, state, settings, adapters(state, "lora"))
    found = quantized(read(source)[f"{QKV}.weight"])
    assert found.scale.dtype == BF16


def test_a_prefix_of_the_file_is_no_obstacle_to_loras(tmp_path: Path) -> None:
    state = flux()
    layers = adapters(state, "lora")
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
    prefixed["vae.decoder.conv_in.weight"] = torch.ones(2, 2, 3, 3)
    plain = read(source_of(tmp_path, state, QuantizationSettings(), layers))
    found = read(source_of(tmp_path, prefixed, QuantizationSettings(), layers))
    for key, stored in plain.items():
        if isinstance(stored.value, Quantized):
            assert_same(quantized(found[f"model.diffusion_model.{key}"]), stored.value)
    assert torch.equal(found["vae.decoder.conv_in.weight"].value, torch.ones(2, 2, 3, 3))


def test_lora_files_are_read_for_the_layers_of_the_model(tmp_path: Path) -> None:
    state = flux()
    source_of(tmp_path, state)
    layers = adapters(state, "lora")
    file = tmp_path / "lora.safetensors"
    write_lora(file, layers, FLUX, dtype=torch.float32, metadata={}, format="kohya")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    [(found, times)], told = read_loras(checkpoint, FLUX, [(file, 0.5)])
    assert found.keys() == layers.keys() and times == 0.5
    assert told[0] == "lora.safetensors is merged at 0.5, layers: 4"
    wrong = {"double_blocks.9.img_attn.qkv": layers[QKV]}
    write_lora(file, wrong, FLUX, dtype=torch.float32, metadata={})
    with pytest.raises(CheckpointError, match=r"lora\.safetensors.*double_blocks\.9"):
        read_loras(checkpoint, FLUX, [(file, 1.0)])


def test_a_lora_that_makes_a_weight_infinite_is_refused(tmp_path: Path) -> None:
    layers: dict[str, AdapterWeights] = {QKV: FullWeights(torch.full((384, 128), 3e38))}
    source = source_of(tmp_path, flux(), QuantizationSettings(), layers, multiplier=10.0)
    with pytest.raises(NotFiniteError, match=QKV):
        read(source)


# Files that are in 8 bits already


def musubi(state: Mapping[str, Tensor], keys: Mapping[str, object]) -> State:
    found = dict(state)
    for key in keys:
        codes, scale = peers_rounding(state[key])
        found |= {key: codes, f"{key.removesuffix('.weight')}.scale_weight": scale}
    return found


def test_codes_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    state = flux()
    keys = source_of(tmp_path, state).eight_bit
    file = musubi(state, keys)
    for settings in (None, QuantizationSettings(format="int8")):
        source = source_of(tmp_path, file, settings)
        found = read(source)
        assert found.keys() == state.keys() and source.eight_bit.keys() == keys.keys()
        assert not source.is_changed
        for key in keys:
            ours = quantized(found[key])
            assert torch.equal(ours.codes.view(torch.uint8), file[key].view(torch.uint8))
            assert torch.equal(ours.scale, file[f"{key.removesuffix('.weight')}.scale_weight"])
    [told] = remarks(source)
    assert told.startswith("10 layers are in 8 bits in the file and are used as they are: float8")


def test_layers_that_a_file_has_not_in_8_bits_are_rounded(tmp_path: Path) -> None:
    state = flux()
    file = musubi(state, {f"{QKV}.weight": None})
    source = source_of(tmp_path, file, QuantizationSettings(format="int8"))
    found = read(source)
    assert quantized(found[f"{QKV}.weight"]).format == "e4m3"
    assert_same(
        quantized(found["single_blocks.0.linear1.weight"]),
        quantize(state["single_blocks.0.linear1.weight"], format="int8"),
    )


def test_a_file_that_was_only_cast_is_restored_outside_of_the_blocks(tmp_path: Path) -> None:
    state = {key: tensor.to(E4M3) for key, tensor in flux().items()}
    source = source_of(tmp_path, state, None)
    found = read(source)
    ours = quantized(found[f"{QKV}.weight"])
    assert ours.mode == "tensor" and float(ours.scale) == 1.0
    assert torch.equal(ours.codes.view(torch.uint8), state[f"{QKV}.weight"].view(torch.uint8))
    # Layers of the blocks that we never round stay as they are in the file, too.
    assert isinstance(found["double_blocks.0.img_mod.lin.weight"].value, Quantized)
    for key in ("img_in.weight", f"{QKV}.bias", "single_blocks.0.norm.key_norm.scale"):
        value = found[key].value
        assert isinstance(value, Tensor) and value.dtype == BF16
        assert torch.equal(value, state[key].to(BF16))
    assert any("only cast to FP8" in told for told in remarks(source))


def test_loras_are_merged_into_codes_of_a_file(tmp_path: Path) -> None:
    state = flux()
    file = musubi(state, source_of(tmp_path, state).eight_bit)
    layers = adapters(state, "lora")
    restored = {
        key: dequantize(quantized(each), torch.float64)
        if isinstance(each.value, Quantized)
        else each.value.double()
        for key, each in read(source_of(tmp_path, file, None)).items()
    }
    wanted = trained(restored, layers, 1.0)
    for settings in (None, QuantizationSettings(scale_dtype="bf16")):
        source = source_of(tmp_path, file, settings, layers)
        found = read(source)
        key = f"{QKV}.weight"
        assert source.is_changed and not source.eight_bit[key].taken
        assert quantized(found[key]).scale.dtype == BF16  # as in the file, and as asked for
        error = dequantize(quantized(found[key]), torch.float64) - wanted[key]
        assert 0.02 < error.norm() / wanted[key].norm() < 0.03
        assert source.eight_bit["double_blocks.0.img_attn.proj.weight"].taken


def test_codes_that_are_no_number_are_named(tmp_path: Path) -> None:
    state = flux()
    file = musubi(state, {f"{QKV}.weight": None})
    file[f"{QKV}.weight"].view(torch.uint8)[3, 3] = 0x7F
    with pytest.raises(CheckpointError, match=QKV):
        read(source_of(tmp_path, file, None))


def test_what_linear_layers_cannot_hold_is_restored_or_rounded_anew(tmp_path: Path) -> None:
    """Rotated INT8 of ComfyUI."""
    state = flux()
    rotated = quantize(state["single_blocks.0.linear2.weight"], format="int8", mode="channel")
    config = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64})
    state |= {
        "single_blocks.0.linear2.weight": rotated.codes,
        "single_blocks.0.linear2.weight_scale": rotated.scale,
        "single_blocks.0.linear2.comfy_quant": torch.tensor(
            list(config.encode()), dtype=torch.uint8
        ),
    }
    source = source_of(tmp_path, state, None)
    plain = read(source)["single_blocks.0.linear2.weight"].value
    assert isinstance(plain, Tensor) and plain.dtype == BF16
    assert any("single_blocks.0.linear2.weight, are restored" in told for told in remarks(source))
    found = quantized(read(source_of(tmp_path, state))["single_blocks.0.linear2.weight"])
    error = dequantize(found) - plain.float()
    assert error.norm() < 0.03 * plain.float().norm()


def test_split_sets_are_read_forward(tmp_path: Path) -> None:
    state = flux()
    part = save_split(tmp_path, state)
    source = quantized_source(open_checkpoint(part), FLUX, QuantizationSettings())
    found = read(source)
    assert found.keys() == state.keys()
    paths = [source.checkpoint.entries[key].path for key in found]
    assert paths == sorted(paths)
    assert_same(quantized(found[f"{QKV}.weight"]), quantize(state[f"{QKV}.weight"]))
