"""MagCache for ComfyUI's own models: skipping steps, and measuring what that depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..engine.errors import ConfigError
from ..engine.magcache import PRESETS, Plan, Rule, greedy_plan, resampled
from ..engine.magcache_curves import CONDITIONAL, Curve, format_ratios
from ..engine.magcache_plots import curve_and_plan
from ..engine.magcache_store import Measured
from . import native_cache, paths
from .cache_plan import AUTO, CHOICES, CUSTOM, CacheSettings, explain, store
from .images import to_comfy
from .made_files import digest, facts
from .native_model import NativeModel, flow_shift, native_model
from .sockets import CATEGORY

_MENU = f"{CATEGORY}/models"
_OFF = "off"
_DEFAULTS = Rule()
CalibrationType = io.Custom("LORALOOM_CALIBRATION")
# What becomes of an earlier curve -> whether the new one replaces it.
_MEASURED_BEFORE = {"average": False, "replace": True}


class MagCache(io.ComfyNode):
    """A native model that reuses what its blocks did in an earlier step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_MagCache",
            display_name="MagCache",
            category=_MENU,
            description="Makes sampling two to three times faster: in some steps the blocks of the "
            "model are skipped and what they added in the step before is used again. Which steps "
            "is known before, from a curve that was measured for the model.",
            search_aliases=["teacache", "easycache", "speed up", "faster sampling", "cache"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "preset",
                    options=CHOICES,
                    default="default",
                    tooltip="careful: skips at most 2 steps in a row. fast: 4. default: 6, with "
                    "four times the error. custom: as set below. off: computes all.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps of the run that plan and picture show. What is done follows "
                    "from the sampler's own steps.",
                ),
                *_custom_inputs(),
                io.String.Input(
                    "ratios",
                    default=AUTO,
                    advanced=True,
                    tooltip="auto: the best curve that there is for the model. 0: the published "
                    "one. Or ratios with commas between, one for each step.",
                ),
                io.Int.Input(
                    "steps_to_compute",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="So many of the steps above, placed where they do most good, instead "
                    "of the preset's threshold; the same share in runs of other lengths. 0: the "
                    "preset decides.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(display_name="plan"),
                io.Image.Output(display_name="curve"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        # The model that is sampled depends on the curves that are there.
        stored = sorted(paths.magcache_folder().glob("*.json"))
        return digest([sorted(inputs.items()), facts(stored)])

    @classmethod
    def execute(cls, model: Any, preset: str, steps: int, **inputs: Any) -> io.NodeOutput:
        kind = native_model(model)
        if preset == _OFF or kind.hindrance:
            text = kind.hindrance or "MagCache is off: all steps are computed"
            patched, picture = native_cache.without(model), ExecutionBlocker(None)
        else:
            settings = _settings(kind, preset, steps, inputs)
            shift = flow_shift(model.get_model_object("model_sampling"))
            curve, plan = settings.preview(steps, shift)
            patched = native_cache.with_plan(model, kind, settings.plan)
            text, picture = explain(curve, plan, kind), _picture(curve, plan, kind)
        return io.NodeOutput(patched, text, picture, ui=ui.PreviewText(text))


class MagCacheCalibrate(io.ComfyNode):
    """A native model that measures ratios while it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_MagCacheCalibrate",
            display_name="MagCache Calibrate",
            category=_MENU,
            description="Measures, while a picture is sampled in full, how what the blocks add "
            "changes from step to step, which MagCache has to know. The picture stays the same.",
            search_aliases=["magcache", "mag ratios"],
            inputs=[io.Model.Input("model")],
            outputs=[
                io.Model.Output(display_name="model"),
                CalibrationType.Output(display_name="calibration"),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        kind, runs = native_model(model), native_cache.CalibratedRuns()
        if kind.hindrance:
            raise ConfigError(f"MagCache Calibrate: {kind.hindrance}, so no curve is needed")
        patched = native_cache.with_calibration(model, kind, runs)
        return io.NodeOutput(patched, runs)


class SaveMagCacheRatios(io.ComfyNode):
    """Stores what a sampling run has measured, where MagCache finds it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_SaveMagCacheRatios",
            display_name="Save MagCache Ratios",
            category=_MENU,
            description="Stores what MagCache Calibrate measured during the sampling of a latent, "
            "where MagCache finds it, and shows it.",
            search_aliases=["magcache", "mag ratios"],
            is_output_node=True,
            inputs=[
                CalibrationType.Input("calibration"),
                io.Latent.Input("latent"),
                io.Combo.Input(
                    "measured_before",
                    options=list(_MEASURED_BEFORE),
                    tooltip="What becomes of a curve of the same model and way of sampling. "
                    "average: the mean over all runs, such as of several prompts. replace: only "
                    "this run.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="ratios"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="curve"),
            ],
        )

    @classmethod
    def execute(
        cls,
        calibration: native_cache.CalibratedRuns,
        latent: dict[str, Tensor],
        measured_before: str,
    ) -> io.NodeOutput:
        replace = _MEASURED_BEFORE[measured_before]
        path, measured = store(calibration, paths.magcache_folder(), replace=replace)
        ratios = format_ratios(measured.branches[CONDITIONAL].ratios)
        text = f"{_report(measured, latent)}\n{path}"
        return io.NodeOutput(ratios, text, _measured_picture(measured), ui=ui.PreviewText(text))


def _custom_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "retention_ratio",
            default=_DEFAULTS.retention_ratio,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Part of the steps at the beginning that are always computed. Only with the "
            f"preset {CUSTOM}.",
        ),
        io.Float.Input(
            "threshold",
            default=_DEFAULTS.threshold,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Largest sum of magnitude errors of steps skipped in a row. Only with the "
            f"preset {CUSTOM}.",
        ),
        io.Int.Input(
            "k",
            default=_DEFAULTS.k,
            min=0,
            max=100,
            advanced=True,
            tooltip=f"Most steps skipped in a row. Only with the preset {CUSTOM}.",
        ),
    ]


