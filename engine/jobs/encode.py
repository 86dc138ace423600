"""The cache job: everything that a training needs encoded, the sample prompts too."""

from __future__ import annotations

from ..architectures import find_architecture
from ..config import Config
from ..events import Event, Finished, Reporter
from ..signals import StopSignals
from . import cache, sample_plan


def run(config: Config, report: Reporter) -> None:
    """Bring the cache up to date.

    Raises:
        EngineError: a setting, image, prompt or model file cannot be used.
        Stopped: a signal ended the job; what was encoded stays.
    """

    def but_the_end(event: Event) -> None:
        if not isinstance(event, Finished):
            report(event)

    cache.run(config, but_the_end)
    with StopSignals():
        architecture = find_architecture(config.model.architecture, config.model.dit)
        sample_plan.prepare(config, architecture, report)
    report(Finished("cache"))
