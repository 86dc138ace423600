"""What a training would need and do, without training."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..engine import launch
from ..engine.atomic_file import write_text
from ..engine.config_file import to_toml
from . import native, paths, training
from .progress import NodeProgress, check_cancelled, free_memory
from .sockets import CATEGORY
from .train import more_training_inputs, training_inputs


class CheckTraining(io.ComfyNode):
    """Everything that Train LoRA looks at before it loads a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_CheckTraining",
            display_name="Check Training",
            category=CATEGORY,
            description="Looks at files, images, disk and memory as Train LoRA would with the same "
            "inputs, and trains nothing.",
            is_output_node=True,
            inputs=[*training_inputs(), *more_training_inputs()],
            outputs=[io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        config = training.config("Check Training", "continue", inputs)
        recipe = paths.temporary_file(f"{config.output.output_name}.check.toml")
        with NodeProgress(cls.hidden.unique_id) as progress:
            # As Train LoRA does, or the memory that is free would not be what it gets.
            free_memory()
            write_text(recipe, to_toml(native.on_comfyuis_device(config)))
            log = recipe.with_suffix(".log")
            launch.run_job("check", recipe, log=log, on_event=progress, poll=check_cancelled)
        report = "\n".join(progress.messages)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
