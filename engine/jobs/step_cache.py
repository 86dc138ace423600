"""Drawing in fewer computed steps, or measuring for it, as the settings of MagCache say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .. import magcache
from ..architectures.base import Architecture
from ..block_cache import cached_blocks, calibrated_blocks
from ..config import Config
from ..errors import ConfigError
from ..events import Message, Reporter
from ..magcache import Plan, Rule
from ..magcache_choice import choose_curve, choose_plan, curve_remark
from ..magcache_curves import Calibration, format_ratios
from ..magcache_forecast import PREDICTIONS
from ..magcache_store import Identity, measured_in, save_measured
from ..weights import fingerprint
from .picture import SamplingSettings

_SCHEDULER = "euler"


def check(config: Config) -> None:
    """Whether the settings go together.

    Raises:
        ConfigError: they do not.
    """
    wanted = config.magcache
    leaves_out = wanted.magcache_mag_ratios is not None or wanted.magcache_steps is not None
    if wanted.magcache_calibration and leaves_out:
        raise ConfigError(
            "magcache_calibration computes every step, so it does not go with magcache_mag_ratios "
            "or magcache_steps; give one or the other"
        )


@dataclass
class StepCache:
    """For all pictures of one job, on one model.

    Args:
        plan: which steps are computed; None computes all, as without a cache.
    """

    config: Config
    architecture: Architecture
    transformer: nn.Module
    identity: Identity
    report: Reporter
    plan: Plan | None = None
    _measured: list[Mapping[str, Calibration]] = field(default_factory=list)

    @contextmanager
    def one_run(self) -> Iterator[None]:
        """Around the sampling of one batch."""
        wanted = self.config.magcache
        if wanted.magcache_calibration:
            steps = self.identity.steps
            with calibrated_blocks(self.architecture, self.transformer, steps) as cache:
                yield
                self._measured.append(cache.calibration())
        elif self.plan is not None:
            predict = PREDICTIONS[wanted.magcache_prediction]
            with cached_blocks(self.architecture, self.transformer, self.plan, predict=predict):
                yield
        else:
            yield

    def finish(self) -> None:
        """Tell what was measured, and store it where there is a folder for it.

        Raises:
            EngineError: the file there is damaged, or it cannot be written.
        """
        if not self._measured:
            return
        dit, folder = self.config.model.dit, self.config.magcache.magcache_curves
        measured = measured_in(self.identity, dit.name if dit else "", self._measured)
        for branch, calibration in measured.branches.items():
            ratios = format_ratios(calibration.ratios)
            self.report(Message(f"magcache_mag_ratios ({branch}) = {ratios}"))
        if folder:
            self.report(Message(f"stored in {save_measured(folder, measured)}"))


def step_cache(
    config: Config,
    architecture: Architecture,
    transformer: nn.Module,
    sampling: SamplingSettings,
    report: Reporter,
) -> StepCache:
    """Choose the plan, and tell what it is.

    Raises:
        ConfigError: there is no curve, or the plan is out of reach.
        DataError: a file of the folder of curves is damaged.
    """
    wanted, dit = config.magcache, config.model.dit
    assert dit is not None
    steps = sampling.num_steps
    identity = Identity(
        architecture.name, fingerprint(dit), _SCHEDULER, round(sampling.shift, 6), steps
    )
    cache = StepCache(config, architecture, transformer, identity, report)
    text = wanted.magcache_mag_ratios
    if text is None and wanted.magcache_steps is None:
        return cache
    curve = None
    if text is not None:
        curve = choose_curve(
            text,
            identity,
            folder=wanted.magcache_curves,
            file_name=dit.name,
            num_blocks=len(architecture.blocks(transformer)),
        )
    rule = Rule(wanted.magcache_retention_ratio, wanted.magcache_threshold, wanted.magcache_k)
    cache.plan = choose_plan(curve, steps, rule, num_computed=wanted.magcache_steps)
    told = [f"MagCache {magcache.describe(cache.plan)}"]
    told += [remark] if curve and (remark := curve_remark(curve, steps)) else []
    for sentence in told:
        report(Message(sentence))
    for concern in magcache.concerns(cache.plan, [dit.name]):
        report(Message(concern, "warning"))
    return cache
