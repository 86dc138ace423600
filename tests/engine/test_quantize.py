from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pack.engine import quantize as quantize_module
from pack.engine.codes import FORMATS
from pack.engine.quantize import (
    MODES,
    Quantized,
    all_finite,
    dequantize,
    empty,
    mode_for,
    quantize,
    quantize_into,
    relative_error,
)
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DATA = Path(__file__).parents[1] / "data"
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def spread_out(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scale of every weight."""
    if scale.dim() == 3:
        return scale.squeeze(-1).repeat_interleave(shape[1] // scale.shape[1], dim=1)
    return scale.expand(shape)


def by_the_book(weight: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    """What the peer's documentation says, step by step: FP8 codes and scales in blocks."""
    blocks = weight.view(weight.shape[0], -1, block_size)
    largest = FORMATS[format].largest
    scale = (blocks.abs().amax(2, keepdim=True) / largest).clamp(min=1e-8)
    quotient = (blocks.float() / scale.float()).nan_to_num(nan=0.0).clamp(-largest, largest)
    return quotient.to(FORMATS[format].dtype).view(weight.shape), scale


# --- what rounding gives


@pytest.mark.parametrize("scale_dtype", TYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", list(FORMATS))
def test_every_weight_gets_the_nearest_value_that_its_scale_allows(
    format: str, mode: str, scale_dtype: torch.dtype
) -> None:
    weight = normal(6, 128) * torch.logspace(-3, 1, 128)
    stored = quantize(weight, format=format, mode=mode, scale_dtype=scale_dtype)
    assert stored.mode == mode and stored.format == format

    table = torch.arange(256, dtype=torch.uint8).view(FORMATS[format].dtype).double()
    table = table[table.isfinite() & (table != -128)]
    possible = table * spread_out(stored.scale.double(), weight.shape)[..., None]
    least = (possible - weight.double()[..., None]).abs().amin(-1)
    error = (stored.codes.double() * spread_out(stored.scale.double(), weight.shape)) - weight
    # The quotient is rounded to float32 first, which can decide for the other side of a tie.
    assert (error.abs() <= least + weight.abs() * 2**-22).all()


@pytest.mark.parametrize("scale_dtype", TYPES)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(
    ("format", "relative", "subnormal"), [("e4m3", 1 / 16, 2**-10), ("e5m2", 1 / 8, 2**-17)]
)
def test_the_error_stays_within_the_rounding_of_the_format(
    format: str, relative: float, subnormal: float, magnitude: float, scale_dtype: torch.dtype
) -> None:
    weight = normal(32, 256) * magnitude
    stored = quantize(weight, format=format, scale_dtype=scale_dtype)
    error = (dequantize(stored) - weight).abs()
    half_step = spread_out(stored.scale.float(), weight.shape) * subnormal
    assert (error <= torch.maximum(weight.abs() * relative, half_step) * 1.001).all()


@pytest.mark.parametrize("scale_dtype", TYPES)
def test_the_error_of_int8_stays_within_half_a_step(scale_dtype: torch.dtype) -> None:
    weight = normal(32, 256)
    stored = quantize(weight, format="int8", scale_dtype=scale_dtype)
    error = (dequantize(stored) - weight).abs()
    assert (error <= spread_out(stored.scale.float(), weight.shape) * 0.5001).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", list(FORMATS))
def test_groups_of_zeros_stay_zeros(format: str, dtype: torch.dtype) -> None:
    weight = normal(4, 128).to(dtype)
    weight[1] = 0
    weight[2, 64:] = 0
    for mode in MODES:
        for scale_dtype in TYPES:
            stored = quantize(weight, format=format, mode=mode, scale_dtype=scale_dtype)
            assert (dequantize(stored)[weight == 0] == 0).all()
    assert not dequantize(quantize(torch.zeros(2, 64, dtype=dtype), format=format)).any()


@pytest.mark.parametrize(
    ("options", "percent"),
    [
        ({}, 2.504),
        ({"scale_dtype": torch.bfloat16}, 2.505),
        ({"mode": "tensor"}, 2.646),
        ({"search": True}, 2.206),
        ({"format": "e5m2"}, 5.001),
        ({"format": "int8"}, 0.594),
    ],
)
def test_errors_of_normal_weights_are_those_that_are_documented(
    options: dict, percent: float
) -> None:
    weight = normal(512, 2048) * 0.02
    assert relative_error(weight, quantize(weight, **options)) * 100 == pytest.approx(
        percent, rel=0.01
    )


def test_scales_in_float16_lose_no_small_weights() -> None:
    for std in (1e-4, 1e-6, 1e-7):
        weight = (normal(64, 256) * std).float()
        stored = quantize(weight, scale_dtype=torch.float16)
        # Their smallest is 6e-8; from 2^-9 of that on weights are rounded to whole steps.
        assert relative_error(weight, stored) < 0.03
        assert relative_error(weight, quantize(weight)) < 0.0255


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", list(FORMATS))
def test_a_search_makes_the_error_of_no_group_larger(format: str, mode: str) -> None:
    weight = normal(8, 256) * torch.logspace(-2, 0, 256)
    plain = quantize(weight, format=format, mode=mode)
    searched = quantize(weight, format=format, mode=mode, search=True)

    def errors(stored: Quantized) -> Tensor:
        squares = (dequantize(stored, torch.float64) - weight.double()).square()
        return {"block": squares.view(8, 4, 64).sum(-1), "channel": squares.sum(1)}.get(
            mode, squares.sum()
        )

    assert (errors(searched) <= errors(plain) * (1 + 1e-6)).all()


# --- the peer's rule


@pytest.mark.parametrize(
    "case", json.loads((DATA / "fp8_quantize.json").read_text()), ids=lambda case: case["key"]
)
def test_codes_and_scales_of_the_peer_are_met_bit_for_bit(case: dict) -> None:
    with safe_open(DATA / "fp8_quantize.safetensors", "pt") as file:
        weight, codes, scale = (
            file.get_tensor(f"{case['key']}.{name}") for name in ("input", "weight", "scale_weight")
        )
    stored = quantize(
        weight,
        format=case["fp8"],
        mode=case["mode"],
        block_size=case["block_size"],
        compat=True,
    )
    assert torch.equal(stored.codes.view(torch.uint8), codes)
    assert list(stored.scale.shape) == case["scale_shape"]
    assert torch.equal(stored.scale.reshape(scale.shape), scale)
    # The reference adds up in float32.
    assert relative_error(weight, stored) == pytest.approx(case["rel_rms_error"], rel=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-5, 1e-7])
def test_compat_follows_the_documented_steps_in_every_type(
    magnitude: float, format: str, dtype: torch.dtype
) -> None:
    weight = (normal(8, 128) * magnitude).to(dtype)
    weight[2] = 0
    weight[3, :64] *= 1e-4
    stored = quantize(weight, format=format, compat=True)
    codes, scale = by_the_book(weight, format, 64)
    assert same_bits(stored.codes, codes)
    assert stored.scale.dtype == dtype and torch.equal(stored.scale, scale)


def test_a_published_example_of_the_peer() -> None:
    weight = torch.sin(torch.arange(256) * 0.1).view(2, 128)
    half = quantize(weight.bfloat16(), compat=True)
    assert half.scale.float().flatten().tolist() == pytest.approx([0.0022277832] * 4, rel=1e-7)
    assert half.codes[0, 1:6].float().tolist() == [44, 88, 128, 176, 208]
    assert half.codes.float().abs().sum() == 72192
    restored = dequantize(half, torch.bfloat16)[0, 1:6].tolist()
    assert restored == [0.09814453125, 0.1962890625, 0.28515625, 0.392578125, 0.462890625]
    whole = quantize(weight, compat=True)
    expected = [0.00223197159, 0.00223212107, 0.00223163934, 0.00223168056]
    assert whole.scale.flatten().tolist() == pytest.approx(expected, rel=1e-8)
    other = quantize(weight.bfloat16(), format="e5m2", compat=True)
    assert other.codes[0, 1:6].float().tolist() == [6144, 12288, 16384, 20480, 28672]


def test_bfloat16_scales_of_a_bfloat16_weight_are_the_peers_without_compat() -> None:
    weight = normal(16, 256).bfloat16()
    plain = quantize(weight, scale_dtype=torch.bfloat16)
    compat = quantize(weight, compat=True)
    assert same_bits(plain.codes, compat.codes) and torch.equal(plain.scale, compat.scale)


def test_compat_leaves_no_choice() -> None:
    weight = normal(2, 64)
    for options in (
        {"search": True},
        {"scale_dtype": torch.float32},
        {"format": "int8"},
    ):
        with pytest.raises(ValueError, match="compat"):
            quantize(weight, compat=True, **options)


# --- shapes


@pytest.mark.parametrize(
    ("shape", "asked", "given"),
    [
        ((4, 128), "block", "block"),
        ((4, 100), "block", "channel"),
        ((4, 100), "channel", "channel"),
        ((4, 128), "tensor", "tensor"),
        ((4,), "block", "tensor"),
        ((4, 3, 2, 2), "channel", "tensor"),
    ],
)
def test_what_does_not_fit_gets_the_next_mode(
    shape: tuple[int, ...], asked: str, given: str
) -> None:
    assert mode_for(shape, asked) == given
    weight = normal(*shape)
    stored = quantize(weight, mode=asked)
    assert stored.mode == given and stored.codes.shape == shape
    assert relative_error(weight, stored) < 0.04
    wanted = {"block": (4, 2, 1), "channel": (4, 1), "tensor": ()}[given]
    assert stored.scale.shape == wanted
    assert stored.block_size == (64 if given == "block" else None)
    assert stored.num_bytes == weight.numel() + 4 * stored.scale.numel()


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_weights_in_several_parts_or_another_order_of_memory_give_the_same(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(37, 192).to(dtype)
    for search in (False, True):
        whole = quantize(weight, mode=mode, search=search)
        transposed = quantize(weight.t().contiguous().t(), mode=mode, search=search)
        with monkeypatch.context() as patch:
            patch.setattr(quantize_module, "_CHUNK_CPU", 500)
            parts = quantize(weight, mode=mode, search=search)
            assert torch.equal(dequantize(parts), dequantize(whole))
        for other in (transposed, parts):
            assert same_bits(other.codes, whole.codes) and torch.equal(other.scale, whole.scale)
    assert relative_error(weight, whole) < 0.03


class Largest(TorchDispatchMode):
    """Notes how many values the largest tensor has that an operation allocates."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.sizes.append(storage.nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_no_more_than_a_part_is_worked_on_at_once(
    mode: str, search: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "_CHUNK_CPU", 1024)
    weight = normal(256, 128).bfloat16()
    with Largest(weight) as largest:
        stored = quantize(weight, mode=mode, search=search)
    # Of the size of the weight there are only the codes.
    assert max(largest.sizes) == weight.numel() == stored.codes.numel()
    rest = [size for size in largest.sizes if size != weight.numel()]
    assert max(rest) <= max(1024, stored.scale.numel())
    with Largest(weight, stored.codes, stored.scale) as largest:
        dequantize(stored, torch.bfloat16)
    assert sorted(set(largest.sizes))[-2] <= 1024


@pytest.mark.parametrize("mode", ["block", "channel"])
def test_rows_can_be_quantized_as_they_come(mode: str) -> None:
    weight = normal(10, 128)
    result = empty(weight.shape, mode=mode)
    for first, end in ((0, 4), (4, 5), (5, 10)):
        quantize_into(result.rows(first, end), weight[first:end])
    whole = quantize(weight, mode=mode)
    assert same_bits(result.codes, whole.codes) and torch.equal(result.scale, whole.scale)


def test_rows_and_columns_are_views_of_their_part() -> None:
    weight = normal(6, 256)
    for mode in MODES:
        stored = quantize(weight, mode=mode)
        whole = dequantize(stored)
        assert torch.equal(dequantize(stored.rows(2, 5)), whole[2:5])
        assert torch.equal(dequantize(stored.columns(64, 192)), whole[:, 64:192])
        assert stored.rows(2, 5).codes.data_ptr() == stored.codes[2].data_ptr()
    with pytest.raises(ValueError, match="cut a block"):
        quantize(weight).columns(10, 64)


@pytest.mark.parametrize("mode", MODES)
def test_empty_is_made_as_quantize_makes_it(mode: str) -> None:
    weight = normal(4, 128)
    for device in ("cpu", "meta"):
        made = empty(weight.shape, mode=mode, scale_dtype=torch.bfloat16, device=device)
        wanted = quantize(weight.to(device), mode=mode, scale_dtype=torch.bfloat16)
        for a, b in ((made.codes, wanted.codes), (made.scale, wanted.scale)):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert (made.mode, made.block_size) == (wanted.mode, wanted.block_size)
    assert dequantize(made, torch.bfloat16).is_meta


# --- what cannot be done


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
def test_values_that_are_not_finite_are_refused(
    dtype: torch.dtype, mode: str, value: float, compat: bool
) -> None:
    weight = normal(4, 128).to(dtype)
    weight[3, 100] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, mode=mode, compat=compat)


def test_a_search_refuses_them_too() -> None:
    for value in (float("nan"), float("inf")):
        weight = normal(4, 128)
        weight[3, 100] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize(weight, search=True)


def test_what_is_in_8_bits_already_is_refused() -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn cannot be quantized"):
        quantize(quantize(normal(4, 64)).codes)
    with pytest.raises(ValueError, match="int64 cannot be quantized"):
        quantize(torch.ones(4, 64, dtype=torch.int64))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="modes are block, channel, tensor"):
        quantize(normal(4, 64), mode="blocks")
    with pytest.raises(ValueError, match="block_size=0"):
        mode_for((4, 64), "block", 0)
    with pytest.raises(ValueError, match="cannot be stored"):
        quantize(normal(4, 64), scale_dtype=torch.float64)


def test_numbers_of_a_file_that_are_not_finite_are_found() -> None:
    stored = quantize(normal(4, 128))
    assert all_finite(stored)
    stored.codes.view(torch.uint8)[2, 7] = 0xFF
    assert not all_finite(stored)
    stored = quantize(normal(4, 128))
    stored.scale[3, 1] = float("inf")
    assert not all_finite(stored)


def test_the_relative_error_is_its_definition() -> None:
    weight = normal(5, 128)
    stored = quantize(weight)
    error = dequantize(stored, torch.float64) - weight.double()
    expected = error.norm() / weight.double().norm()
    assert relative_error(weight, stored) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(torch.zeros(2, 64), quantize(torch.zeros(2, 64))) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", list(FORMATS))
def test_a_gpu_makes_the_same_of_a_weight(format: str, mode: str) -> None:
    weight = normal(64, 256).bfloat16()
    here = quantize(weight, format=format, mode=mode)
    there = quantize(weight.cuda(), format=format, mode=mode)
    assert same_bits(there.codes.cpu(), here.codes)
    assert torch.equal(there.scale.cpu(), here.scale)
    restored = dequantize(there, torch.bfloat16).cpu()
    assert torch.equal(restored, dequantize(here, torch.bfloat16))
