"""Models in 8 bits: loading one as ComfyUI's MODEL, and writing one to a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..engine.quantization_report import error_plot
from ..engine.quantized_file import LAYOUTS
from ..engine.quantized_loading import QuantizationSettings
from . import paths, tool_runs
from .eight_bit_model import LoadedModel, ModelRequest, load_model
from .images import to_comfy
from .made_files import made
from .progress import NodeProgress
from .sockets import CATEGORY
from .widgets import settings, widget

_MENU = f"{CATEGORY}/models"


class LoadQuantizedModel(io.ComfyNode):
    """A native model whose layers are in 8 bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_LoadQuantizedModel",
            display_name="Load Quantized Model",
            category=_MENU,
            description="Loads a diffusion model with the weights of its blocks in 8 bits, with a "
            "scale for every few of them: half the memory of bf16, and a smaller error than FP8 "
            "with one scale. Every sampler and LoRA loader takes it. Files that are in 8 bits "
            "already are loaded as they are.",
            search_aliases=["fp8", "int8", "unet loader", "load diffusion model", "scaled fp8"],
            inputs=[
                _model_input(),
                *_settings_inputs(),
                *tool_runs.several_loras(),
                io.Boolean.Input(
                    "measure_errors",
                    default=False,
                    advanced=True,
                    tooltip="Find out what rounding changed, for the report and the picture; "
                    "loading takes about twice as long.",
                ),
                tool_runs.architecture_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="errors"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return tool_runs.fingerprint(inputs)

    @classmethod
    def execute(
        cls, dit: str, measure_errors: bool, architecture: str, **inputs: Any
    ) -> io.NodeOutput:
        path = paths.diffusion_model(dit)
        chosen = _settings("Load Quantized Model", inputs)
        request = ModelRequest(path, chosen, _loras(inputs), measure_errors, architecture)
        with NodeProgress(cls.hidden.unique_id) as progress:
            loaded = load_model(request, report=tool_runs.reporter(progress))
        picture, shown = _error_picture(path, loaded), ui.PreviewText(loaded.report)
        return io.NodeOutput(loaded.patcher, loaded.report, picture, ui=shown)


class QuantizeModel(io.ComfyNode):
    """A file of a model in 8 bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_QuantizeModel",
            display_name="Quantize Model",
            category=_MENU,
            description="Writes a diffusion model with the weights of its blocks in 8 bits into "
            "ComfyUI's diffusion_models folder, LoRAs merged in, and shows what that costs.",
            search_aliases=["fp8", "int8", "convert model", "save fp8 model"],
            is_output_node=True,
            inputs=[
                _model_input(),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    tooltip="blockwise: scales as chosen below, for Load Quantized Model, training "
                    "and musubi-tuner. comfyui: one scale for each layer, for ComfyUI's own Load "
                    "Diffusion Model.",
                ),
                *_settings_inputs(),
                *tool_runs.several_loras(shown=1),
                *tool_runs.output_inputs("quantized"),
            ],
            outputs=[
                io.String.Output(display_name="model path"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="errors"),
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
        from ..engine.jobs import quantize

        with NodeProgress(cls.hidden.unique_id) as progress:
            tool = partial(
                quantize.run,
                dit=paths.diffusion_model(dit),
                settings=_settings("Quantize Model", inputs),
                loras=_loras(inputs),
                layout=inputs["layout"],
                architecture=inputs["architecture"],
                report=tool_runs.reporter(progress),
            )
            output = tool_runs.new_model("Quantize Model", output_name)
            result = made(tool, output, existing_file)
        picture, shown = tool_runs.picture(result), tool_runs.shown(cls, result)
        return io.NodeOutput(str(result.path), result.report, picture, ui=shown)


def _model_input() -> io.Input:
    return io.Combo.Input(
        "dit",
        options=paths.diffusion_models(),
        tooltip="The model; a part of a set means the whole set.",
    )


def _settings_inputs() -> list[io.Input]:
    return [
        widget("quantize_format"),
        widget("quantize_mode"),
        widget("quantize_block_size", step=16, advanced=True),
        widget("quantize_search", advanced=True),
        widget("quantize_scale_dtype", advanced=True),
        widget("quantize_compat", advanced=True),
        widget("quantize_exclude_patterns", advanced=True, placeholder=r"double_blocks\.0\..*"),
    ]


def _settings(where: str, inputs: Mapping[str, Any]) -> QuantizationSettings:
    """What the widgets mean; ``where`` names the node in messages."""
    own = {name: value for name, value in inputs.items() if name.startswith("quantize_")}
    given = settings(where, own)
    return QuantizationSettings(
        format=given["quantize_format"],
        mode=given["quantize_mode"],
        block_size=given["quantize_block_size"],
        scale_dtype=given["quantize_scale_dtype"],
        search=given["quantize_search"],
        compat=given["quantize_compat"],
        exclude=tuple(given["quantize_exclude_patterns"]),
    )


def _loras(inputs: Mapping[str, Any]) -> tuple[tuple[Path, float], ...]:
    """Those that are chosen and have an effect; there need not be any."""
    found: list[tuple[Path, float]] = []
    for number in range(1, tool_runs.NUM_LORAS + 1):
        path, strength = paths.chosen_lora(inputs[f"lora_{number}"]), inputs[f"strength_{number}"]
        if path is not None and strength:
            found.append((path, strength))
    return tuple(found)


def _error_picture(path: Path, loaded: LoadedModel) -> Any:
    """IMAGE; without measurements, what keeps nodes behind from running."""
    if all(layer.squares is None for layer in loaded.layers):
        return ExecutionBlocker(None)
    return to_comfy([error_plot(loaded.layers, title=path.stem)])
