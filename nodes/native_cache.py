"""MagCache on ComfyUI's own models, by its wrappers and its replacement of blocks.

A wrapper around the sampling makes the state of a run and lets go of it at the end; a wrapper
around the diffusion model decides for each call whether the blocks run, and replaces them in a
copy of that call's options. So no forward is copied and nothing is stored on the model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engine.block_cache import Calibrator
from ..engine.errors import DataError
from ..engine.magcache import Plan, concerns, describe, full_plan
from ..engine.magcache_curves import CONDITIONAL, UNCONDITIONAL, Calibration, mean_of
from .block_call import BlockCall, Options
from .native_model import BlockName, NativeModel, RunFacts, run_facts

logger = logging.getLogger(__name__)

KEY = "lora_loom_magcache"

Planner = Callable[[RunFacts], Plan]
# A conditioning, the frames of a context window, the shape, and which layers others replace: what
# has to be the same for a residual to fit.
BranchKey = tuple[Any, ...]


def with_plan(patcher: Any, model: NativeModel, planner: Planner) -> Any:
    """A clone of the MODEL that computes the steps of a plan, which is made for each run.

    It takes the place of another one, or of a calibration.
    """
    return _attached(patcher, _Attachment(model, planner, None))


def with_calibration(patcher: Any, model: NativeModel, measured: CalibratedRuns) -> Any:
    """A clone of the MODEL that computes all steps and adds what it measures to ``measured``."""
    return _attached(patcher, _Attachment(model, _compute_all, measured))


def without(patcher: Any) -> Any:
    """A clone of the MODEL that computes all steps."""
    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL):
        clone.remove_wrappers_with_key(kind, KEY)
    return clone


@dataclass(frozen=True)
class CalibratedRun:
    """What a run measured, by branch of the guidance, in each of its steps.

    ``problem`` says why there is nothing, if so.
    """

    model: NativeModel
    facts: RunFacts
    branches: Mapping[str, Calibration]
    problem: str = ""


@dataclass
class CalibratedRuns:
    """Runs that have not been stored yet, and where the last one is that has: a socket's value."""

    waiting: list[CalibratedRun] = field(default_factory=list)
    stored: Path | None = None


def _compute_all(facts: RunFacts) -> Plan:
    return full_plan(facts.part.end - facts.part.first)


def _attached(patcher: Any, attachment: _Attachment) -> Any:
    from comfy.patcher_extension import WrappersMP

    clone = without(patcher)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, attachment.sample)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model)
    return clone


