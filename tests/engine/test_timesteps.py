"""Times of uniform draws; ``data/timestep_quantiles.json`` holds what another trainer drew."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.engine.timesteps import (
    CHOICES,
    QINGLONG_PARTS,
    TimestepSettings,
    sample_times,
    stratified_draws,
)
from pack.tests.conftest import ROOT
from torch import Tensor

SIZE = (128, 96)
STYLE = TimestepSettings(logit_mean=-6.0, logit_std=2.0, shift=3.0)
CASES = json.loads((ROOT / "tests/data/timestep_quantiles.json").read_text())

# Times in 1000ths for uniform draws 0.1, 0.25, 0.5, 0.75, 0.9, as published trainers compute them
# for latents of 128x128; theirs are larger by 1.
KNOWN = {
    "uniform": [100, 250, 500, 750, 900],
    "sigmoid": [217.2862, 337.4922, 500, 662.5077, 782.7137],
    "shift": [454.3923, 604.4694, 750, 854.8429, 915.3021],
    "flux_shift": [467.1594, 616.6871, 759.5109, 861.1039, 919.2019],
}


def even(count: int) -> Tensor:
    """Draws that stand for equal parts of [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def as_settings(given: dict[str, Any]) -> TimestepSettings:
    return TimestepSettings(
        scale=given.get("sigmoid_scale", 1.0),
        shift=given.get("discrete_flow_shift", 1.0),
        logit_mean=given.get("logit_mean", 0.0),
        logit_std=given.get("logit_std", 1.0),
        weighting=given.get("weighting_scheme", "none"),
        low=given.get("min_timestep", 0) / 1000,
        high=given.get("max_timestep", 1000) / 1000,
        keep_shape=given.get("preserve_distribution_shape", False),
    )


@pytest.mark.parametrize("name", KNOWN)
def test_times_of_known_draws(name: str) -> None:
    draws = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    times = sample_times(name, draws, STYLE, latent_size=(128, 128))
    torch.testing.assert_close(times * 1000, torch.tensor(KNOWN[name]).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: " ".join(map(str, case["settings"].values()))
)
def test_quantiles_are_those_of_another_trainer_within_its_sampling_error(
    case: dict[str, Any],
) -> None:
    name, settings = case["settings"]["timestep_sampling"], as_settings(case["settings"])
    levels = torch.arange(1, 100, dtype=torch.float64) / 100
    # The share of our times below each of its quantiles; a share of n draws has this deviation.
    times = sample_times(name, even(200_000), settings, latent_size=case["latent_size"])
    quantiles = torch.tensor(case["quantiles"], dtype=torch.float64)
    share = torch.searchsorted(times.double(), quantiles) / len(times)
    deviation = (levels * (1 - levels) / case["draws"]).sqrt()
    # Its "sigma" draws are rounded up to thousandths.
    rounding = 2e-3 if name == "sigma" else 0.0
    assert ((share - levels).abs() <= 4 * deviation + rounding).all()


@given(
    name=st.sampled_from(list(CHOICES)),
    bounds=st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted),
    keep_shape=st.booleans(),
    weighting=st.sampled_from(["none", "logit_normal", "mode"]),
    mean=st.floats(-8, 8),
    std=st.floats(0.1, 4),
)
def test_no_draw_ever_gives_a_time_outside_the_range(
    name: str, bounds: list[int], keep_shape: bool, weighting: str, mean: float, std: float
) -> None:
    low, high = (bound / 1000 for bound in bounds)
    settings = TimestepSettings(
        logit_mean=mean,
        logit_std=std,
        weighting=weighting,
        low=low,
        high=high,
        keep_shape=keep_shape,
    )
    draws = torch.tensor(
        [0.0, 1e-300, 1e-9, 0.3, 0.5, 0.8, 0.9, 1 - 1e-16, 1.0], dtype=torch.float64
    )
    try:
        times = sample_times(name, draws, settings, latent_size=SIZE)
    except ValueError as error:
        assert keep_shape and "has no times between" in str(error)
        return
    assert times.isfinite().all()
    assert ((times >= torch.tensor(low).float()) & (times <= torch.tensor(high).float())).all()


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.8), (0.0, 0.5), (0.9, 0.95), (0.5, 1.0)])
def test_a_range_is_cut_out_of_the_distribution_exactly(name: str, low: float, high: float) -> None:
    style = STYLE._replace(logit_mean=-2.0)  # so that there are many times in every range
    whole = sample_times(name, even(1_000_000), style, latent_size=SIZE)
    inside, _ = whole[(whole >= low) & (whole <= high)].sort()
    cut = style._replace(low=low, high=high, keep_shape=True)
    times, _ = sample_times(name, even(100_000), cut, latent_size=SIZE).sort()
    levels = torch.linspace(0.001, 0.999, 500)
    expected = inside[(levels * (len(inside) - 1)).round().long()]
    found = times[(levels * (len(times) - 1)).round().long()]
    # The step from one quantile of the million to the next, where they are sparse.
    assert (found - expected).abs().max() < 1e-3


