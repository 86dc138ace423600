"""Tests of MagCache on transformers: what is computed, what comes out, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pack.engine import samplers
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.block_cache import (
    Calibrator,
    cached_blocks,
    calibrated_blocks,
    residual_change,
)
from pack.engine.errors import DataError
from pack.engine.flow import sampling_times
from pack.engine.magcache import Plan, full_plan, planned
from pack.engine.magcache_curves import CONDITIONAL, UNCONDITIONAL
from pack.engine.magcache_forecast import linear
from torch import Tensor, nn

ARCHITECTURE = FluxKontext()
STEPS = 6


def plan_of(text: str) -> Plan:
    return planned([1.0] * len(text), [letter == "F" for letter in text])


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return model.eval().requires_grad_(False)


def conditions(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "text_embeds": torch.randn(2, 5, 24, generator=generator),
        "pooled": torch.randn(2, 8, generator=generator),
        "guidance": torch.full((2,), 2.5),
        "control_latents_0": torch.randn(2, 4, 1, 4, 4, generator=generator),
    }


def noise() -> Tensor:
    return torch.randn(2, 4, 1, 4, 8, generator=torch.Generator().manual_seed(9))


def velocity(model: nn.Module, seed: int = 0) -> samplers.Velocity:
    def at(latents: Tensor, t: float) -> Tensor:
        return ARCHITECTURE.predict_velocity(model, latents, torch.full((2,), t), conditions(seed))

    return at


def sampled(model: nn.Module, seed: int = 0) -> Tensor:
    return samplers.euler(velocity(model, seed), noise(), sampling_times(STEPS, 1.5))


def block_inputs(model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
    """Records what the last call gave the first block and took from the last, image only."""
    seen: dict[str, Tensor] = {}
    blocks = ARCHITECTURE.blocks(model)

    def enters(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        seen["in"] = kwargs["hidden_states"].clone()

    def leaves(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        seen["out"] = output[1].clone()

    blocks[0].register_forward_pre_hook(enters, with_kwargs=True)
    blocks[-1].register_forward_hook(leaves)
    return lambda: (seen["in"], seen["out"])


@pytest.mark.parametrize("predict", ["reuse", "linear"])
def test_a_run_that_skips_nothing_is_the_same_to_the_bit(
    transformer: nn.Module, predict: str
) -> None:
    from pack.engine.magcache_forecast import PREDICTIONS

    with cached_blocks(
        ARCHITECTURE, transformer, full_plan(STEPS), predict=PREDICTIONS[predict]
    ) as cache:
        inside = sampled(transformer)
    assert torch.equal(inside, sampled(transformer))
    assert cache.block_calls == 4 * STEPS


def test_a_calibration_run_is_the_same_to_the_bit(transformer: nn.Module) -> None:
    with calibrated_blocks(ARCHITECTURE, transformer, STEPS):
        inside = sampled(transformer)
    assert torch.equal(inside, sampled(transformer))


@pytest.mark.parametrize("text", ["FFFFFF", "FF.F.F", "F....F", "F....."])
def test_the_blocks_are_called_as_the_plan_says(transformer: nn.Module, text: str) -> None:
    blocks = ARCHITECTURE.blocks(transformer)
    calls = [0] * len(blocks)
    hooks = []
    for index, block in enumerate(blocks):

        def count(module: nn.Module, args: Any, index: int = index) -> None:
            calls[index] += 1

        hooks.append(block.register_forward_pre_hook(count))
    plan = plan_of(text)
    with cached_blocks(ARCHITECTURE, transformer, plan) as cache:
        sampled(transformer)
    for hook in hooks:
        hook.remove()
    assert calls == [plan.num_computed] * len(blocks)
    assert cache.block_calls == sum(calls)


def by_hand(
    model: nn.Module, plan: Plan, weights: Callable[[int, list[int]], dict[int, float]]
) -> Tensor:
    """Sampling in which hooks put the image's tokens of a skipped step in place of computed ones.

    All blocks run; what the last one returns is exchanged.
    """
    residuals: dict[int, Tensor] = {}
    state: dict[str, Any] = {"step": -1}
    blocks = ARCHITECTURE.blocks(model)

    def enters(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        state["step"] += 1
        state["in"] = kwargs["hidden_states"]

    def leaves(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> Any:
        step = state["step"]
        if plan.computed[step]:
            residuals[step] = output[1] - state["in"]
            return None
        total = state["in"]
        for source, weight in weights(step, sorted(residuals)).items():
            total = total + weight * residuals[source]
        return output[0], total

    hooks = [
        blocks[0].register_forward_pre_hook(enters, with_kwargs=True),
        blocks[-1].register_forward_hook(leaves),
    ]
    result = sampled(model)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("text", ["FF.F.F", "F..F.F", "F....F"])
def test_a_skipped_step_adds_the_residual_of_the_last_computed_one(
    transformer: nn.Module, text: str
) -> None:
    plan = plan_of(text)
    with cached_blocks(ARCHITECTURE, transformer, plan):
        skipping = sampled(transformer)
    expected = by_hand(transformer, plan, lambda step, computed: {computed[-1]: 1.0})
    torch.testing.assert_close(skipping, expected, rtol=0, atol=1e-6)
    assert not torch.equal(skipping, sampled(transformer))


def test_a_forecast_follows_the_last_two_residuals(transformer: nn.Module) -> None:
    plan = plan_of("FF.F.F")
    with cached_blocks(ARCHITECTURE, transformer, plan, predict=linear):
        forecast = sampled(transformer)
    lines = {2: {1: 2.0, 0: -1.0}, 4: {3: 1.5, 1: -0.5}}
    expected = by_hand(transformer, plan, lambda step, computed: lines[step])
    torch.testing.assert_close(forecast, expected, rtol=0, atol=1e-6)


def test_each_branch_has_steps_and_residuals_of_its_own(transformer: nn.Module) -> None:
    plan = plan_of("FF.F.F")
    alone = []
    for seed in (0, 1):
        with cached_blocks(ARCHITECTURE, transformer, plan):
            alone.append(sampled(transformer, seed))
    times = sampling_times(STEPS, 1.5)
    latents = [noise(), noise()]
    with cached_blocks(ARCHITECTURE, transformer, plan) as cache:
        for now, following in zip(times[:-1], times[1:], strict=True):
            for index, branch in enumerate((CONDITIONAL, UNCONDITIONAL)):
                with cache.branch(branch):
                    step = velocity(transformer, index)(latents[index], now)
                latents[index] = latents[index] + (following - now) * step
    assert torch.equal(latents[0], alone[0]) and torch.equal(latents[1], alone[1])


def test_the_ratios_are_those_of_the_residuals(transformer: nn.Module) -> None:
    residuals: list[Tensor] = []
    seen = block_inputs(transformer)
    try:

        def recorded(latents: Tensor, t: float) -> Tensor:
            result = velocity(transformer)(latents, t)
            residuals.append((seen()[1] - seen()[0]).double())
            return result

        with calibrated_blocks(ARCHITECTURE, transformer, STEPS) as cache:
            samplers.euler(recorded, noise(), sampling_times(STEPS, 1.5))
    finally:
        for block in ARCHITECTURE.blocks(transformer):
            block._forward_hooks.clear()
            block._forward_pre_hooks.clear()
    found = cache.calibration()[CONDITIONAL]
    assert found.ratios[0] == 1 and found.deviations[0] == 0 and found.distances[0] == 0
    for step in range(1, STEPS):
        now, before = residuals[step], residuals[step - 1]
        lengths = now.square().sum(-1).sqrt() / before.square().sum(-1).sqrt()
        cosine = (now * before).sum(-1) / (now.norm(dim=-1) * before.norm(dim=-1))
        # float32 sums of 64 channels and 24 tokens: a few units of 6e-8, relative
        assert found.ratios[step] == pytest.approx(lengths.mean().item(), rel=1e-5)
        assert found.deviations[step] == pytest.approx(lengths.std().item(), rel=1e-3, abs=1e-6)
        assert found.distances[step] == pytest.approx((1 - cosine).mean().item(), abs=1e-6)


def test_the_statistics_of_tokens_that_grow_and_turn() -> None:
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    now = torch.tensor([[[6.0, 8.0], [0.0, 4.0]]])  # twice as long; a right angle, 4 times
    mean, deviation, distance = residual_change(now, before).tolist()
    assert (mean, distance) == (3.0, 0.5)
    assert deviation == pytest.approx(2**0.5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_residuals_without_a_ratio_are_an_error_that_names_the_step(value: float) -> None:
    calibrator = Calibrator()
    for size in (1.0, 2.0, value, 1.0):
        calibrator.add(CONDITIONAL, torch.full((1, 3, 4), size))
    with pytest.raises(DataError, match="conditional branch has no ratio at step 3"):
        calibrator.results()


def test_asking_a_run_that_does_not_measure_is_a_mistake(transformer: nn.Module) -> None:
    with (
        cached_blocks(ARCHITECTURE, transformer, full_plan(2)) as cache,
        pytest.raises(ValueError, match="measures nothing"),
    ):
        cache.calibration()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(transformer: nn.Module, *, fails: bool) -> None:
    before = dict(transformer.named_modules())
    forwards = [block.forward for block in ARCHITECTURE.blocks(transformer)]
    try:
        with cached_blocks(ARCHITECTURE, transformer, plan_of("FF.F.F")):
            sampled(transformer)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert dict(transformer.named_modules()) == before
    assert [block.forward for block in ARCHITECTURE.blocks(transformer)] == forwards


def test_a_step_that_fails_leaves_the_next_run_alone(transformer: nn.Module) -> None:
    def stop(step: int, latents: Tensor) -> None:
        if step == 3:
            raise KeyboardInterrupt

    plan = plan_of("FF.F.F")
    with pytest.raises(KeyboardInterrupt), cached_blocks(ARCHITECTURE, transformer, plan):
        samplers.euler(velocity(transformer), noise(), sampling_times(STEPS, 1.5), stop)
    runs = []
    for _ in range(2):
        with cached_blocks(ARCHITECTURE, transformer, plan):
            runs.append(sampled(transformer))
    assert torch.equal(runs[0], runs[1])


def image_tensors() -> int:
    """How many tensors of the size of all image tokens are alive: 8 tokens and 4 of the control."""
    return sum(type(each) is Tensor and each.shape == (2, 12, 64) for each in gc.get_objects())


@pytest.mark.parametrize(("predict", "most"), [(None, 1), (linear, 2)])
def test_one_residual_is_kept_and_none_afterwards(
    transformer: nn.Module, predict: Any, most: int
) -> None:
    before = image_tensors()
    kept: list[int] = []
    more = {"predict": predict} if predict else {}
    with cached_blocks(ARCHITECTURE, transformer, plan_of("FF.F.F"), **more) as cache:
        samplers.euler(
            velocity(transformer),
            noise(),
            sampling_times(STEPS, 1.5),
            lambda step, latents: kept.append(image_tensors() - before),
        )
    assert max(kept) == most
    assert image_tensors() == before
    watched = weakref.ref(cache)
    del cache
    gc.collect()
    assert watched() is None


def test_calibrating_keeps_no_residuals_either(transformer: nn.Module) -> None:
    before = image_tensors()
    with calibrated_blocks(ARCHITECTURE, transformer, STEPS) as cache:
        sampled(transformer)
    assert image_tensors() == before
    assert len(cache.calibration()[CONDITIONAL].ratios) == STEPS


def test_more_calls_than_steps_are_a_mistake(transformer: nn.Module) -> None:
    with (
        cached_blocks(ARCHITECTURE, transformer, plan_of("F.F")),
        pytest.raises(ValueError, match="plan is for 3 steps"),
    ):
        sampled(transformer)
