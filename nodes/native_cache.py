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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.block_cache import Calibrator
from ..engine.errors import DataError
from ..engine.magcache import Plan, concerns, describe, full_plan
from ..engine.magcache_curves import CONDITIONAL, UNCONDITIONAL, Calibration, mean_of
from .native_model import BlockName, NativeModel, RunFacts, run_facts

logger = logging.getLogger(__name__)

KEY = "lora_loom_magcache"

Planner = Callable[[RunFacts], Plan]
Options = Mapping[str, Any]
# ComfyUI's options of a call, and those of the blocks.
Replacer = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
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

    def call(self, x: Tensor, options: Options) -> _Call | None:
        """What a call of the diffusion model is to replace; None for nothing."""
        # The only wait for the device, once for a call of the model.
        sigma = float(options["sigmas"][0])
        step = int((self._sigmas - sigma).abs().argmin())
        keys = _branches(x, options)
        planned = not self.plan.computed[step]
        skips = planned and all(key in self.residuals for key in keys)
        self.num_calls += 1
        self.num_skipped += skips
        if skips:
            return _Call(self, keys, step, skips=True)
        for key in keys:  # the blocks may need the memory
            self.residuals.pop(key, None)
        last = self.plan.steps - 1
        used = planned or (step < last and not self.plan.computed[step + 1])
        return _Call(self, keys, step, skips=False) if used or self.calibrates else None

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


class _Call:
    """One call of the diffusion model, with what its first and last blocks share."""

    def __init__(self, run: _Run, keys: list[BranchKey], step: int, *, skips: bool) -> None:
        self.skips = skips
        self._run, self._keys, self._step = run, keys, step
        self._image_BND: Tensor | None = None

    def options(self, options: Options) -> dict[str, Any]:
        """Those of the call, with other blocks."""
        replaced = {**options.get("patches_replace", {})}
        blocks = {**replaced.get("dit", {})}
        names = self._run.blocks
        for name in names if self.skips else (names[0], names[-1]):
            replacer = self._pass if self.skips else self._watch
            blocks[name] = replacer(name, blocks.get(name))
        changed = {**options, "patches_replace": {**replaced, "dit": blocks}}
        if self.skips and "double_block" in options.get("patches", {}):
            last = [_only_after(names[-1], patch) for patch in options["patches"]["double_block"]]
            changed["patches"] = {**options["patches"], "double_block": last}
        return changed

    def control(self, control: Options | None) -> Options | None:
        """What a ControlNet adds: what follows the last block, if the residual has the rest."""
        if not self.skips or control is None:
            return control
        kind, index = self._run.blocks[-1]
        name = "input" if kind == "double_block" else "output"
        values = [*control.get(name, [])]
        kept: dict[str, list[Any]] = {"input": [], "middle": [], "output": []}
        kept[name] = [None] * index + values[index : index + 1]
        return kept

    def _watch(self, name: BlockName, existing: Replacer | None) -> Replacer:
        """Computes the block, and keeps what all blocks together add."""

        def block(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            if name == self._run.blocks[0]:
                # Blocks and ControlNets change the tensor in place.
                self._image_BND = arguments["img"].clone()
            original = extra["original_block"]
            result = existing(arguments, extra) if existing else original(arguments)
            if name == self._run.blocks[-1]:
                entered_BND = self._image_BND
                assert entered_BND is not None
                left_BND = result["img"][:, _text_length(name, arguments) :]
                torch.sub(left_BND, entered_BND, out=entered_BND)
                self._run.keep(self._keys, self._step, entered_BND)
            return result

        return block

    def _pass(self, name: BlockName, existing: Replacer | None) -> Replacer:
        """Computes nothing; the picture leaves the last block with the residual."""

        def block(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            image_BND = arguments["img"]
            if name == self._run.blocks[0]:
                kept = [self._run.residuals[key].to(image_BND.device) for key in self._keys]
                self._image_BND = image_BND + (kept[0] if len(kept) == 1 else torch.cat(kept))
            result = {part: arguments[part] for part in ("img", "txt") if part in arguments}
            if name == self._run.blocks[-1]:
                assert self._image_BND is not None
                text_BND = image_BND[:, : _text_length(name, arguments)]
                alone = not text_BND.shape[1]
                result["img"] = (
                    self._image_BND if alone else torch.cat([text_BND, self._image_BND], dim=1)
                )
            return result

        return block


def _diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around each call of the diffusion model."""
    names = list(inspect.signature(executor.original).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    options = given.get("transformer_options", {})
    run: _Run | None = options.get(KEY)
    call = None if run is None or "uuids" not in options else run.call(args[0], options)
    if call is None:
        return executor(*args, **kwargs)
    changed = {"transformer_options": call.options(options)}
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


def _text_length(name: BlockName, arguments: Options) -> int:
    """How many tokens of text stand before the picture's."""
    kind, _ = name
    return arguments["transformer_options"]["img_slice"][0] if kind == "single_block" else 0


def _only_after(last: BlockName, patch: Callable[..., Any]) -> Callable[..., Any]:
    """A patch of a block's output, as it is in a step that skips all: the residual has the rest."""

    def patched(arguments: dict[str, Any]) -> dict[str, Any]:
        return patch(arguments) if ("double_block", arguments["block_index"]) == last else arguments

    return patched


def _mean(calibrations: Sequence[Calibration]) -> Calibration:
    return Calibration(
        mean_of([each.ratios for each in calibrations]),
        mean_of([each.deviations for each in calibrations]),
        mean_of([each.distances for each in calibrations]),
    )
