"""What Train LoRA does: a config from its inputs, and a child process that trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from comfy.model_management import InterruptProcessingException

from ..engine import launch
from ..engine.architectures import find_architecture
from ..engine.atomic_file import write_text
from ..engine.config import Config
from ..engine.config_file import to_toml
from ..engine.errors import ConfigError, EngineError
from ..engine.events import Reporter
from ..engine.jobs.outputs import RunFiles, find_start
from . import control, native, paths
from .live_samples import LiveSamples
from .progress import NodeProgress, free_memory
from .widgets import combine, settings

logger = logging.getLogger(__name__)

# Inputs that carry settings; later ones win, the widgets over all.
SOCKETS = (
    "model",
    "dataset",
    "lora",
    "optimizer",
    "lr_scheduler",
    "timesteps",
    "options",
    "loss",
    "validation",
    "samples",
    "logging",
    "compile",
    "metadata",
)
EXISTING_RUN: dict[str, dict[str, bool]] = {
    "continue": {"resume": True, "overwrite": False},
    "replace": {"resume": False, "overwrite": True},
}


def config(where: str, existing_run: str, inputs: Mapping[str, Any]) -> Config:
    """The config of a training from the inputs of a node: sockets by name, and widgets.

    Raises:
        ConfigError: a value cannot be; ``where`` names the node.
    """
    widgets = {name: value for name, value in inputs.items() if name not in SOCKETS}
    own = settings(where, widgets) | EXISTING_RUN[existing_run]
    if own["output_name"] is None:
        raise ConfigError(f"{where}: output_name is empty; give the LoRA a name")
    parts = [inputs.get(name) for name in SOCKETS]
    return combine(*parts, own, {"output_dir": paths.loras_folder()}, where=where)


def last_change(output_name: Any) -> int | None:
    """When the LoRA of that name was written last; None if there is none."""
    if not isinstance(output_name, str):
        return None
    path = RunFiles(paths.loras_folder(), output_name).lora
    return path.stat().st_mtime_ns if path.exists() else None


def train(config: Config, vae: Any, node_id: str) -> list[str]:
    """Run the training unless it is finished; gives what it had to say.

    Raises:
        EngineError: it cannot be started, failed or was stopped before its first step; what was
            saved is whole.
        InterruptProcessingException: the user cancelled; everything is saved.
    """
    # As much again as all other modules of the pack, and ComfyUI's start should not wait for it.
    from ..engine.jobs import train as job

    with NodeProgress(node_id) as progress:
        files, _ = find_start(config)
        config = native.on_comfyuis_device(config)
        if job.is_finished(config):
            return [f"{files.lora.name} was finished already"]
        family = find_architecture(config.model.architecture, config.model.dit)
        if vae is not None:
            native.check_vae(vae, family)
        progress.text("starting the training process")
        free_memory()
        shown = LiveSamples(progress, node_id, config, family, vae)
        try:
            told_to_stop = _run(config, files, node_id, shown)
        except InterruptProcessingException:
            progress.message("info", "stopped", _stopped(config, progress))
            logger.info("%s", _stopped(config, progress))
            raise
        if told_to_stop:
            return _stopped_early(config, files, progress)
        progress.text(f"finished: {files.lora.name}")
    return progress.messages


def _run(config: Config, files: RunFiles, node_id: str, report: Reporter) -> bool:
    """Whether the run was told to stop and to give what it has."""
    # Not beside the LoRA: there lies the recipe of what was trained so far.
    recipe = paths.temporary_file(f"{files.name}.toml")
    write_text(recipe, to_toml(config))
    with control.running(node_id, files) as run:
        ended = launch.run_job("train", recipe, log=files.log, on_event=report, poll=run.poll)
        if ended.stopped and not run.was_told_to_stop():
            raise EngineError(
                "something else than Cancel or Stop ended the training process. Everything is "
                "saved; queue again to continue"
            )
    return ended.stopped


def _stopped_early(config: Config, files: RunFiles, progress: NodeProgress) -> list[str]:
    """What there is to say of a run that was told to stop and to give what it has."""
    stopped = _stopped(config, progress)
    if not files.lora.exists():
        raise EngineError(f"there is no LoRA yet. {stopped}")
    progress.message("info", "stopped", stopped)
    return [*progress.messages, stopped]


def _stopped(config: Config, progress: NodeProgress) -> str:
    last = progress.last
    where = f"after step {last.done} of {last.total}" if last else "before its first step"
    continues = "set existing_run to continue and queue" if config.output.overwrite else "queue"
    return f"Stopped {where}. Everything is saved; {continues} again to continue."
