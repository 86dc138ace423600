from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pack.engine import flow, seeds
from pack.engine.config import LossConfig
from pack.engine.dataset import REGULARIZATION
from pack.engine.jobs.objective import (
    PLAIN,
    LossWeight,
    Objective,
    add_noise,
    objective_of,
    sample_losses,
    weighted_mean,
)
from pack.engine.jobs.step import OptimizerStep
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812

SEED = 3
Batch = dict[str, Tensor]


class Velocity(nn.Module):
    """A frozen base and something added to it that can be switched off, as adapters can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.added, self.text = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.base.requires_grad_(False)
        self.enabled = True

    def forward(self, noisy_BCTHW: Tensor, t_B: Tensor, conditions: Batch) -> Tensor:
        assert conditions.keys() == {"text_embeds", "guidance"}
        x = noisy_BCTHW.movedim(1, -1)
        shift = (
            conditions["text_embeds"] @ torch.ones(3, 4) * (t_B + conditions["guidance"])[:, None]
        )
        out = self.base(x) + shift[:, None, None, None]
        if self.enabled:
            out = out + self.added(x) + self.text(conditions["text_embeds"])[:, None, None, None]
        return torch.tanh(out).movedim(-1, 1)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.enabled = False
        with torch.no_grad():
            yield
        self.enabled = True

    def trained(self) -> list[nn.Parameter]:
        return [*self.added.parameters(), *self.text.parameters()]


def make_batch(size: int = 2, **more: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(100)
    return {
        "latents": torch.randn(size, 4, 1, 6, 8, generator=generator),
        "text_embeds": torch.randn(size, 3, generator=generator),
        **more,
    }


def make_step(model: Velocity, **changes: Any) -> OptimizerStep:
    settings: dict[str, Any] = {
        "model": model,
        "parameters": model.trained(),
        "optimizer": torch.optim.SGD(model.trained(), lr=1.0),
        "scaler": GradScaler("cpu", enabled=False),
        "draw_times": lambda index, count: torch.linspace(0.2, 0.8, count),
        "sample_times": lambda draws_B, height, width: draws_B,
        "guidance": 1.5,
        "max_grad_norm": 0.0,
        "seed": SEED,
        "without_adapters": model.disabled,
    }
    return OptimizerStep(**settings | changes)


def drawn(batch: Batch, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Noisy latents, true velocity, times and conditions of batch 0 of a run, made by hand."""
    latents = batch["latents"]
    generator = seeds.generator(SEED, "noise", 0)
    noise = torch.randn(latents.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(len(latents), 4, 1, 1, 1, generator=generator)
    t_B = torch.linspace(0.2, 0.8, len(latents))
    t = t_B[:, None, None, None, None]
    conditions = {"text_embeds": batch["text_embeds"], "guidance": torch.full_like(t_B, 1.5)}
    return (1 - t) * latents + t * noise, noise - latents, t_B, conditions


def assert_same_step(step: OptimizerStep, batch: Batch, model: Velocity, loss: Tensor) -> None:
    """The step's loss and gradient are those of ``loss``, which was made of ``model`` by hand."""
    result = step.accumulate([(0, batch)], 1)
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    for ours, expected in zip(step.parameters, model.trained(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def batch_loss(
    model: nn.Module,
    batch: Batch,
    t_B: Tensor,
    *,
    objective: Objective = PLAIN,
    weight: LossWeight | None = None,
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    given = add_noise(
        batch, t_B, guidance=1.5, generator=generator, noise_offset=objective.noise_offset
    )
    return weighted_mean(sample_losses(model, given, objective), given, objective, weight)


class Perfect(nn.Module):
    """Knows the clean latents, so it knows the velocity: noise - latents."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents

    def forward(self, noisy: Tensor, t_B: Tensor, conditions: Batch) -> Tensor:
        return (noisy - self.latents) / t_B[:, None, None, None, None]


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_true_velocity_has_no_loss(offset: float) -> None:
    batch = make_batch()
    t_B = torch.tensor([0.3, 0.9])
    objective = Objective(noise_offset=offset)
    perfect = batch_loss(Perfect(batch["latents"]), batch, t_B, objective=objective)
    assert perfect.item() == pytest.approx(0, abs=1e-10)
    wrong = batch_loss(Perfect(batch["latents"] * 0.5), batch, t_B, objective=objective)
    # It errs by half the latents over t.
    error = 0.5 * batch["latents"] / t_B[:, None, None, None, None]
    assert wrong.item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_the_loss_of_a_model_in_half_precision_is_float32() -> None:
    class Zero(nn.Module):
        def forward(self, noisy: Tensor, t_B: Tensor, conditions: Batch) -> Tensor:
            return torch.zeros_like(noisy, dtype=torch.float16)

    latents = make_batch()["latents"] * 1000  # whose square is more than float16 holds
    loss = batch_loss(Zero(), {"latents": latents}, torch.rand(2))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.mse_loss(torch.zeros(()).expand_as(noise), noise - latents))


def test_each_sample_is_weighed_by_its_own_time() -> None:
    """The mean over samples of weight times mean squared error, also for images (T = 1)."""
    batch = make_batch(3)
    t_B = torch.tensor([0.2, 0.5, 0.9])
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    model = Perfect(torch.zeros_like(batch["latents"]))
    errors = [
        # Such a model takes the noisy latents for noise alone.
        (flow.noisy_latents(x, n, t[None]) / t - (n - x)).square().mean().item() / t.item() ** 2
        for x, n, t in zip(batch["latents"].split(1), noise.split(1), t_B, strict=True)
    ]
    weighed = batch_loss(model, batch, t_B, weight=lambda t: t**-2)
    assert weighed.item() == pytest.approx(sum(errors) / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["mse", "l1", "huber", "smooth_l1"])
def test_the_measure_is_pytorch_s_own(name: str) -> None:
    own = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "huber": lambda a, b: F.huber_loss(a, b, delta=0.25),
        "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.25),
    }[name]
    ours, model, batch = Velocity(), Velocity(), make_batch()
    noisy, velocity, t_B, conditions = drawn(batch)
    loss = own(model(noisy, t_B, conditions), velocity)
    step = make_step(ours, objective=Objective(measure=name, huber_c=0.25))
    assert_same_step(step, batch, model, loss)


def test_the_offset_of_the_noise_is_one_draw_per_sample_and_channel() -> None:
    ours, model, batch = Velocity(), Velocity(), make_batch()
    noisy, velocity, t_B, conditions = drawn(batch, offset=0.1)
    loss = (model(noisy, t_B, conditions) - velocity).square().mean()
    assert_same_step(make_step(ours, objective=Objective(noise_offset=0.1)), batch, model, loss)


def test_noise_without_an_offset_is_the_same_whatever_comes_after_it() -> None:
    like = torch.empty(2, 4, 3, 6, 8)
    plain = flow.draw_noise(like, generator=torch.Generator().manual_seed(1))
    moved = flow.draw_noise(like, generator=torch.Generator().manual_seed(1), offset=0.5)
    shift = (moved - plain)[:, :, :1, :1, :1]
    torch.testing.assert_close(moved, plain + shift)
    assert len(shift.unique()) == 8 and shift.std() > 0.1


def test_mixing_leaves_the_latents_of_the_batch_as_they_are() -> None:
    batch = make_batch()
    before = batch["latents"].clone()
    make_step(Velocity(), objective=Objective(noise_offset=0.1)).accumulate([(0, batch)], 1)
    assert torch.equal(batch["latents"], before)


def test_only_what_is_masked_in_is_learned() -> None:
    mask = torch.zeros(2, 1, 1, 6, 8)
    mask[0, ..., :3, :] = 1
    mask[1, ..., 2:4] = 0.5
    ours, model, batch = Velocity(), Velocity(), make_batch(mask=mask)
    noisy, velocity, t_B, conditions = drawn(batch)
    errors = (model(noisy, t_B, conditions) - velocity).square()
    weight = (0.25 + 0.75 * mask).expand_as(errors)
    by_sample = [(e * w).sum() / w.sum() for e, w in zip(errors, weight, strict=True)]
    step = make_step(ours, objective=Objective(unmasked_weight=0.25))
    assert_same_step(step, batch, model, torch.stack(by_sample).mean())


@pytest.mark.parametrize("from_model", [False, True])
def test_regularization_images_have_a_weight_and_perhaps_another_target(
    *, from_model: bool
) -> None:
    ours, model = Velocity(), Velocity()
    batch = make_batch(**{REGULARIZATION: torch.ones(2)})
    noisy, target, t_B, conditions = drawn(batch)
    if from_model:
        model.enabled = False
        target = model(noisy, t_B, conditions).detach()
        model.enabled = True
    loss = 0.3 * (model(noisy, t_B, conditions) - target).square().mean()
    objective = Objective(prior_weight=0.3, prior_from_model=from_model)
    step = make_step(ours, objective=objective)
    assert_same_step(step, batch, model, loss)
    assert step.statistics.count.sum() == 0


def test_other_images_have_neither() -> None:
    step, plain = make_step(Velocity()), make_step(Velocity())
    step.objective = Objective(prior_weight=0.3, prior_from_model=True, preservation_weight=9)
    for each in (step, plain):
        each([(0, make_batch())])
    for ours, expected in zip(step.parameters, plain.parameters, strict=True):
        assert torch.equal(ours, expected)
    assert step.statistics.count.sum() == 2


def test_captions_of_the_class_are_kept_as_they_are_without_adapters() -> None:
    ours, model = Velocity(), Velocity()
    text = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    batch = make_batch(class_text_embeds=text)
    noisy, velocity, t_B, conditions = drawn(batch)
    of_class = conditions | {"text_embeds": text}
    model.enabled = False
    kept = model(noisy, t_B, of_class).detach()
    model.enabled = True
    loss = (model(noisy, t_B, conditions) - velocity).square().mean()
    loss = loss + 2.0 * (model(noisy, t_B, of_class) - kept).square().mean()
    step = make_step(ours, objective=Objective(preservation_weight=2.0))
    assert_same_step(step, batch, model, loss)


def test_terms_are_accumulated_over_batches_of_all_kinds() -> None:
    text = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    batches = [
        make_batch(),
        make_batch(class_text_embeds=text),
        make_batch(**{REGULARIZATION: torch.ones(2)}),
    ]
    step = make_step(Velocity(), draw_times=lambda index, count: torch.linspace(0.2, 0.8, count))
    step.accumulate(enumerate(batches), 3)
    together = [parameter.grad for parameter in step.parameters]
    apart: list[Tensor] = [torch.zeros_like(parameter) for parameter in step.parameters]
    for index, batch in enumerate(batches):
        alone = make_step(Velocity())
        alone.accumulate([(index, batch)], 1)
        for total, parameter in zip(apart, alone.parameters, strict=True):
            assert parameter.grad is not None
            total += parameter.grad / 3
    for grad, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(grad, expected)


def test_only_the_last_gradient_of_a_step_is_exchanged_between_processes() -> None:
    inside: list[bool] = []

    class Apart:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *exception: object) -> None:
            inside.append(False)

    text = torch.ones(2, 3)
    model = Velocity()
    synchronized: list[bool] = []
    for parameter in model.trained():
        parameter.register_hook(lambda grad: synchronized.append(not (inside and inside[-1])))
    step = make_step(model, no_sync=Apart)
    num_parameters = len(step.parameters)
    step.accumulate(enumerate([make_batch(), make_batch(class_text_embeds=text)]), 2)
    # Three gradients, of which the last is that of the captions of the class.
    assert synchronized == [False] * 2 * num_parameters + [True] * num_parameters


def test_the_second_term_needs_no_more_memory_than_the_first() -> None:
    """What the first one keeps for its gradient is gone when the second is computed."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    class Watched(Velocity):
        def forward(self, noisy_BCTHW: Tensor, t_B: Tensor, conditions: Batch) -> Tensor:
            counts.append(sum(reference() is not None for reference in alive))
            out = super().forward(noisy_BCTHW, t_B, conditions)
            alive.append(weakref.ref(out))
            return out

    make_step(Watched()).accumulate([(0, make_batch(class_text_embeds=torch.ones(2, 3)))], 1)
    # Of the class captions: first without adapters, whose result stays, then with them.
    assert counts == [0, 0, 1]


def test_settings_reach_the_objective() -> None:
    config = LossConfig(
        loss_type="huber",
        huber_c=0.2,
        noise_offset=0.05,
        unmasked_weight=0.1,
        prior_loss_weight=0.7,
        regularization_target="model",
        preservation_weight=3.0,
    )
    assert objective_of(config) == Objective("huber", 0.2, 0.05, 0.1, 0.7, True, 3.0)
    assert objective_of(LossConfig()) == PLAIN
