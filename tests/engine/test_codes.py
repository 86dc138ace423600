from __future__ import annotations

import pytest
import torch
from pack.engine import codes as codes_module
from pack.engine.codes import FORMATS, are_finite, decode, encode, format_of
from pack.engine.workspace import Workspace

FORMAT_NAMES = list(FORMATS)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def every_finite_code(format: str) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[format].dtype)
    return codes[codes.double().isfinite()].view(2, -1)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_the_largest_value_is_that_of_the_type(format: str) -> None:
    dtype = FORMATS[format].dtype
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    assert FORMATS[format].largest == info.max


@pytest.mark.parametrize("out_dtype", TYPES)
@pytest.mark.parametrize("scale_dtype", TYPES)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_every_code_times_its_scale_is_rounded_once(
    format: str, scale_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    codes = every_finite_code(format)
    # The last is too large for what the fast way folds into it.
    for value in (1.0, 3.1e-3, 7e-5, 117.0, 300.0):
        scale = torch.tensor([[value], [value * 1.37]]).to(scale_dtype)
        out = torch.empty(codes.shape, dtype=out_dtype)
        decode(codes, scale, out, Workspace())
        # PyTorch converts codes one by one; a product of two short numbers is exact in float64.
        exact_in_float32 = (codes.double() * scale.double()).to(torch.float32)
        assert torch.equal(out, exact_in_float32.to(out_dtype))


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("out_dtype", TYPES)
def test_decoding_for_any_device_and_for_the_cpu_give_the_same(
    format: str, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = every_finite_code(format)
    scale = torch.tensor([[0.0123], [0.0456]])
    out = torch.empty(codes.shape, dtype=out_dtype)
    decode(codes, scale, out, Workspace())
    general = torch.empty_like(out)
    monkeypatch.setattr(codes_module, "_OWN_CONVERSION", ())
    decode(codes, scale, general, Workspace())
    assert torch.equal(out, general)


def test_columns_of_a_larger_matrix_can_be_decoded() -> None:
    codes = (torch.randn(3, 8) * 100).to(torch.float8_e4m3fn)
    out = torch.empty(3, 4)
    decode(codes[:, 4:], torch.tensor(0.5), out, Workspace())
    assert torch.equal(out, codes.float()[:, 4:] / 2)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1.0625, 1.0), (1.1875, 1.25), (17.0, 16.0), (19.0, 20.0), (2**-10, 0.0), (449.75, 448.0)],
)
def test_halfway_values_become_even_codes(value: float, rounded: float) -> None:
    codes = torch.empty(2, dtype=torch.float8_e4m3fn)
    encode(torch.tensor([value, -value]), codes)
    assert codes.tolist() == [rounded, -rounded]


def test_int8_is_rounded_not_cut_off() -> None:
    codes = torch.empty(6, dtype=torch.int8)
    encode(torch.tensor([0.5, 1.5, -1.6, 126.9, 127.4, -127.4]), codes)
    assert codes.tolist() == [0, 2, -2, 127, 127, -127]


def test_codes_that_are_no_finite_number_are_found() -> None:
    for format in FORMAT_NAMES:
        assert are_finite(every_finite_code(format))
    for dtype, values in (
        (torch.float8_e4m3fn, [float("nan")]),
        (torch.float8_e5m2, [float("nan"), float("inf"), -float("inf")]),
    ):
        for value in values:
            assert not are_finite(torch.tensor([1.0, value]).to(dtype))


def test_other_types_have_no_format() -> None:
    with pytest.raises(ValueError, match="uint8"):
        format_of(torch.zeros(1, dtype=torch.uint8))
