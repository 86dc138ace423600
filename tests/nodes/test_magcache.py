"""MagCache's nodes, as far as they go without ComfyUI."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.errors import ConfigError, DataError
from pack.engine.magcache import PRESETS, Rule, full_plan, greedy_plan
from pack.engine.magcache_curves import Calibration, format_ratios
from pack.engine.magcache_store import read_measured
from pack.tests.nodes.stand_ins import FolderPaths
from torch import Tensor, nn

RATIOS = (1.0, 1.2, 1.1, 1.05, 1.0, 1.0, 0.99, 0.98, 0.95, 0.9)
BLOCKS = (("double_block", 0), ("double_block", 1), ("single_block", 0))


@pytest.fixture
def native_model(load: Callable[[str], Any]) -> Any:
    return load("native_model")


@pytest.fixture
def native_cache(load: Callable[[str], Any]) -> Any:
    return load("native_cache")


@pytest.fixture
def cache_plan(load: Callable[[str], Any]) -> Any:
    return load("cache_plan")


@pytest.fixture
def settings(native_model: Any, cache_plan: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        model = {"family": "flux_kontext", "name": "my flux", "identity": "0" * 16}
        model |= {key: changes.pop(key) for key in ("side_cost", "hindrance") if key in changes}
        kind = native_model.NativeModel(**model, blocks=BLOCKS)
        values = {"rule": Rule(), "share": None, "ratios": format_ratios(RATIOS)} | changes
        return cache_plan.CacheSettings(kind, folder=tmp_path / "curves", **values)

    return make


@pytest.fixture
def facts(native_model: Any) -> Callable[..., Any]:
    def make(first: int, end: int, steps: int) -> Any:
        part = native_model.Part(first, end, steps)
        return native_model.RunFacts(part, "euler simple", 3.0)

    return make


def residual(size: float) -> Tensor:
    return torch.full((1, 3, 2), size)


def options(step: int, sigmas: Tensor, uuids: str = "ab") -> dict[str, Any]:
    """Those of a call of the model in a step; "b" is the negative prompt."""
    return {
        "sigmas": sigmas[step : step + 1],
        "uuids": list(uuids),
        "cond_or_uncond": [int(uuid == "b") for uuid in uuids],
    }


def patcher(kind: type[nn.Module], **lists: int) -> Any:
    model = kind()
    for name, number in lists.items():
        setattr(model, name, nn.ModuleList([nn.Linear(2, 2) for _ in range(number)]))
    return types.SimpleNamespace(
        model=types.SimpleNamespace(diffusion_model=model), cached_patcher_init=None
    )


def test_the_plan_of_a_whole_run_is_that_of_the_rule(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    made = settings()

    assert made.plan(facts(0, 10, 10)) == greedy_plan(RATIOS, 10)
    assert made.plan(facts(0, 25, 25)) == greedy_plan(RATIOS, 25)
    assert made.preview(25, 3.0)[1] == greedy_plan(RATIOS, 25)


def test_two_models_share_a_run_and_each_begins_with_computed_steps(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    whole = greedy_plan(RATIOS, 20, handovers=[12])

    first, second = (settings().plan(facts(*part, 20)) for part in ((0, 12), (12, 20)))

    assert first.computed + second.computed == whole.computed
    assert second.computed[0]


@pytest.mark.parametrize("part", [(0, 20), (0, 8), (8, 20)])
def test_the_steps_to_compute_are_a_share_of_every_run(
    settings: Callable[..., Any], facts: Callable[..., Any], part: tuple[int, int]
) -> None:
    plan = settings(share=0.5).plan(facts(*part, 20))

    assert plan.num_computed == (part[1] - part[0]) // 2
    assert plan.computed[0] and plan.computed[-1]


def test_more_steps_to_compute_than_there_are_is_all_of_them(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    assert settings(share=2.0).plan(facts(0, 12, 12)).num_computed == 12


def test_too_few_steps_to_compute_are_refused_by_the_name_of_the_widget(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match="MagCache, steps_to_compute: 1 computed steps of 20"):
        settings(share=0.05).plan(facts(0, 20, 20))


def test_a_single_step_is_computed(settings: Callable[..., Any], facts: Callable[..., Any]) -> None:
    assert settings().plan(facts(0, 1, 1)) == full_plan(1)
    assert settings().plan(facts(9, 10, 20)).computed == (True,)


def test_a_model_with_a_hindrance_computes_all(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    assert settings(hindrance="no").plan(facts(0, 20, 20)) == full_plan(20)


def test_without_a_curve_the_way_to_one_is_told(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match="flux_kontext with 3 blocks.*MagCache Calibrate"):
        settings(ratios="auto").plan(facts(0, 20, 20))


def test_zero_is_the_published_curve(
    settings: Callable[..., Any], facts: Callable[..., Any]
) -> None:
    curve = settings(ratios=" 0 ").curve(facts(0, 20, 20))

    assert "published for FLUX.1" in curve.origin
    assert curve.steps == 20


@pytest.mark.parametrize("text", ["", "1.0", "1.0,zero", "1.0,-1.0"])
def test_ratios_that_cannot_be_are_refused(
    settings: Callable[..., Any], facts: Callable[..., Any], text: str
) -> None:
    with pytest.raises(ConfigError, match="^MagCache, ratios: "):
        settings(ratios=text).plan(facts(0, 20, 20))


def test_the_text_tells_the_plan_its_ratios_and_what_speaks_against_it(
    settings: Callable[..., Any], cache_plan: Any
) -> None:
    made = settings(side_cost=0.25)
    curve, plan = made.preview(8, 3.0)
    text = cache_plan.explain(curve, plan, made.model)
    first, steps, *rest = text.splitlines()

    assert (
        first
        == f"computes {plan.num_computed} of 8 steps, about {plan.speedup(other_cost=0.25):.1f}x"
    )
    numbers: list[int] = []
    for word in steps.removeprefix("computed steps: ").split(", "):
        start, _, end = word.partition("-")
        numbers += range(int(start), int(end or start) + 1)
    assert [number - 1 for number in numbers] == [s for s, now in enumerate(plan.computed) if now]
    assert format_ratios(RATIOS)[:7] in rest[1]
    assert "8 steps are few for MagCache" in text and "25% of a step" in text


def test_runs_are_stored_once_and_averaged(
    cache_plan: Any, native_cache: Any, settings: Callable[..., Any], facts: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    def run(ratio: float) -> Any:
        branch = Calibration((1.0, ratio), (0.0, 0.1), (0.0, 0.2))
        return native_cache.CalibratedRun(settings().model, facts(0, 2, 2), {"conditional": branch})

    runs = native_cache.CalibratedRuns([run(1.2), run(1.0)])
    path, measured = cache_plan.store(runs, tmp_path, replace=False)
    again, _ = cache_plan.store(runs, tmp_path, replace=False)
    runs.waiting.append(run(0.8))
    _, replaced = cache_plan.store(runs, tmp_path, replace=True)

    assert measured.runs == 2 and measured.branches["conditional"].ratios == (1.0, 1.1)
    assert again == path and runs.waiting == []
    assert replaced.runs == 1 and replaced.branches["conditional"].ratios == (1.0, 0.8)


def test_a_part_of_a_run_is_stored_with_steps_that_are_never_skipped(
    cache_plan: Any, native_cache: Any, settings: Callable[..., Any], facts: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    branch = Calibration((1.0, 1.0, 1.0), (0.0,) * 3, (0.0,) * 3)
    known = facts(2, 5, 10)
    run = native_cache.CalibratedRun(settings().model, known, {"conditional": branch})
    runs = native_cache.CalibratedRuns([run])
    path, measured = cache_plan.store(runs, tmp_path / "curves", replace=False)
    lenient = settings(ratios="auto", rule=Rule(0.0, 0.9, 100))

    assert measured.identity.steps == 10
    assert measured == read_measured(path)
    whole = lenient.plan(facts(0, 10, 10))
    assert [not now for now in whole.computed] == [2 <= step < 5 for step in range(10)]
    assert lenient.plan(known).computed == (True, False, False)


def test_a_run_that_measured_nothing_is_refused_once(
    cache_plan: Any, native_cache: Any, settings: Callable[..., Any], facts: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    run = native_cache.CalibratedRun(settings().model, facts(0, 2, 2), {}, "nothing there")
    runs = native_cache.CalibratedRuns([run])

    with pytest.raises(DataError, match="MagCache: nothing there"):
        cache_plan.store(runs, tmp_path, replace=False)
    with pytest.raises(ConfigError, match="no run was measured"):
        cache_plan.store(runs, tmp_path, replace=False)


def test_a_step_is_skipped_if_all_that_are_sampled_together_have_a_residual(
    native_cache: Any,
) -> None:
    sigmas = torch.linspace(1, 0, 11)
    plan = greedy_plan([1.0], 10, Rule(0.1, 0.9, 8))
    assert plan.computed == (True, *[False] * 8, True)
    run = native_cache._Run(BLOCKS, plan, sigmas, False)
    x = torch.zeros(2, 4, 8, 8)

    first = run.call(x, options(0, sigmas))
    first._keep(torch.cat([residual(1.0), residual(2.0)]))
    together = run.call(x, options(1, sigmas))
    late = run.call(x, options(2, sigmas, "ac"))
    alone = run.call(x[:1], options(3, sigmas, "b"))
    other_size = run.call(x[:1, :, :4], options(3, sigmas, "b"))

    assert not first.skips and together.skips and not late.skips
    assert alone.skips and not other_size.skips
    assert (run.num_calls, run.num_skipped) == (5, 2)
    run.clear()
    assert not run.residuals


def test_a_call_belongs_to_the_step_of_the_nearest_noise_level(native_cache: Any) -> None:
    run = native_cache._Run(BLOCKS, full_plan(10), torch.linspace(1, 0, 11), True)
    levels = {1.2: 0, 1.0: 0, 0.94: 1, 0.96: 0, 0.1: 9, 0.01: 9}

    found = {level: run.step_of({"sigmas": torch.tensor([level])}) for level in levels}

    assert found == levels


def test_a_step_before_a_computed_one_keeps_nothing(native_cache: Any) -> None:
    sigmas = torch.linspace(1, 0, 11)
    run = native_cache._Run(BLOCKS, full_plan(10), sigmas, False)

    assert run.call(torch.zeros(1, 4, 8, 8), options(3, sigmas, "a")) is None


def test_what_follows_the_last_block_is_all_that_a_skipped_step_adds(
    load: Callable[[str], Any],
) -> None:
    kind = load("block_call").BlockCall
    control = {"input": ["i0", "i1"], "output": ["o0"]}
    skipped = kind(BLOCKS, reused=[residual(1.0)])
    doubles = kind(BLOCKS[:2], reused=[residual(1.0)])

    assert skipped.control(control) == {"input": [], "middle": [], "output": ["o0"]}
    assert skipped.control({"input": ["i0"]}) == {"input": [], "middle": [], "output": []}
    assert doubles.control(control) == {"input": [None, "i1"], "middle": [], "output": []}
    assert kind(BLOCKS, keep=lambda kept: None).control(control) is control


def test_blocks_are_named_in_the_order_in_which_they_run(native_model: Any) -> None:
    flux = type("Flux", (nn.Module,), {})
    found = native_model.native_model(patcher(flux, double_blocks=2, single_blocks=1))
    again = native_model.native_model(patcher(flux, double_blocks=2, single_blocks=1))
    other = native_model.native_model(patcher(flux, double_blocks=1, single_blocks=2))

    assert found.family == "flux_kontext" and found.blocks == BLOCKS
    assert found.identity == again.identity != other.identity


def test_other_models_are_refused_and_other_kinds_of_wan_are_computed(native_model: Any) -> None:
    wan = type("WanModel", (nn.Module,), {})
    speech = type("WanModel_S2V", (wan,), {})

    assert native_model.native_model(patcher(wan, blocks=2)).hindrance == ""
    found = native_model.native_model(patcher(speech, blocks=2)).hindrance
    assert "WanModel_S2V" in found and "all steps are computed" in found
    with pytest.raises(ConfigError, match="the model is a UNet.*it works with FLUX"):
        native_model.native_model(patcher(type("UNet", (nn.Module,), {})))


@pytest.mark.parametrize(("mapping", "hindered"), [({0: 0, 2: 1}, False), ({0: 0, 3: 1}, True)])
def test_vace_may_add_nothing_to_its_last_block(
    native_model: Any, mapping: dict[int, int], hindered: bool
) -> None:
    wan = type("WanModel", (nn.Module,), {})
    vace = type("VaceWanModel", (wan,), {"vace_layers_mapping": mapping})
    found = native_model.native_model(patcher(vace, blocks=4, vace_blocks=2))

    assert bool(found.hindrance) == hindered
    assert found.side_cost == pytest.approx(0 if hindered else 2 / 6)


def test_presets_ignore_the_settings_of_custom(load: Callable[[str], Any], comfyui: FolderPaths,
                                               native_model: Any) -> None:  # fmt: skip
    magcache = load("magcache")
    inputs = {
        "retention_ratio": 0.4,
        "threshold": 0.5,
        "k": 9,
        "ratios": "0",
        "steps_to_compute": 0,
    }
    model = native_model.NativeModel("wan", "", "", BLOCKS)

    found = {
        preset: magcache._settings(model, preset, 20, inputs).rule
        for preset in ("careful", "fast", "default", "custom")
    }

    assert found.pop("custom") == Rule(0.4, 0.5, 9)
    assert found == {name: PRESETS[name] for name in found}
    share = magcache._settings(model, "fast", 20, inputs | {"steps_to_compute": 8}).share
    assert share == pytest.approx(0.4)


def test_stored_curves_are_a_reason_to_run_again(load: Callable[[str], Any],
                                                 comfyui: FolderPaths) -> None:  # fmt: skip
    node = load("magcache").MagCache
    before = node.fingerprint_inputs(preset="fast")
    folder = comfyui.base / "user" / "lora_loom" / "magcache"
    folder.mkdir(parents=True)
    (folder / "wan-0.json").write_text("{}")

    assert node.fingerprint_inputs(preset="fast") != before
