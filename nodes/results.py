"""What a training has left behind, as the outputs of Train LoRA."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..engine import media, plots
from ..engine.architectures import find_architecture
from ..engine.config import Config
from ..engine.jobs import previews, samples
from ..engine.jobs.outputs import RunFiles, find_start
from ..engine.latent_file import read_latents
from ..engine.loss_history import Step, read_history
from ..engine.validation_history import read_validation
from . import native
from .images import to_comfy


def outputs(
    config: Config, vae: Any, messages: list[str], node: type[io.ComfyNode]
) -> io.NodeOutput:
    """The outputs of a run that ended, read from its files.

    Without previews, samples or statistics, the nodes that wait for them are left out.
    """
    files, _ = find_start(config)
    steps, validation = read_history(files.history), _validation(files)
    picture = plots.loss_curve(steps, title=f"{files.name}: training loss", validation=validation)
    curve = to_comfy([picture])
    report = "\n".join([_summary(files, steps, validation), *messages])
    return io.NodeOutput(
        comfy.utils.load_torch_file(str(files.lora), safe_load=True),
        str(files.lora),
        {"loss": [step.loss for step in steps]},
        curve,
        _previews(config, files, vae),
        report,
        _samples(config, files, vae),
        _loss_by_time(files),
        ui=ui.PreviewImage(curve, cls=node).as_dict() | ui.PreviewText(report).as_dict(),
    )


def _validation(files: RunFiles) -> list[tuple[int, float]]:
    """Step and loss of each measurement that came out as a number."""
    measured = read_validation(files.validation)
    return [(each.step, each.loss) for each in measured if math.isfinite(each.loss)]


def _summary(files: RunFiles, steps: list[Step], validation: list[tuple[int, float]]) -> str:
    last = steps[-max(1, len(steps) // 10) :]
    loss = statistics.mean(step.loss for step in last)
    seconds = statistics.median(step.seconds for step in steps)
    lines = [
        f"{files.lora.name}: {steps[-1].step} steps, loss {loss:.4f} at the end, "
        f"{seconds:.3g} s a step"
    ]
    if validation:
        best, lowest = min(validation, key=lambda measured: measured[1])
        lines.append(
            f"validation loss {validation[-1][1]:.4f} at the end, lowest {lowest:.4f} after step "
            f"{best}"
        )
    return "\n".join([*lines, str(files.lora)])


def _previews(config: Config, files: RunFiles, vae: Any) -> Any:
    raw = previews.read_latents(files) if config.output.preview_images else None
    if raw is None:
        return ExecutionBlocker(None)
    drawn = [files.preview(index) for index in range(raw.shape[0])]
    if vae is None and all(path.exists() for path in drawn):
        return to_comfy([media.load_image(path) for path in drawn])
    return _decoded(config, vae, raw)


def _samples(config: Config, files: RunFiles, vae: Any) -> Any:
    """A list of IMAGE, because samples may have different sizes: those that were drawn last."""
    found = samples.sample_files(files)
    last = {file.index: file.path for file in found if file.step == found[-1].step}
    images: list[Tensor] = []
    for path in last.values():  # the picture where there is one, otherwise the latents
        if path.suffix == ".png":
            images.append(to_comfy([media.load_image(path)]))
        elif (raw := read_latents(path)) is not None:
            images.append(_decoded(config, vae, raw))
    return images or ExecutionBlocker(None)


def _decoded(config: Config, vae: Any, raw_NCHW: Tensor) -> Tensor:
    """IMAGE, only approximate without a VAE."""
    if vae is not None:
        return native.decode(vae, raw_NCHW)
    # A recipe may leave the family to be found.
    family = find_architecture(config.model.architecture, config.model.dit)
    return native.approximate(family.name, raw_NCHW)


def _loss_by_time(files: RunFiles) -> Any:
    if not files.loss_by_time.exists():
        return ExecutionBlocker(None)
    record = json.loads(files.loss_by_time.read_text("utf-8"))
    if not any(record["count"]):
        return ExecutionBlocker(None)
    title = f"{files.name}: training loss by noise level"
    return to_comfy([plots.loss_by_time(record["mean"], record["count"], title=title)])
