from __future__ import annotations

import math

import pytest
import torch
from pack.engine.flow import sampling_times
from pack.engine.samplers import euler


def test_a_straight_path_is_followed_exactly_in_one_step() -> None:
    data, noise = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    result = euler(lambda latents, t: noise - data, noise, [1.0, 0.0])
    torch.testing.assert_close(result, data)


def test_the_error_halves_when_the_steps_double() -> None:
    def solve(num_steps: int) -> float:
        times = torch.linspace(1, 0, num_steps + 1).tolist()
        start = torch.tensor([math.e], dtype=torch.float64)
        return abs(euler(lambda latents, t: latents, start, times).item() - 1.0)

    assert solve(100) / solve(200) == pytest.approx(2, rel=0.02)


def test_the_model_is_called_at_every_time_but_the_last() -> None:
    seen: list[float] = []
    done: list[int] = []

    def velocity(latents: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(latents)

    times = sampling_times(5, 2.0)
    euler(velocity, torch.zeros(1), times, lambda step, latents: done.append(step))
    assert seen == times[:-1]
    assert done == [1, 2, 3, 4, 5]
