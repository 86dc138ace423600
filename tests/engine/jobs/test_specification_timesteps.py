"""What the specification says of timesteps, against closed forms of its own distributions.

Noise levels are shares of noise: 1 is pure noise. ``Phi`` is the standard normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from pack.engine.architectures import ARCHITECTURES
from pack.engine.dataset import CachedItem
from pack.engine.events import Event, Message
from pack.engine.jobs import show
from pack.engine.jobs.plan import TimeDraws, batches_to_come, plan_run
from pack.engine.jobs.times import sample_times
from pack.engine.timesteps import CHOICES
from pack.tests.engine.jobs.test_show import shares
from pack.tests.engine.specification_examples import settings_of
from torch import Tensor

FLUX = ARCHITECTURES["flux_kontext"]
SIDE = 128  # latents of 1024 pixels, 4096 tokens
# ln of the shift at 4096 tokens: on the line from 0.5 at 256 to 1.15 at 4096, or to 0.9 at 8192.
MU = {"flux": 1.15, "qwen": 0.5 + 0.4 * (4096 - 256) / (8192 - 256)}
Phi = NormalDist().cdf


def even(count: int) -> Tensor:
    """Draws that stand for equal parts of [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def times(command: str, draws: Tensor) -> Tensor:
    """The noise levels that a run with these options trains."""
    sample = sample_times(settings_of(command).timesteps, FLUX)
    return sample(draws, SIDE, SIDE).double()


def logit(t: float) -> float:
    return math.log(t / (1 - t))


# Style-friendly sampling

LOGSNR = "--timestep_sampling logsnr --logit_mean -6.0 --logit_std"


@pytest.mark.parametrize("std", [2.0, 3.0])
def test_the_log_snr_is_normal_with_the_given_mean_and_deviation(std: float) -> None:
    """Signal is ``1 - t``, noise is ``t``, and the ratio is one of their squares."""
    t, _ = times(f"{LOGSNR} {std}", even(100_000)).sort()
    log_snr = ((1 - t) ** 2 / t**2).log().flip(0)
    levels = [level / 100 for level in range(1, 100)]
    expected = [NormalDist(-6, std).inv_cdf(level) for level in levels]
    found = [log_snr[round(level * 100_000)].item() for level in levels]
    # Half a draw is 5e-6 of the distribution, whose density is at least 0.027 / 3 between these
    # levels; and times are float32, which is 2^-25 / (1 - t) of 1 - t.
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_low_mean_trains_high_noise() -> None:
    t = times(f"{LOGSNR} 2.0", even(100_000))
    more_noise_than_signal = (t > 0.5).double().mean().item()
    assert more_noise_than_signal == pytest.approx(Phi(3), abs=2e-5)  # a log ratio below 0


def hybrid(mu: float) -> Callable[[float], float]:
    """The share of noise levels below ``t``: 80 % shifted, 7.5 % style, 12.5 % detail.

    Half the negative log ratio is the logit of the noise level.
    """

    def below(t: float) -> float:
        parts = ((0.8, mu, 1.0), (0.075, 6 / 2, 2 / 2), (0.125, -5.36 / 2, 1 / 2))
        return sum(share * Phi((logit(t) - mean) / std) for share, mean, std in parts)

    return below


@pytest.mark.parametrize("family", MU)
def test_a_hybrid_is_made_of_three_samplers_at_their_shares(family: str) -> None:
    command = f"--timestep_sampling qinglong_{family} --logit_mean -6.0 --logit_std 2.0"
    t, below = times(command, even(100_000)), hybrid(MU[family])
    for edge in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        # Each part has a whole number of the draws.
        assert (t < edge).double().mean().item() == pytest.approx(below(edge), abs=3e-5)


def test_a_hybrid_chooses_for_each_sample_of_a_batch() -> None:
    """Not for each batch: the parts come in a single large one as often as they should."""
    command = "--timestep_sampling qinglong_flux --logit_mean -6.0 --logit_std 2.0"
    config, count = settings_of(f"{command} --batch_size 4000"), 4000
    data = items(count)
    draw = TimeDraws(config, data, plan_run(config, data, num_processes=1, start=0))
    t, below = times(command, draw(0, count)), hybrid(MU["flux"])
    for edge in (0.15, 0.5, 0.9):
        deviation = math.sqrt(below(edge) * (1 - below(edge)) / count)
        assert (t < edge).double().mean().item() == pytest.approx(below(edge), abs=5 * deviation)


# The range

RANGES = [
    ("--min_timestep 500 --max_timestep 1000", 0.5, 1.0),
    ("--min_timestep 0 --max_timestep 500", 0.0, 0.5),
    ("--min_timestep 200 --max_timestep 800 --preserve_distribution_shape", 0.2, 0.8),
]


@pytest.mark.parametrize(("command", "low", "high"), RANGES, ids=[text for text, *_ in RANGES])
@pytest.mark.parametrize("mode", CHOICES)
def test_a_range_means_the_same_in_every_mode(
    mode: str, command: str, low: float, high: float
) -> None:
    """It counts noise: 1000 is pure noise. "sigma" is not mirrored."""
    t = times(f"--timestep_sampling {mode} {command}", even(20_000))
    assert t.min() >= low and t.max() <= high
    if mode in ("uniform", "sigma"):
        assert t.mean().item() == pytest.approx((low + high) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("", None),
        ("--min_timestep 500 --max_timestep 1000", False),
        ("--min_timestep 500 --max_timestep 1000 --preserve_distribution_shape", True),
    ],
)
def test_the_three_distributions_with_a_shift_of_3_are_shown(
    command: str, kept: bool | None
) -> None:
    """The logit of a noise level is normal around ln 3."""

    def below(t: float) -> float:
        if t in (0, 1):
            return t
        return Phi(logit(t) - math.log(3))

    def expected(start: float, end: float) -> float:
        if kept is None:
            return below(end) - below(start)
        if kept:
            return (below(end) - below(start)) / (1 - below(0.5))
        return below(2 * end - 1) - below(2 * start - 1)

    config = settings_of(
        "--show_timesteps console --architecture flux_kontext --timestep_sampling shift "
        f"--discrete_flow_shift 3.0 {command}"
    )
    events: list[Event] = []
    assert show.run(config, events.append)
    message = events[0]
    assert isinstance(message, Message)
    found = shares(message.text.splitlines())
    assert len(found) == 20 and min(found)[0] == (0 if kept is None else 500)
    for (start, end), share in found.items():
        # Half of the last digit that is shown, and a draw of 100,000 at either end.
        wanted = expected(start / 1000, end / 1000)
        assert share == pytest.approx(wanted, abs=5e-5 + 2e-5)


