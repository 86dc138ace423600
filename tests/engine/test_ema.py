"""Tests of the averages of checkpoints."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pack.engine import ema
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data" / "post_hoc_ema"
# Of the published tool.
GAMMAS = {0.05: 16.9722, 0.10: 6.9372, 0.15: 3.55787, 0.20: 1.82621, 0.25: 0.71982, 0.28: 0.16934}


def recurrence(values: list[float], betas: list[float]) -> float:
    """The definition, in plain numbers."""
    mean = values[0]
    for value, beta in zip(values[1:], betas, strict=True):
        mean = beta * mean + (1 - beta) * value
    return mean


# Exponents


@pytest.mark.parametrize(("sigma_rel", "gamma"), GAMMAS.items())
def test_gamma_is_that_of_the_published_tool(sigma_rel: float, gamma: float) -> None:
    assert ema.gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-5)


@pytest.mark.parametrize("sigma_rel", [1e-6, 1e-3, 0.01, 0.1, 0.2, 0.288, ema.WIDEST_SIGMA_REL])
def test_the_profile_has_the_width_that_was_asked_for(sigma_rel: float) -> None:
    gamma = ema.gamma_of(sigma_rel)
    # Equation 123: the standard deviation of the density (g + 1) t^g on [0, 1].
    width = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
    assert gamma >= 0 and width == pytest.approx(sigma_rel, rel=1e-9)


def test_the_standard_deviation_of_the_weights_is_sigma_rel() -> None:
    sigma_rel, count = 0.15, 20_000
    weights = ema.weights_of(ema.step_betas(range(1, count + 1), gamma=ema.gamma_of(sigma_rel)))
    times = (np.arange(count) + 0.5) / count
    mean = np.dot(weights, times)
    assert math.sqrt(np.dot(weights, (times - mean) ** 2)) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, 0.5, math.nan, math.inf, 1e-200])
def test_a_width_that_no_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="sigma_rel"):
        ema.gamma_of(sigma_rel)


# Betas


def test_power_betas_are_those_of_the_published_tool() -> None:
    found = ema.power_betas(6, gamma=ema.gamma_of(0.2))
    assert found == pytest.approx([0, 0.1410, 0.31793, 0.4435, 0.53224], abs=5e-5)


def test_a_constant_beta_and_a_line_of_betas() -> None:
    assert ema.betas(4, beta=0.9) == [0.9, 0.9, 0.9]
    assert ema.betas(4, beta=0.9, beta2=0.95) == pytest.approx([0.9, 0.925, 0.95])
    assert ema.betas(2, beta=0.9, beta2=0.95) == [0.9]


# Weights


@pytest.mark.parametrize(
    ("betas", "expected"),
    [([0.9, 0.9], 0.29), (ema.power_betas(3, gamma=ema.gamma_of(0.2)), 1.858998)],
)
def test_zero_one_two_average_as_in_the_published_tool(betas: list[float], expected: float) -> None:
    assert np.dot(ema.weights_of(betas), [0, 1, 2]) == pytest.approx(expected, abs=1e-6)


def test_weights_are_what_the_recurrence_gives_each_checkpoint() -> None:
    generator = torch.Generator().manual_seed(0)
    betas = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
    weights = ema.weights_of(betas)
    for index, weight in enumerate(weights):
        unit = [float(other == index) for other in range(13)]
        assert weight == pytest.approx(recurrence(unit, betas), rel=1e-12)
    assert math.fsum(weights) == pytest.approx(1, rel=1e-14)


def test_the_usual_count_is_that_of_all_but_the_oldest() -> None:
    usual = ema.weights_of(ema.power_betas(7, gamma=2.0))
    rest = ema.weights_of(ema.power_betas(6, gamma=2.0, keep_first=True))
    assert usual[0] == 0 and usual[1:] == pytest.approx(rest)


def test_equal_steps_weigh_as_the_count_of_all_checkpoints() -> None:
    by_steps = ema.weights_of(ema.step_betas([50, 100, 150, 200], gamma=3.0))
    by_count = ema.weights_of(ema.power_betas(4, gamma=3.0, keep_first=True))
    assert by_steps == pytest.approx(by_count)


def test_weights_by_steps_are_integrals_of_the_power_function() -> None:
    steps, gamma = [100, 150, 400, 1000], 1.5
    weights = ema.weights_of(ema.step_betas(steps, gamma=gamma))
    for weight, (start, end) in zip(weights, pairwise([0, *steps]), strict=True):
        middles = start + (np.arange(20_000) + 0.5) * (end - start) / 20_000
        integral = np.mean(middles**gamma) * (end - start) * (gamma + 1) / 1000 ** (gamma + 1)
        assert weight == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize("steps", [[0, 5], [5, 5], [9, 4]])
def test_steps_that_do_not_increase_are_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="increase"):
        ema.step_betas(steps, gamma=1.0)


def test_the_effective_number_is_that_of_equal_weights() -> None:
    assert ema.effective_number([0.25] * 4) == pytest.approx(4)
    assert ema.effective_number([0, 1, 0]) == pytest.approx(1)


# Sums


def test_a_sum_of_half_precision_is_made_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(64, generator=generator).bfloat16() for _ in range(9)]
    weights = ema.weights_of(ema.betas(9, beta=0.7))
    total = ema.weighted_sum(iter(tensors), weights)
    exact = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert total.dtype == torch.float32
    # Nine products and sums of values below 4, each rounded to 2^-24 of its size.
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=4 * 18 * 2**-24)


def test_a_sum_takes_the_widest_type_and_leaves_its_parts_alone() -> None:
    parts = [torch.ones(2), torch.full((2,), 3.0, dtype=torch.float64)]
    total = ema.weighted_sum(parts, [0.5, 0.5])
    assert total.dtype == torch.float64 and total.tolist() == [2, 2]
    assert parts[0].tolist() == [1, 1]


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        ema.weighted_sum([], [])


# Files of the published tool


@pytest.mark.parametrize("name", ["merged_beta", "merged_sigma02"])
def test_the_mean_is_that_of_the_published_tool(name: str) -> None:
    settings = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    expected = load_file(DATA / f"{name}.safetensors")
    files = [load_file(DATA / f"step{index}.safetensors") for index in range(6)]
    if settings["sigma_rel"]:
        betas = ema.power_betas(6, gamma=ema.gamma_of(settings["sigma_rel"]))
    else:
        betas = ema.betas(6, beta=settings["beta1"], beta2=settings["beta2"])
    for key, tensor in expected.items():
        found = ema.weighted_sum([file[key] for file in files], ema.weights_of(betas))
        torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)
