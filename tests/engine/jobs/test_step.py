from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.engine import flow, optimizers, seeds
from pack.engine.jobs.step import OptimizerStep, held_out_loss
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

SEED = 3
Batch = dict[str, Tensor]


class Velocity(nn.Module):
    """A small network that uses everything that a transformer is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.text = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, noisy_BCTHW: Tensor, t_B: Tensor, conditions: Batch) -> Tensor:
        mixed = self.mix(noisy_BCTHW.movedim(1, -1))
        shift = self.text(conditions["text_embeds"]) * (t_B + conditions["guidance"])[:, None]
        return torch.tanh(mixed + shift[:, None, None, None]).movedim(-1, 1)


def make_batch(index: int, size: int = 2) -> tuple[int, Batch]:
    generator = torch.Generator().manual_seed(100 + index)
    return index, {
        "latents": torch.randn(size, 4, 1, 6, 8, generator=generator),
        "text_embeds": torch.randn(size, 3, generator=generator),
    }


def draw_times(index: int, count: int) -> Tensor:
    return torch.rand(count, generator=seeds.generator(SEED, "time", index))


def sample_times(draws_B: Tensor, height: int, width: int) -> Tensor:
    assert (height, width) == (6, 8)
    return flow.shift_time(draws_B, 3.0)


def make_step(**changes: Any) -> OptimizerStep:
    model = Velocity()
    parameters = list(model.parameters())
    settings: dict[str, Any] = {
        "model": model,
        "parameters": parameters,
        "optimizer": torch.optim.SGD(parameters, lr=1.0),
        "scaler": GradScaler("cpu", enabled=False),
        "draw_times": draw_times,
        "sample_times": sample_times,
        "guidance": 1.5,
        "max_grad_norm": 0.0,
        "seed": SEED,
    }
    return OptimizerStep(**settings | changes)


def our_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    group = optimizers.ParameterGroup("lora", parameters)
    return optimizers.create("AdamW", [group], lr=0.1, arguments={}, allowed=())


def gradient(step: OptimizerStep) -> Tensor:
    grads = [parameter.grad for parameter in step.parameters]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def values(step: OptimizerStep) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in step.parameters])


def documented_draws(index: int, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Time and noise of a batch, which only its index and the seed decide."""
    draws = torch.rand(len(latents), generator=seeds.generator(SEED, "time", index))
    noise = torch.randn(latents.shape, generator=seeds.generator(SEED, "noise", index))
    return flow.shift_time(draws, 3.0), noise


