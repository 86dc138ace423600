from __future__ import annotations

import pytest
import torch
from pack.engine.timesteps import SAMPLERS, logit_normal

ARGUMENTS = {"scale": 1.0, "fixed_shift": 3.0, "resolution_shift": 3.15819}

# Times in 1000ths for uniform draws 0.1, 0.25, 0.5, 0.75, 0.9, as published trainers compute them.
KNOWN = {
    "uniform": [100, 250, 500, 750, 900],
    "sigmoid": [217.2862, 337.4922, 500, 662.5077, 782.7137],
    "shift": [454.3923, 604.4694, 750, 854.8429, 915.3021],
    "flux_shift": [467.1594, 616.6871, 759.5109, 861.1039, 919.2019],
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_of_known_draws(name: str) -> None:
    draws = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    times = SAMPLERS[name](draws, **ARGUMENTS)
    torch.testing.assert_close(times * 1000, torch.tensor(KNOWN[name]).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_draw_gives_a_time_between_zero_and_one(name: str) -> None:
    draws = torch.tensor([0.0, 1e-30, 0.5, 1 - 1e-7, 1.0])
    times = SAMPLERS[name](draws, **ARGUMENTS)
    assert ((times >= 0) & (times <= 1)).all()
    assert (times.diff() >= 0).all()


def test_the_logit_of_sigmoid_times_is_normal() -> None:
    draws = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = torch.logit(logit_normal(draws, scale=1.5))
    assert logits.mean().item() == pytest.approx(0, abs=1e-6)
    assert logits.std().item() == pytest.approx(1.5, rel=1e-3)