def test_a_range_far_in_the_tail_is_still_exact() -> None:
    """Of logit(t) ~ N(0, 1) what lies beyond 0.999 is nearly exponential there."""
    tail = TimestepSettings(low=0.999, high=1.0, keep_shape=True)
    times = sample_times("sigmoid", even(100_000), tail, latent_size=SIZE).double()
    beyond = torch.logit(times) - torch.logit(torch.tensor(0.999, dtype=torch.float64))
    z = torch.logit(torch.tensor(0.999, dtype=torch.float64)).item()
    # The mean excess of a normal tail: 1/z - 2/z^3 + 10/z^5 - 74/z^7 ...
    assert beyond.mean().item() == pytest.approx(1 / z - 2 / z**3 + 10 / z**5, rel=5e-3)


def test_without_the_shape_all_of_it_is_squeezed_into_the_range() -> None:
    draws = even(1000)
    whole = sample_times("sigmoid", draws, STYLE, latent_size=SIZE)
    part = sample_times("sigmoid", draws, STYLE._replace(low=0.5, high=0.75), latent_size=SIZE)
    torch.testing.assert_close(part, 0.5 + 0.25 * whole)


def test_a_range_that_a_distribution_never_reaches_is_an_error() -> None:
    settings = TimestepSettings(scale=0.01, low=0.9, high=1.0, keep_shape=True)
    with pytest.raises(ValueError, match=r"sigmoid has no times between 0\.9 and 1"):
        sample_times("sigmoid", even(10), settings, latent_size=SIZE)


@pytest.mark.parametrize("name", ["qinglong_flux", "qinglong_qwen"])
def test_the_parts_of_a_mixture_come_as_often_as_they_should(name: str) -> None:
    count = 100_000
    times = sample_times(name, even(count), STYLE, latent_size=SIZE)
    edges = [0, round(QINGLONG_PARTS[0] * count), round(sum(QINGLONG_PARTS[:2]) * count), count]
    stable = sample_times(
        name.replace("qinglong_", "") + "_shift", even(count), STYLE, latent_size=SIZE
    )
    assert times[: edges[1]].median() == pytest.approx(stable.median().item(), abs=1e-4)
    style = times[edges[1] : edges[2]].median().item()
    assert style == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item(), abs=1e-4)
    detail = times[edges[2] :].median().item()
    assert detail == pytest.approx(torch.sigmoid(torch.tensor(-2.68)).item(), abs=1e-4)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_stays_increasing_over_its_whole_range_of_scales(scale: float) -> None:
    settings = TimestepSettings(weighting="mode", mode_scale=scale)
    times = sample_times("sigma", even(10_000), settings, latent_size=SIZE)
    assert (times.diff() >= 0).all() and times[0] < 1e-3 and times[-1] > 1 - 1e-3


def test_a_hundred_thousand_draws_take_little_more_than_their_normal_quantiles() -> None:
    """3 ms where those take 1 to 2 ms; told as a ratio, because machines differ."""
    draws = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def fastest(run: Any) -> float:
        times: list[float] = []
        for _ in range(15):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    base = fastest(lambda: torch.special.ndtri(draws * 0.1))
    for name in CHOICES:
        for settings in (STYLE, STYLE._replace(low=0.9, high=0.95, keep_shape=True)):
            taken = fastest(lambda: sample_times(name, draws, settings, latent_size=SIZE))  # noqa: B023
            assert taken < 3 * base, (name, taken / base)


@pytest.mark.parametrize(("count", "strata"), [(20, 5), (23, 5), (3, 10), (1000, 7)])
def test_every_stratum_has_equally_many_draws(count: int, strata: int) -> None:
    draws = stratified_draws(
        count, num_strata=strata, generator=torch.Generator().manual_seed(count)
    )
    assert draws.shape == (count,) and (draws >= 0).all() and (draws < 1).all()
    numbers = torch.bincount((draws * strata).long(), minlength=strata)
    assert numbers.max() - numbers.min() <= 1


def test_stratified_draws_are_uniform_and_in_random_order() -> None:
    draws = stratified_draws(100_000, num_strata=10, generator=torch.Generator().manual_seed(0))
    assert (draws.sort().values - even(100_000)).abs().max() < 5e-3
    first, second = draws[:-1] - 0.5, draws[1:] - 0.5
    assert ((first * second).mean() / draws.var()).abs() < 0.01  # neighbours are independent


def test_strata_are_equal_parts_of_any_distribution_also_of_a_part_of_it() -> None:
    settings = STYLE._replace(low=0.3, high=0.9, keep_shape=True)
    edges = sample_times("logsnr", torch.linspace(0, 1, 6).double(), settings, latent_size=SIZE)
    draws = stratified_draws(500, num_strata=5, generator=torch.Generator().manual_seed(1))
    times = sample_times("logsnr", draws, settings, latent_size=SIZE)
    numbers = torch.bincount(torch.bucketize(times, edges[1:-1]), minlength=5)
    assert numbers.tolist() == [100] * 5