def test_accumulating_batches_equals_one_large_batch() -> None:
    batches = [make_batch(index) for index in (5, 6, 7)]
    step = make_step()
    result = step.accumulate(iter(batches), 3)

    drawn = [documented_draws(index, batch["latents"]) for index, batch in batches]
    t_B, noise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    latents = torch.cat([batch["latents"] for _, batch in batches])
    text = torch.cat([batch["text_embeds"] for _, batch in batches])
    model = Velocity()
    t_BCTHW = t_B[:, None, None, None, None]
    conditions = {"text_embeds": text, "guidance": torch.full((6,), 1.5)}
    velocity = model((1 - t_BCTHW) * latents + t_BCTHW * noise, t_B, conditions)
    loss = (velocity - (noise - latents)).square().mean()
    loss.backward()

    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.t, t_B.mean())
    for ours, expected in zip(step.parameters, model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_parameters_change_by_the_optimizers_rule_and_only_in_the_update() -> None:
    step = make_step()
    before = values(step)
    step.accumulate([make_batch(0)], 1)
    assert torch.equal(values(step), before)
    grad = gradient(step)
    step.update()
    torch.testing.assert_close(values(step), before - grad)


def test_gradients_of_the_last_step_are_forgotten() -> None:
    step, fresh = make_step(), make_step()
    for index in (0, 1):
        step.accumulate([make_batch(index)], 1)
    fresh.accumulate([make_batch(1)], 1)
    assert torch.equal(gradient(step), gradient(fresh))


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it(share: float) -> None:
    free = make_step()
    before = values(free)
    free([make_batch(0)])
    change = before - values(free)
    limit = change.norm().item() * share

    clipped = make_step(max_grad_norm=limit)
    clipped([make_batch(0)])
    torch.testing.assert_close(before - values(clipped), change * min(1.0, share))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_the_norm_of_the_gradient_is_that_before_clipping(
    max_grad_norm: float, scale: float
) -> None:
    scaler = GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    step = make_step(max_grad_norm=max_grad_norm, scaler=scaler)
    step.accumulate([make_batch(0)], 1)
    expected = gradient(step).double().norm() / scale
    torch.testing.assert_close(step.update().double(), expected, rtol=1e-6, atol=0)


def test_the_statistics_are_the_losses_at_their_times() -> None:
    batches = [make_batch(index, size=3) for index in range(20)]
    step = make_step(loss_weight=lambda t_B: t_B * 100)
    step.accumulate(batches, 20)
    sums, counts = [0.0] * 20, [0] * 20
    model = Velocity()
    for index, batch in batches:
        t_B, noise = documented_draws(index, batch["latents"])
        noisy = flow.noisy_latents(batch["latents"], noise, t_B)
        conditions = {"text_embeds": batch["text_embeds"], "guidance": torch.full((3,), 1.5)}
        with torch.no_grad():
            errors = (model(noisy, t_B, conditions) - (noise - batch["latents"])).square()
        for t, error in zip(t_B.tolist(), errors, strict=True):
            sums[int(t * 20)] += error.mean().item()
            counts[int(t * 20)] += 1
    assert step.statistics.count.tolist() == counts
    assert step.statistics.loss_sum.tolist() == pytest.approx(sums, rel=1e-5)


def test_a_scaled_loss_gives_the_same_step() -> None:
    # Scaling by a power of two is exact.
    scaled = make_step(scaler=GradScaler("cpu", init_scale=2.0**10), max_grad_norm=0.1)
    plain = make_step(max_grad_norm=0.1)
    for step in (scaled, plain):
        step([make_batch(0), make_batch(1)])
    torch.testing.assert_close(values(scaled), values(plain), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_overflows_is_left_out_and_the_scale_halved(max_grad_norm: float) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**127)
    step = make_step(scaler=scaler, max_grad_norm=max_grad_norm)
    before = values(step)
    _, batch = make_batch(0)
    result = step([(0, batch | {"latents": batch["latents"] * 100})])
    assert torch.equal(values(step), before)
    assert result.loss.isfinite() and scaler.get_scale() == 2.0**126


def test_our_own_adamw_leaves_an_overflow_out_too() -> None:
    model = Velocity()
    parameters = list(model.parameters())
    step = make_step(
        model=model,
        parameters=parameters,
        optimizer=our_adamw(parameters),
        scaler=GradScaler("cpu", init_scale=2.0**127),
        max_grad_norm=1.0,
    )
    before = values(step)
    _, batch = make_batch(0)
    step([(0, batch | {"latents": batch["latents"] * 100})])
    assert torch.equal(values(step), before)
    for index in range(1, 4):
        step([make_batch(index)])
    assert values(step).isfinite().all() and not torch.equal(values(step), before)


def test_draws_depend_on_the_index_of_the_batch_alone() -> None:
    _, batch = make_batch(0)

    def losses(*indices: int) -> list[float]:
        step = make_step()
        return [step.accumulate([(index, batch)], 1).loss.item() for index in indices]

    assert losses(0, 1, 2) == losses(2, 0, 1)[1:] + losses(2, 0, 1)[:1]
    assert len(set(losses(0, 1, 2))) == 3


def test_one_batch_after_the_other_is_in_memory() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[tuple[int, Batch]]:
        nonlocal most
        for index in range(6):
            numbered = make_batch(index)
            alive.append(weakref.ref(numbered[1]["latents"]))
            most = max(most, sum(reference() is not None for reference in alive))
            yield numbered

    make_step().accumulate(batches(), 6)
    # The one in use, and the next while it is fetched.
    assert most <= 2


def test_too_few_batches_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        make_step().accumulate([make_batch(0)], 2)


def test_processes_exchange_gradients_with_the_last_batch_only() -> None:
    inside: list[bool] = []

    class Apart:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *exception: object) -> None:
            inside.append(False)

    make_step(no_sync=Apart).accumulate([make_batch(index) for index in range(3)], 3)
    assert inside == [True, False] * 2


def test_the_held_out_loss_is_the_mean_at_fixed_times() -> None:
    batches = [make_batch(index)[1] for index in range(2)]
    model = Velocity()
    settings: dict[str, Any] = {"guidance": 1.5, "seed": 0}
    together = held_out_loss(model, batches, times=(0.2, 0.8), **settings)
    assert together == held_out_loss(model, copy.deepcopy(batches), times=(0.2, 0.8), **settings)
    apart = [held_out_loss(model, batches, times=(t,), **settings) for t in (0.2, 0.8)]
    assert apart[0] != apart[1]
    assert together == pytest.approx(sum(apart) / 2, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    model = Velocity().cuda()
    parameters = list(model.parameters())
    step = make_step(
        model=model,
        parameters=parameters,
        optimizer=our_adamw(parameters),
        scaler=GradScaler("cuda", enabled=False),
        max_grad_norm=1.0,
    )
    _, batch = make_batch(0)
    on_gpu = {name: tensor.cuda() for name, tensor in batch.items()}
    step([(0, on_gpu)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([(1, on_gpu), (2, on_gpu)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
