"""Tools that make one file of several: merge, combine, extract, post-hoc EMA.

A tool is only imported when it runs, as in the shell: ComfyUI waits for what packs import.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io, ui

from . import averaging, extraction, paths, tool_runs
from .made_files import made
from .progress import NodeProgress
from .ranks import chosen_ranks, rank_inputs
from .sockets import CATEGORY

_MENU = f"{CATEGORY}/tools"


class MergeLora(io.ComfyNode):
    """A model with LoRAs in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_MergeLora",
            display_name="Merge LoRA into Model",
            category=_MENU,
            description="Writes a diffusion model with LoRAs merged in, into ComfyUI's "
            "diffusion_models folder. FP8 models stay FP8.",
            search_aliases=["bake lora", "save model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "dit",
                    options=paths.diffusion_models(),
                    tooltip="The model; a part of a set means the whole set.",
                ),
                *tool_runs.several_loras(),
                *tool_runs.output_inputs("merged"),
                tool_runs.dtype_input(advanced=True),
                tool_runs.path_input("lora_1"),
            ],
            outputs=[
                io.String.Output(display_name="model path"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(
        cls, dit: str, output_name: str, existing_file: str, **inputs: Any
    ) -> io.NodeOutput:
        from ..engine.jobs import lora_merge

        with NodeProgress(cls.hidden.unique_id) as progress:
            tool = partial(
                lora_merge.run,
                dit=paths.diffusion_model(dit),
                loras=tool_runs.weighted_sources(inputs),
                dtype=tool_runs.chosen(inputs["dtype"]),
                architecture=inputs["architecture"],
                report=tool_runs.reporter(progress),
            )
            output = tool_runs.new_model("Merge LoRA into Model", output_name)
            result = made(tool, output, existing_file)
        return io.NodeOutput(str(result.path), result.report, ui=ui.PreviewText(result.report))


class CombineLoras(io.ComfyNode):
    """One LoRA of several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_CombineLoras",
            display_name="Combine LoRAs",
            category=_MENU,
            description="Writes one LoRA that does what several do together, exactly or with a "
            "lower rank.",
            search_aliases=["merge loras", "add loras"],
            is_output_node=True,
            inputs=[
                *tool_runs.several_loras(),
                *rank_inputs(rank=0, unset="nothing is lost, the ranks add up"),
                *tool_runs.output_inputs("combined"),
                tool_runs.format_input(advanced=True),
                tool_runs.dtype_input(advanced=True),
                tool_runs.path_input("lora_1"),
            ],
            outputs=tool_runs.lora_outputs(picture=False),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(cls, output_name: str, existing_file: str, **inputs: Any) -> io.NodeOutput:
        from ..engine.jobs import lora_combine

        lower = inputs["rank"] or inputs["amount"]
        with NodeProgress(cls.hidden.unique_id) as progress:
            tool = partial(
                lora_combine.run,
                sources=tool_runs.weighted_sources(inputs),
                ranks=chosen_ranks(inputs) if lower else None,
                dtype=tool_runs.chosen(inputs["dtype"]),
                format=tool_runs.chosen(inputs["format"]),
                architecture=inputs["architecture"],
                report=tool_runs.reporter(progress),
            )
            output = tool_runs.new_lora("Combine LoRAs", output_name)
            return tool_runs.lora_output(cls, made(tool, output, existing_file))


class ExtractLora(io.ComfyNode):
    """The difference of two models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = paths.diffusion_models()
        return io.Schema(
            node_id="LoraLoom_ExtractLora",
            display_name="Extract LoRA",
            category=_MENU,
            description="Writes the LoRA that turns one model into another that was tuned from "
            "it, as nearly as its rank allows.",
            search_aliases=["svd", "difference", "checkpoint to lora"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("tuned", options=models, tooltip="The model that was tuned."),
                io.Combo.Input("base", options=models, tooltip="The model it was made from."),
                *rank_inputs(rank=32),
                *tool_runs.output_inputs("extracted"),
                tool_runs.format_input("comfyui", advanced=True),
                tool_runs.dtype_input("bf16", advanced=True),
                *extraction.inputs(),
            ],
            outputs=tool_runs.lora_outputs(picture=True),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(
        cls, tuned: str, base: str, output_name: str, existing_file: str, **inputs: Any
    ) -> io.NodeOutput:
        with NodeProgress(cls.hidden.unique_id) as progress:
            tool = partial(
                extraction.run,
                tuned=paths.diffusion_model(tuned),
                base=paths.diffusion_model(base),
                arguments=extraction.arguments(inputs),
                report=progress,
            )
            output = tool_runs.new_lora("Extract LoRA", output_name)
            return tool_runs.lora_output(cls, made(tool, output, existing_file))


class PostHocEma(io.ComfyNode):
    """The mean of what a training saved on its way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_PostHocEma",
            display_name="Post-hoc EMA",
            category=_MENU,
            description="Averages the LoRAs that a training saved on its way, which is often "
            "better than the last of them.",
            search_aliases=["average", "checkpoint averaging", "smooth"],
            is_output_node=True,
            inputs=[
                tool_runs.lora_input(
                    tooltip="One LoRA of the training; those of its other steps and epochs are "
                    "found by their names."
                ),
                averaging.sigma_rel_input(),
                *tool_runs.output_inputs("averaged"),
                *averaging.more_inputs(),
                tool_runs.dtype_input(advanced=True),
                tool_runs.path_input(),
            ],
            outputs=tool_runs.lora_outputs(picture=True),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs | averaging.named(inputs))

    @classmethod
    def execute(cls, output_name: str, existing_file: str, **inputs: Any) -> io.NodeOutput:
        from ..engine.jobs import lora_ema

        output = tool_runs.new_lora("Post-hoc EMA", output_name)
        with NodeProgress(cls.hidden.unique_id) as progress:
            tool = partial(
                lora_ema.run,
                sources=averaging.saved_loras(inputs, output),
                averaging=averaging.chosen(inputs),
                sort=inputs["sort"],
                dtype=tool_runs.chosen(inputs["dtype"]),
                architecture=inputs["architecture"],
                report=tool_runs.reporter(progress),
            )
            return tool_runs.lora_output(cls, made(tool, output, existing_file))
