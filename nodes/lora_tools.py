"""Tools for LoRA files: which layers are trained, what is in a file, other formats and ranks.

A tool is only imported when it runs, as in the shell: ComfyUI waits for what packs import.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io, ui

from ..engine.atomic_file import write_text
from ..engine.config_file import to_toml
from . import paths, tool_runs
from .made_files import made
from .progress import NodeProgress
from .ranks import chosen_ranks, rank_inputs
from .sockets import CATEGORY, LoraType, TrainingModelType
from .widgets import combine, settings, widget

_MENU = f"{CATEGORY}/tools"


class LoraTargets(io.ComfyNode):
    """Which layers a training would train."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_LoraTargets",
            display_name="LoRA Targets",
            category=_MENU,
            description="Lists the layers that a training would train with these settings, with "
            "their ranks and sizes, and trains nothing.",
            search_aliases=["target modules", "patterns"],
            is_output_node=True,
            inputs=[
                TrainingModelType.Input("model"),
                widget("network_dim"),
                LoraType.Input("lora", optional=True),
            ],
            outputs=[io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: dict[str, Any], network_dim: int, lora: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        own = settings("LoRA Targets", {"network_dim": network_dim})
        config = combine(model, lora, own, where="LoRA Targets")
        recipe = paths.temporary_file(f"targets of node {cls.hidden.unique_id}.toml")
        with NodeProgress(cls.hidden.unique_id) as progress:
            write_text(recipe, to_toml(config))
            report = tool_runs.run_in_child("targets", ["--config_file", str(recipe)], progress)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


class InspectLora(io.ComfyNode):
    """What is in a LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_InspectLora",
            display_name="Inspect LoRA",
            category=_MENU,
            description="Tells how a LoRA is made and was trained, draws what every layer adds, "
            "and warns of layers that are broken or do nothing.",
            search_aliases=["analyze lora", "lora info", "metadata"],
            is_output_node=True,
            inputs=[
                tool_runs.lora_input(tooltip="The LoRA to look at."),
                io.Combo.Input(
                    "dit",
                    options=[paths.NO_FOLDER, *paths.diffusion_models()],
                    tooltip="Model that the LoRA is for: what each layer adds is then compared "
                    "with its weights.",
                ),
                io.Boolean.Input(
                    "verbose", default=False, tooltip="A line for every layer, and all metadata."
                ),
                tool_runs.architecture_input(),
                tool_runs.path_input(),
            ],
            outputs=[
                io.Image.Output(display_name="picture"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(
        cls, lora: str, dit: str, verbose: bool, architecture: str, lora_path: str | None = None
    ) -> io.NodeOutput:
        from ..engine.jobs import lora_inspect

        with NodeProgress(cls.hidden.unique_id) as progress:
            result = lora_inspect.run(
                source=tool_runs.source(lora, lora_path),
                architecture=architecture,
                dit=paths.chosen_model(dit),
                verbose=verbose,
                report=tool_runs.reporter(progress),
            )
        picture = tool_runs.picture(result)
        return io.NodeOutput(picture, result.report, ui=tool_runs.shown(cls, result))


class ConvertLora(io.ComfyNode):
    """Another spelling or number type."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_ConvertLora",
            display_name="Convert LoRA",
            category=_MENU,
            description="Writes a LoRA of any format with the layer names of another one, and in "
            "another number type.",
            search_aliases=["kohya", "diffusers", "peft", "lora format"],
            is_output_node=True,
            inputs=[
                tool_runs.lora_input(tooltip="The LoRA to convert."),
                tool_runs.format_input("comfyui"),
                tool_runs.dtype_input(),
                *tool_runs.output_inputs("converted"),
                tool_runs.path_input(),
            ],
            outputs=tool_runs.lora_outputs(picture=False),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(
        cls, output_name: str, existing_file: str, lora_path: str | None = None, **inputs: Any
    ) -> io.NodeOutput:
        from ..engine.jobs import lora_convert

        with NodeProgress(cls.hidden.unique_id):
            tool = partial(
                lora_convert.run,
                source=tool_runs.source(inputs["lora"], lora_path),
                format=inputs["format"],
                dtype=tool_runs.chosen(inputs["dtype"]),
                architecture=inputs["architecture"],
            )
            output = tool_runs.new_lora("Convert LoRA", output_name)
            return tool_runs.lora_output(cls, made(tool, output, existing_file))


class ResizeLora(io.ComfyNode):
    """Lower ranks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_ResizeLora",
            display_name="Resize LoRA",
            category=_MENU,
            description="Writes a LoRA of a lower rank that does nearly the same. LoHa and LoKr "
            "become LoRA.",
            search_aliases=["rank", "svd", "lora size"],
            is_output_node=True,
            inputs=[
                tool_runs.lora_input(tooltip="The LoRA to resize."),
                *rank_inputs(rank=8),
                *tool_runs.output_inputs("resized"),
                tool_runs.format_input(advanced=True),
                tool_runs.dtype_input(advanced=True),
                tool_runs.path_input(),
            ],
            outputs=tool_runs.lora_outputs(picture=True),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(
        cls, output_name: str, existing_file: str, lora_path: str | None = None, **inputs: Any
    ) -> io.NodeOutput:
        from ..engine.jobs import lora_resize

        with NodeProgress(cls.hidden.unique_id) as progress:
            tool = partial(
                lora_resize.run,
                source=tool_runs.source(inputs["lora"], lora_path),
                ranks=chosen_ranks(inputs),
                dtype=tool_runs.chosen(inputs["dtype"]),
                format=tool_runs.chosen(inputs["format"]),
                architecture=inputs["architecture"],
                report=tool_runs.reporter(progress),
            )
            output = tool_runs.new_lora("Resize LoRA", output_name)
            return tool_runs.lora_output(cls, made(tool, output, existing_file))