@dataclass(frozen=True)
class _Attachment:
    """What is attached to a MODEL; knows no run."""

    model: NativeModel
    planner: Planner
    measured: CalibratedRuns | None

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling run."""
        from comfy.model_patcher import create_model_options_clone

        guider = executor.class_obj
        given = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        sigmas = given["sigmas"]
        if len(sigmas) < 2:
            return executor(*args, **kwargs)
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        facts = run_facts(model_sampling, given["sampler"], sigmas)
        run = _Run(self.model.blocks, self.planner(facts), sigmas, self.measured is not None)
        options = guider.model_options
        guider.model_options = create_model_options_clone(options)
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        try:
            output = executor(*args, **kwargs)
            if self.measured is None:
                self._tell(run, facts)
            else:
                self.measured.waiting.append(run.calibration(self.model, facts))
            return output
        finally:
            guider.model_options = options
            run.clear()

    def _tell(self, run: _Run, facts: RunFacts) -> None:
        # A part of a run has few steps, and may have to compute them all.
        for concern in concerns(run.plan) if facts.part.is_whole else ():
            logger.warning(concern)
        told = describe(run.plan, other_cost=self.model.side_cost)
        calls = f"{run.num_skipped} of {run.num_calls} calls of the model skipped"
        logger.info("MagCache: %s (%s): %s", facts.part, told, calls)


class _Run:
    """The state of one sampling run.

    A call of the model belongs to the step whose noise level is nearest to its own, so samplers
    that call it several times in a step are answered by the plan, too.
    """

    def __init__(
        self, blocks: Sequence[BlockName], plan: Plan, sigmas: Tensor, calibrates: bool
    ) -> None:
        self.blocks, self.plan, self.calibrates = blocks, plan, calibrates
        self.num_calls = self.num_skipped = 0
        self.residuals: dict[BranchKey, Tensor] = {}
        self._measured: dict[BranchKey, _Measured] = {}
        self._sigmas = sigmas[:-1].float().cpu()

    def step_of(self, options: Options) -> int:
        """The step that a call of the diffusion model belongs to."""
        # The only wait for the device, once for a call of the model.
        sigma = float(options["sigmas"][0])
        return int((self._sigmas - sigma).abs().argmin())

    def call(self, x: Tensor, options: Options) -> BlockCall | None:
        """What a call of the diffusion model is to replace; None for nothing."""
        step = self.step_of(options)
        keys = _branches(x, options)
        planned = not self.plan.computed[step]
        skips = planned and all(key in self.residuals for key in keys)
        self.num_calls += 1
        self.num_skipped += skips
        if skips:
            return BlockCall(self.blocks, reused=[self.residuals[key] for key in keys])
        for key in keys:  # the blocks may need the memory
            self.residuals.pop(key, None)
        last = self.plan.steps - 1
        used = planned or (step < last and not self.plan.computed[step + 1])
        if not used and not self.calibrates:
            return None
        return BlockCall(self.blocks, keep=partial(self.keep, keys, step))

    def keep(self, keys: Sequence[BranchKey], step: int, residual_BND: Tensor) -> None:
        """Take the residuals of a computed call."""
        for key, part_BND in zip(keys, residual_BND.chunk(len(keys)), strict=True):
            if self.calibrates:
                self._measured.setdefault(key, _Measured(key[0])).add(step, part_BND)
            else:
                self.residuals[key] = part_BND

    def calibration(self, model: NativeModel, facts: RunFacts) -> CalibratedRun:
        """Of each branch, the mean over its conditionings that were used in every step."""
        found: dict[str, list[Calibration]] = {}
        try:
            for measured in self._measured.values():
                if measured.steps == list(range(self.plan.steps)):
                    found.setdefault(measured.branch, []).append(measured.result())
        except DataError as error:
            return CalibratedRun(model, facts, {}, str(error))
        if CONDITIONAL not in found:
            problem = (
                "no prompt was used in every step of the run, so nothing was measured; calibrate "
                "with one prompt without a time range, and a sampler such as euler"
            )
            return CalibratedRun(model, facts, {}, problem)
        branches = {name: _mean(found[name]) for name in sorted(found)}  # the conditional first
        return CalibratedRun(model, facts, branches)

    def clear(self) -> None:
        """Let go of all tensors."""
        self.residuals.clear()
        self._measured.clear()


class _Measured:
    """What a conditioning measured, once for each step."""

    def __init__(self, branch: str) -> None:
        self.branch = branch
        self.steps: list[int] = []
        self._calibrator = Calibrator()

    def add(self, step: int, residual_BND: Tensor) -> None:
        if step not in self.steps:
            self.steps.append(step)
            self._calibrator.add(self.branch, residual_BND)

    def result(self) -> Calibration:
        return self._calibrator.results()[self.branch]


def _diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around each call of the diffusion model."""
    names = list(inspect.signature(executor.original).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    options = given.get("transformer_options", {})
    run: _Run | None = options.get(KEY)
    call = None if run is None or "uuids" not in options else run.call(args[0], options)
    if call is None:
        return executor(*args, **kwargs)
    changed: dict[str, Any] = {"transformer_options": call.options(options)}
    if "control" in given:
        changed["control"] = call.control(given["control"])
    # Others in the chain expect each argument where it was.
    args = tuple(changed.get(name, value) for name, value in zip(names, args, strict=False))
    return executor(*args, **{name: changed.get(name, value) for name, value in kwargs.items()})


def _branches(x: Tensor, options: Options) -> list[BranchKey]:
    """The key of each conditioning in the batch; it begins with the branch of the guidance."""
    window = options.get("context_window")
    replaced = frozenset(
        (group, name)
        for group, names in options.get("patches_replace", {}).items()
        for name in names
    )
    size = x.shape[0] // len(options["uuids"])
    same = (
        tuple(window.index_list) if window is not None else None,
        (size, *x.shape[1:]),
        replaced,
    )
    return [
        (CONDITIONAL if which == 0 else UNCONDITIONAL, uuid, *same)
        for uuid, which in zip(options["uuids"], options["cond_or_uncond"], strict=True)
    ]


def _mean(calibrations: Sequence[Calibration]) -> Calibration:
    return Calibration(
        mean_of([each.ratios for each in calibrations]),
        mean_of([each.deviations for each in calibrations]),
        mean_of([each.distances for each in calibrations]),
    )