# Timestep buckets


def items(count: int) -> list[CachedItem]:
    shapes = (("latents", (16, 1, SIDE, SIDE)),)
    return [CachedItem(Path(str(n)), Path(str(n)), shapes, 1, str(n)) for n in range(count)]


def epochs(command: str, count: int, num_epochs: int) -> list[Tensor]:
    """The noise levels of each epoch of a run with ``count`` items, in batches of three."""
    config = settings_of(f"{command} --batch_size 3 --max_train_epochs {num_epochs}")
    data = items(count)
    plan = plan_run(config, data, num_processes=1, start=0)
    draw = TimeDraws(config, data, plan)
    found: list[list[Tensor]] = [[] for _ in range(num_epochs)]
    for index, batch in batches_to_come(config, data, plan, process_index=0, num_processes=1):
        found[index // plan.batches_per_epoch].append(times(command, draw(index, len(batch))))
    return [torch.cat(batches) for batches in found]


def test_every_epoch_fills_five_buckets_evenly() -> None:
    """The example: 20 items, four in each of [0, 0.2] ... [0.8, 1]."""
    found = epochs("--timestep_sampling uniform --num_timestep_buckets 5", 20, 3)
    for t in found:
        assert torch.bincount((t * 5).long(), minlength=5).tolist() == [4] * 5
        assert (t.diff() < 0).any()  # the order is no order of buckets
    assert len({tuple(t.tolist()) for t in found}) == 3  # filled anew in each


def test_without_buckets_an_epoch_is_not_filled_evenly() -> None:
    """That would be a chance of 20! / (4!^5 5^20), 0.3 %, in each."""
    found = epochs("--timestep_sampling uniform", 20, 8)
    uneven = [torch.bincount((t * 5).long(), minlength=5).tolist() != [4] * 5 for t in found]
    assert sum(uneven) >= 7


def test_one_bucket_is_none() -> None:
    uniform = "--timestep_sampling uniform"
    without, one, two = (
        torch.cat(epochs(f"{uniform} {buckets}", 10, 2))
        for buckets in ("", "--num_timestep_buckets 1", "--num_timestep_buckets 2")
    )
    assert torch.equal(without, one) and not torch.equal(without, two)


def test_buckets_are_as_even_where_the_shape_is_preserved() -> None:
    """Of the part of the distribution that is left, and so in every mode."""
    command = "--timestep_sampling flux_shift --min_timestep 200 --max_timestep 800"
    command += " --preserve_distribution_shape --num_timestep_buckets 4"
    low, high = (Phi(logit(t) - MU["flux"]) for t in (0.2, 0.8))
    for t in epochs(command, 20, 2):
        place = [(Phi(logit(each) - MU["flux"]) - low) / (high - low) for each in t.tolist()]
        assert torch.bincount((torch.tensor(place) * 4).long(), minlength=4).tolist() == [5] * 4
