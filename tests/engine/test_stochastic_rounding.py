"""Rounding up or down by chance."""

from __future__ import annotations

import pytest
import torch
from pack.engine import stochastic_rounding
from pack.engine.quantize import Quantized, dequantize, quantize
from pack.engine.stochastic_rounding import round_stochastically
from torch import Tensor

FORMATS = ("e4m3", "e5m2", "int8")
# All codes of a format, as values.
VALUES: dict[str, Tensor] = {
    "e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
    "e5m2": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).float(),
    "int8": torch.arange(-127, 128).float(),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(values: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """The next codes below and above, found by a search among all."""
    codes = VALUES[format]
    codes = codes[codes.isfinite()].unique().sort().values
    above = torch.searchsorted(codes, values.contiguous()).clamp(max=len(codes) - 1)
    exact = codes[above] == values
    return codes[(above - (~exact).long()).clamp(min=0)], codes[above]


def with_scale_one(values: Tensor, format: str) -> Quantized:
    made = quantize(torch.zeros_like(values), format=format, mode="tensor")
    return Quantized(made.codes, torch.ones(()), "tensor")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("magnitude", [2.0**-16, 2.0**-8, 0.1, 30.0])
def test_a_value_goes_to_one_of_its_two_neighbours(format: str, magnitude: float) -> None:
    values = torch.randn(64, 256, generator=generator()) * magnitude
    quantized = with_scale_one(values, format)

    round_stochastically(quantized, values, generator=generator(1))
    found, (below, above) = quantized.codes.float(), neighbours(values, format)

    assert ((found == below) | (found == above)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_mean_of_many_draws_is_the_value(format: str) -> None:
    values = torch.randn(24, generator=generator()) * torch.logspace(-8, 2, 24, base=2)
    values = values.unsqueeze(1).expand(24, 40_000)
    quantized = with_scale_one(values, format)

    round_stochastically(quantized, values, generator=generator(2))
    below, above = neighbours(values[:, 0], format)
    mean = quantized.codes.double().mean(1)

    # A draw of two values has a standard deviation of at most half their distance.
    assert ((mean - values[:, 0]).abs() <= 5 * (above - below) / 2 / 40_000**0.5 + 1e-9).all()


@pytest.mark.parametrize("format", FORMATS)
def test_codes_stay_what_they_are(format: str) -> None:
    values = VALUES[format][VALUES[format].isfinite()].unsqueeze(0)
    quantized = with_scale_one(values, format)

    round_stochastically(quantized, values, generator=generator(3))

    assert torch.equal(quantized.codes.float(), values)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["block", "channel", "tensor"])
def test_a_small_change_of_a_weight_in_8_bits_survives(format: str, mode: str) -> None:
    base = dequantize(quantize(torch.randn(256, 256, generator=generator()), format=format))
    down = torch.randn(1, 256, generator=generator(2))
    change = torch.randn(256, 1, generator=generator(1)) @ down * 2e-3
    kept = {}
    for stochastic in (False, True):
        quantized = quantize(base + change, format=format, mode=mode)
        if stochastic:
            round_stochastically(quantized, base + change, generator=generator(4))
        found = dequantize(quantized) - base
        kept[stochastic] = float((found * change).sum() / change.square().sum())

    # The part of the change that is still there: all of it, within the noise of 65,536 weights.
    assert abs(kept[True] - 1) < 0.5
    assert mode != "block" or kept[False] < 0.5


def test_a_seed_gives_the_same_codes_again() -> None:
    weight = torch.randn(48, 128, generator=generator())
    first, second, third = (quantize(weight) for _ in range(3))

    round_stochastically(first, weight, generator=generator(5))
    round_stochastically(second, weight, generator=generator(5))
    round_stochastically(third, weight, generator=generator(6))

    assert torch.equal(first.codes.view(torch.uint8), second.codes.view(torch.uint8))
    assert not torch.equal(first.codes.view(torch.uint8), third.codes.view(torch.uint8))
    assert torch.equal(first.scale, quantize(weight).scale)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros_and_rows_need_not_fill_a_piece(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stochastic_rounding, "_CHUNK", 300)
    weight = torch.randn(7, 128, generator=generator())
    weight[3] = 0
    quantized = quantize(weight, format=format)

    round_stochastically(quantized, weight, generator=generator(7))
    error = (dequantize(quantized) - weight).abs()

    assert not dequantize(quantized)[3].any()
    # A whole step, where rounding to nearest makes half a step.
    step = {"e4m3": 2**-3, "e5m2": 2**-2, "int8": 0.0}[format]
    blocks_ONK = weight.unflatten(1, (-1, 64)).abs()
    smallest = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "int8": 1.0}[format]
    bound = torch.maximum(blocks_ONK * step, quantized.scale * smallest) * 1.001
    assert (error.unflatten(1, (-1, 64)) <= bound).all()
