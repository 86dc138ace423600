from __future__ import annotations

import pytest
import torch
from pack.engine.time_statistics import TimeStatistics
from torch import Tensor


def draws(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t_B, loss_B = torch.rand(2, count, generator=generator)
    t_B[:2] = torch.tensor([0.0, 1.0])
    return t_B, loss_B


def test_sums_and_counts_are_those_of_a_loop() -> None:
    t_B, loss_B = draws(1000)
    sums, counts = [0.0] * 20, [0] * 20
    for t, loss in zip(t_B.tolist(), loss_B.tolist(), strict=True):
        index = min(int(t * 20), 19)
        sums[index] += loss
        counts[index] += 1
    statistics = TimeStatistics()
    for start in range(0, 1000, 7):
        statistics.add(t_B[start : start + 7], loss_B[start : start + 7])
    assert statistics.count.tolist() == counts
    assert statistics.loss_sum.tolist() == pytest.approx(sums, rel=1e-12)


def test_a_state_that_is_loaded_goes_on_with_the_same_bits() -> None:
    t_B, loss_B = draws(60)
    whole = TimeStatistics()
    for start in range(0, 60, 5):
        whole.add(t_B[start : start + 5], loss_B[start : start + 5])
    first, second = TimeStatistics(), TimeStatistics()
    for start in range(0, 30, 5):
        first.add(t_B[start : start + 5], loss_B[start : start + 5])
    second.add(t_B, loss_B)  # which loading forgets
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    for start in range(30, 60, 5):
        second.add(t_B[start : start + 5], loss_B[start : start + 5])
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor)


def test_an_empty_state_is_a_new_beginning() -> None:
    statistics = TimeStatistics()
    statistics.add(*draws(10))
    statistics.load({})
    assert statistics.count.sum() == 0 and statistics.loss_sum.sum() == 0


def test_a_long_run_loses_no_count_and_no_digit_that_matters() -> None:
    statistics = TimeStatistics()
    done = 2**24  # where float32 stops counting
    state = {name: torch.zeros_like(tensor) for name, tensor in statistics.state().items()}
    state["count"][6], state["loss_sum"][6] = done, 0.1 * done
    statistics.load(state)
    for _ in range(1000):
        statistics.add(torch.tensor([0.33]), torch.tensor([0.1]))
    assert statistics.count[6] == done + 1000
    assert statistics.loss_sum[6].item() / (done + 1000) == pytest.approx(0.1, rel=1e-9)


@pytest.mark.gpu
def test_adding_never_waits_for_the_gpu() -> None:
    statistics = TimeStatistics("cuda")
    t_B, loss_B = (each.cuda() for each in draws(8))
    statistics.add(t_B, loss_B)
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics.add(t_B, loss_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert statistics.count.sum() == 16
