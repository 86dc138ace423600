"""From the settings of MagCache and a curve of ratios to a plan, and back from runs to curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..engine.errors import ConfigError, DataError
from ..engine.magcache import (
    PRESETS,
    Plan,
    Rule,
    concerns,
    describe,
    full_plan,
    greedy_plan,
    optimal_plan,
    resampled,
)
from ..engine.magcache_curves import (
    CONDITIONAL,
    Calibration,
    Curve,
    format_ratios,
    parse_ratios,
    published_curve,
)
from ..engine.magcache_store import Identity, Measured, find_curve, read_measured, save_measured
from .native_cache import CalibratedRun, CalibratedRuns
from .native_model import NativeModel, Part, RunFacts

AUTO, PUBLISHED = "auto", "0"
CUSTOM = "custom"
CHOICES = [*PRESETS, CUSTOM]
# The ratio of steps that a calibration of a part of a run has not seen: an error of 1 and more, so
# that they are computed.
_NOT_MEASURED = 2.0


@dataclass(frozen=True)
class CacheSettings:
    """What decides which steps of a run are computed.

    Args:
        share: the part of the steps to compute, placed where they do most good; None to follow the
            rule.
        ratios: `AUTO`, `PUBLISHED` or a list.
        folder: of measured curves.
    """

    model: NativeModel
    rule: Rule
    share: float | None
    ratios: str
    folder: Path

    def curve(self, facts: RunFacts) -> Curve:
        """That of the run.

        Raises:
            ConfigError: there is none, or a list that cannot be.
            DataError: a stored one is damaged.
        """
        model, text = self.model, self.ratios.strip()
        if text == AUTO:
            identity = _identity(model, facts)
            num_blocks = len(model.blocks)
            found = find_curve(self.folder, identity, file_name=model.name, num_blocks=num_blocks)
        elif text == PUBLISHED:
            steps = facts.part.steps
            found = published_curve(model.family, file_name=model.name, steps=steps)
        else:
            ratios = {CONDITIONAL: parse_ratios(text, "MagCache, ratios")}
            found = Curve("given in the node", ratios)
        if found is None:
            raise ConfigError(
                f"MagCache: there is no curve for {model.name or 'this model'} ({model.family} "
                f"with {len(model.blocks)} blocks); put MagCache Calibrate before a sampler and "
                "Save MagCache Ratios after it, and sample once"
            )
        return found

    def plan(self, facts: RunFacts) -> Plan:
        """For the part of a run that the model makes; all branches of the guidance follow it.

        Raises:
            ConfigError, DataError: as for `curve`, or too few steps are to be computed.
        """
        part = facts.part
        if self.model.hindrance:
            return full_plan(part.end - part.first)
        handovers = [step for step in (part.first, part.end) if 0 < step < part.steps]
        return self._plan(self.curve(facts), part, handovers)

    def preview(self, steps: int, shift: float) -> tuple[Curve, Plan]:
        """What a whole run of so many steps would do."""
        facts = RunFacts(Part(0, steps, steps), "", shift)
        curve = self.curve(facts)
        handovers = [] if curve.handover is None else [round(curve.handover * steps / curve.steps)]
        return curve, self._plan(curve, facts.part, [each for each in handovers if each < steps])

    def _plan(self, curve: Curve, part: Part, handovers: Sequence[int]) -> Plan:
        # Both branches of the guidance do the same in every step, since it enlarges what they
        # differ by.
        ratios, rule = curve.of(CONDITIONAL), self.rule
        if self.share is None:
            plan = greedy_plan(ratios, part.steps, rule, handovers=handovers)
            return plan.part(part.first, part.end)
        own = resampled(ratios, part.steps)[part.first : part.end]
        inner = [step - part.first for step in handovers if part.first < step < part.end]
        number = max(round(self.share * len(own)), 1)
        try:
            return optimal_plan(
                own,
                len(own),
                number,
                retention_ratio=rule.retention_ratio,
                k=rule.k,
                handovers=inner,
            )
        except ConfigError as error:
            raise ConfigError(f"MagCache, steps_to_compute: {error}") from None


def explain(curve: Curve, plan: Plan, model: NativeModel) -> str:
    """A plan for people, with what it is made of and what speaks against it."""
    lines = [
        describe(plan, other_cost=model.side_cost),
        f"computed steps: {_ranges(plan)}",
        f"ratios {curve.origin}:",
        format_ratios(resampled(curve.of(CONDITIONAL), plan.steps)),
        *concerns(plan, [model.name]),
    ]
    if model.side_cost:
        lines.append(
            f"VACE's own blocks run in skipped steps, too, which is {model.side_cost:.0%} of a step"
        )
    return "\n".join(lines)


def store(runs: CalibratedRuns, folder: Path, *, replace: bool) -> tuple[Path, Measured]:
    """Store what was measured and not stored yet; gives the curve as it is now.

    Raises:
        ConfigError: no run was measured.
        DataError: a run could not be, or a stored file is damaged.
        EngineError: the file cannot be written.
    """
    while runs.waiting:
        run = runs.waiting[0]
        if run.problem:
            del runs.waiting[0]
            raise DataError(f"MagCache: {run.problem}")
        runs.stored = save_measured(folder, measured_by(run), replace=replace)
        del runs.waiting[0]
        replace = False  # the others are of this time, too
    if runs.stored is None:
        raise ConfigError(
            "Save MagCache Ratios: no run was measured; connect the model that MagCache Calibrate "
            "gives to the sampler, and the sampler's latent to this node"
        )
    return runs.stored, read_measured(runs.stored)


def measured_by(run: CalibratedRun) -> Measured:
    """One run as a curve of all steps, of which it may have been a part."""
    part = run.facts.part
    before, after = part.first, part.steps - part.end

    def whole(calibration: Calibration) -> Calibration:
        fillers = {"ratios": _NOT_MEASURED, "deviations": 0.0, "distances": 0.0}
        return Calibration(
            **{
                name: (fillers[name],) * before + tuple(values) + (fillers[name],) * after
                for name, values in asdict(calibration).items()
            }
        )

    branches = {name: whole(each) for name, each in run.branches.items()}
    return Measured(_identity(run.model, run.facts), run.model.name, 1, branches)


def _identity(model: NativeModel, facts: RunFacts) -> Identity:
    scheduler = facts.scheduler
    if not facts.part.is_whole:
        scheduler = f"{scheduler}, {facts.part}"
    shift = round(facts.shift, 4)
    return Identity(model.family, model.identity, scheduler, shift, facts.part.steps)


def _ranges(plan: Plan) -> str:
    """The computed steps from 1: "1-5, 9, 25"."""
    found: list[list[int]] = []
    for step, now in enumerate(plan.computed, start=1):
        if now and found and found[-1][-1] == step - 1:
            found[-1].append(step)
        elif now:
            found.append([step])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)