def _settings(
    model: NativeModel, preset: str, steps: int, inputs: Mapping[str, Any]
) -> CacheSettings:
    rule = PRESETS.get(preset) or Rule(inputs["retention_ratio"], inputs["threshold"], inputs["k"])
    number = inputs["steps_to_compute"]
    share = number / steps if number else None
    return CacheSettings(model, rule, share, inputs["ratios"], paths.magcache_folder())


def _picture(curve: Curve, plan: Plan, model: NativeModel) -> Tensor:
    ratios = {branch: resampled(values, plan.steps) for branch, values in curve.ratios.items()}
    title = model.name or model.family
    return to_comfy([curve_and_plan(ratios, plan, title=title, other_cost=model.side_cost)])


def _report(measured: Measured, latent: Mapping[str, Tensor]) -> str:
    """What was measured, on what, and the ratios of each branch as others read them."""
    identity = measured.identity
    size = " x ".join(map(str, latent["samples"].shape))
    runs = "one run" if measured.runs == 1 else f"{measured.runs} runs"
    lines = [
        f"{measured.model_name or identity.model}: {identity.steps} steps, {identity.scheduler}, "
        f"shift {identity.shift:g}, latent {size}; mean of {runs}",
    ]
    for branch, each in measured.branches.items():
        lines += [f"{branch}:", format_ratios(each.ratios)]
    return "\n".join(lines)


def _measured_picture(measured: Measured) -> Tensor:
    """The curve with the plan that the default preset makes of it."""
    ratios = {branch: each.ratios for branch, each in measured.branches.items()}
    plan = greedy_plan(ratios[CONDITIONAL], measured.identity.steps)
    title = measured.model_name or measured.identity.family
    return to_comfy([curve_and_plan(ratios, plan, title=title)])
