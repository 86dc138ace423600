from __future__ import annotations

import math

import pytest
import torch
from pack.engine.flow import (
    LOSS_WEIGHTS,
    linear_shift,
    noisy_latents,
    sampling_times,
    shift_time,
    velocity_target,
)


def test_time_zero_is_data_and_time_one_is_noise() -> None:
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mixed = noisy_latents(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], latents[0])
    assert torch.equal(mixed[1], noise[1])


def test_the_target_is_the_derivative_of_the_mixture() -> None:
    latents, noise = torch.randn(1, 5).double(), torch.randn(1, 5).double()
    low, high = torch.tensor([0.3]).double(), torch.tensor([0.7]).double()
    slope = (noisy_latents(latents, noise, high) - noisy_latents(latents, noise, low)) / 0.4
    torch.testing.assert_close(velocity_target(latents, noise), slope)


def test_a_shift_keeps_the_ends_and_is_undone_by_its_inverse() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert shifted[5] == pytest.approx(0.75)
    torch.testing.assert_close(shift_time(shifted, 1 / 3), t)


@pytest.mark.parametrize(
    ("tokens", "mu", "shift"),
    [(32 * 32, 0.63, 1.87761), (64 * 64, 1.15, 3.15819), (45 * 80, 1.06604, 2.90386)],
)
def test_the_shift_of_a_resolution_is_the_published_line(
    tokens: int, mu: float, shift: float
) -> None:
    found = linear_shift(tokens, first=(256, 0.5), second=(4096, 1.15))
    assert found == pytest.approx(shift, abs=1e-5)
    assert math.log(found) == pytest.approx(mu, abs=1e-5)


def test_sampling_times_fall_from_one_to_zero() -> None:
    times = sampling_times(4, 3.0)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_the_weights_of_the_loss_are_the_published_ones() -> None:
    t_B = torch.tensor([1e-4, 0.25, 0.5, 1.0])
    cosmap = [2 / (math.pi * (1 - 2 * t + 2 * t * t)) for t in t_B.tolist()]
    torch.testing.assert_close(LOSS_WEIGHTS["cosmap"](t_B), torch.tensor(cosmap))
    squares = torch.tensor([1e6, 16.0, 4.0, 1.0])  # the smallest step of 1000 bounds it
    torch.testing.assert_close(LOSS_WEIGHTS["sigma_sqrt"](t_B), squares)
