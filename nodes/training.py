"""What Train LoRA does: a config from its inputs, a child process, and what came of it."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import Any

import comfy.utils
from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..engine import launch, media, plots
from ..engine.architectures import find_architecture
from ..engine.atomic_file import write_text
from ..engine.config import Config
from ..engine.config_file import to_toml
from ..engine.errors import ConfigError, EngineError
from ..engine.jobs import previews
from ..engine.jobs import train as job
from ..engine.jobs.outputs import RunFiles, find_start
from ..engine.loss_history import Step, read_history
from . import native, paths
from .images import to_comfy
from .progress import NodeProgress, check_cancelled, free_memory
from .widgets import combine, settings

logger = logging.getLogger(__name__)

# Inputs that carry settings; later ones win, the widgets over all.
SOCKETS = ("model", "dataset", "lora", "optimizer", "lr_scheduler", "timesteps", "options")
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


def lora_exists(output_name: Any) -> bool:
    """Whether there is a LoRA of that name already."""
    return (
        isinstance(output_name, str) and RunFiles(paths.loras_folder(), output_name).lora.exists()
    )


def train(config: Config, node_id: str) -> list[str]:
    """Run the training unless it is finished; gives what it had to say.

    Raises:
        EngineError: it cannot be started or failed; what was saved is whole.
        InterruptProcessingException: the user cancelled; everything is saved.
    """
    with NodeProgress(node_id) as progress:
        files, _ = find_start(config)
        config = native.on_comfyuis_device(config)
        if job.is_finished(config):
            return [f"{files.lora.name} was finished already"]
        progress.text("starting the training process")
        free_memory()
        # Not beside the LoRA: there lies the recipe of what was trained so far.
        recipe = paths.temporary_file(f"{files.name}.toml")
        write_text(recipe, to_toml(config))
        try:
            ended = launch.run_job(
                "train", recipe, log=files.log, on_event=progress, poll=check_cancelled
            )
        except InterruptProcessingException:
            progress.message("info", "stopped", _stopped(progress))
            logger.info("%s", _stopped(progress))
            raise
        if ended.stopped:
            raise EngineError(
                f"something else than Cancel ended the training process. {_stopped(progress)}"
            )
        progress.text(f"finished: {files.lora.name}")
    return progress.messages


def results(
    config: Config, vae: Any, messages: list[str], node: type[io.ComfyNode]
) -> io.NodeOutput:
    """The outputs of a finished run, read from its files."""
    files, _ = find_start(config)
    steps = read_history(files.history)
    curve = to_comfy([plots.loss_curve(steps, title=f"{files.name}: training loss")])
    report = "\n".join([_summary(files, steps), *messages])
    return io.NodeOutput(
        comfy.utils.load_torch_file(str(files.lora), safe_load=True),
        str(files.lora),
        {"loss": [step.loss for step in steps]},
        curve,
        _previews(config, files, vae),
        report,
        ui=ui.PreviewImage(curve, cls=node).as_dict() | ui.PreviewText(report).as_dict(),
    )


def _stopped(progress: NodeProgress) -> str:
    last = progress.last
    where = f"after step {last.done} of {last.total}" if last else "before its first step"
    return f"Stopped {where}. Everything is saved; queue again to continue."


def _summary(files: RunFiles, steps: list[Step]) -> str:
    last = steps[-max(1, len(steps) // 10) :]
    loss = statistics.mean(step.loss for step in last)
    seconds = statistics.median(step.seconds for step in steps)
    return (
        f"{files.lora.name}: {steps[-1].step} steps, loss {loss:.4f} at the end, "
        f"{seconds:.3g} s a step\n{files.lora}"
    )


def _previews(config: Config, files: RunFiles, vae: Any) -> Any:
    """IMAGE of the previews; without any, the nodes that wait for them are left out."""
    raw = previews.read_latents(files) if config.output.preview_images else None
    if raw is None:
        return ExecutionBlocker(None)
    if vae is not None:
        return native.decode(vae, raw)
    drawn = [files.preview(index) for index in range(raw.shape[0])]
    if all(path.exists() for path in drawn):
        return to_comfy([media.load_image(path) for path in drawn])
    # A recipe may leave the family to be found.
    family = find_architecture(config.model.architecture, config.model.dit)
    return native.approximate(family.name, raw)
